r"""Function spaces of a domain: L2 with the lumped mass, and Sobolev H1.

    lumped     (a, b) = sum_i M_i a_i b_i
    sobolev    (a, b) = sum_i M_i a_i b_i + length^2 int grad a . grad b

Points are the rank's owned dofs. An L2 gradient is as rough as the data; an H1 gradient solves
(M + length^2 K) g = d, with natural ends on the boundary, and is smooth over `length` mm.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from solvers.errors import GliodeError
from solvers.fem.mesh import Domain
from solvers.fem.operators import DiffusionOperator
from solvers.spaces import Communicator, Diagonal, GramSpace


def communicator(domain: Domain) -> Communicator | None:
    """The domain's communicator where its tensors are distributed, None on one process."""
    return domain.comm if domain.comm.size > 1 else None


def lumped(domain: Domain) -> Diagonal:
    """L2 of the domain with the lumped mass."""
    return Diagonal(domain.mass, communicator(domain))


def sobolev(domain: Domain, length: float, rtol: float = 1e-10) -> GramSpace:
    """H1 of the domain with a length scale in mm; `rtol` of the solve in its Riesz map.

    Raises GliodeError unless the length is positive and finite (0 is `lumped`).
    """
    if not (math.isfinite(length) and length > 0):
        raise GliodeError(f"sobolev: the length must be positive and finite, got {length}; L2 is `lumped`")
    operator = DiffusionOperator(domain, rtol=rtol)
    w = operator.conductances(torch.ones(domain.n_cells, dtype=torch.float64))
    square = torch.tensor(length**2, dtype=torch.float64)

    def apply(a: Tensor) -> Tensor:
        return domain.mass * a + length**2 * operator.stiffness(w, a)

    def solve(dual: Tensor) -> Tensor:
        return operator.solve(dual, w, square)

    return GramSpace(domain.n_owned, apply, solve, communicator(domain))
