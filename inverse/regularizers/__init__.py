"""Priors: what is known of the unknown before the data speak."""
