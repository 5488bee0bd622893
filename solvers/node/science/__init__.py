"""Science-activated networks: the physics is the activation, its unknown coefficients are the weights."""
