"""Ordinary differential equations in torch: Butcher tableaux, integration, gradients of integration."""
