"""How much the output of a differentiable map changes: with its input, with noise, under attack, at most.

The map F may be anything on the tape: a network, a neural ODE, an evolution of finite elements. Its
derivative is used through products alone, one tangent (the sensitivity problem) or one adjoint solve
each.
"""

from inverse.sensitivity.attacks import (
    Attack,
    cross_entropy,
    fgsm,
    pgd,
    squared_error,
)
from inverse.sensitivity.directional import Linearisation, adjoint, directional
from inverse.sensitivity.lipschitz import (
    certified_flow,
    certified_lipschitz,
    certified_radius,
    local_lipschitz,
)
from inverse.sensitivity.minimal import minimal_attack
from inverse.sensitivity.propagation import Propagation, monte_carlo, propagate
from inverse.sensitivity.singular import SingularTriplets, singular_values

__all__ = [
    "Attack",
    "Linearisation",
    "Propagation",
    "SingularTriplets",
    "adjoint",
    "certified_flow",
    "certified_lipschitz",
    "certified_radius",
    "cross_entropy",
    "directional",
    "fgsm",
    "local_lipschitz",
    "minimal_attack",
    "monte_carlo",
    "pgd",
    "propagate",
    "singular_values",
    "squared_error",
]
