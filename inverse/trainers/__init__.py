"""How energies are trained: models whose loss `inverse.training.train` minimises, apart from the energies."""
