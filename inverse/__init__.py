"""Data to unknowns: misfits, optimizers, stopping rules, uncertainty."""
