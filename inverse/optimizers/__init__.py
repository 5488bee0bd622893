"""Optimizers written once over spaces."""
