"""Networks that are ordinary differential equations, and vector fields that are networks."""
