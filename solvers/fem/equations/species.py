"""Species on DOLFINx: each diffuses by a `DiffusionStep` of its own, serial and MPI."""

from __future__ import annotations

import torch
from torch import Tensor

from solvers.fem.diffusion import DiffusionStep, Scheme
from solvers.fem.mesh import Domain
from solvers.fem.operators import DiffusionOperator
from solvers.fem.spaces import communicator
from solvers.node.science.species import Reaction, Species


def on_domain(
    domain: Domain,
    reaction: Reaction,
    scheme: Scheme = "sdirk2",
    checkpoint: int | None = None,
) -> Species:
    """The species on a mesh; states (species, owned dofs).

    A step of diffusion that leaves its bounds is taken again by implicit Euler (`DiffusionStep`): with
    M-matrices (voxels) no species falls below -1e-7.
    """
    operator = DiffusionOperator(domain)
    step = DiffusionStep(operator, scheme)

    def diffusion(u: Tensor, dt: Tensor | float, w: Tensor) -> Tensor:
        return torch.stack([step(one, dt, weights) for one, weights in zip(u, w, strict=True)])

    def conductances(D: Tensor) -> Tensor:
        return torch.stack([operator.conductances(one) for one in D])

    return Species(reaction, diffusion, conductances, domain.n_cells, communicator(domain), checkpoint)
