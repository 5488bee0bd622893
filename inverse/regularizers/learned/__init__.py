"""Regularizers whose form was learned on solved problems: energies, and how an inverse problem uses them."""
