"""Equations to states: inner products, finite elements, ordinary differential equations, networks."""
