r"""Regularizers of a source's density u(0), for the search and for the benchmark alike.

    h1        int |grad u|^2 / 2
    tv        int sqrt(|grad u|^2 + eps^2),  eps = 0.002 / mm
    sparsity  int u
    learned   trained weights (data/regularizers/source.safetensors, or a file given): MeshRidge on the mesh

    min_m 1/2 ||(F(u) - y) / sd||^2 + alpha R(u),    u = positive(m),

by L-BFGS in L2. The residuals are white here: R says what a source looks like, and nothing of what the images
know has to be smoothed away. (The discrepancy principle that chooses alpha still looks at the smoothed ones.)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from inverse.optimizers import quasi_newton
from inverse.optimizers.iteration import Result
from inverse.problem import LeastSquares
from inverse.regularizers.learned import files
from inverse.regularizers.learned.energy import Energy, Learned
from inverse.regularizers.learned.mesh import MeshRidge
from inverse.regularizers.total_variation import TotalVariation
from inverse.stopping import GradientTolerance, MaxIterations
from solvers.errors import GliodeError
from solvers.fem.gradients import Gradient
from solvers.fem.mesh import Domain
from solvers.fem.multiscale import Multiscale
from solvers.fem.spaces import communicator, lumped
from solvers.spaces import reduce
from tumour.source import SourceProblem, positive

Penalty = Callable[[Tensor], Tensor]
Name = Literal["h1", "tv", "sparsity", "learned"]

EDGE = 0.002
"""eps of total variation, 1/mm: a source rises to its 0.5 over some 10 mm, 25 times as steeply."""

RULES = (GradientTolerance(1e-3), MaxIterations(100))
"""When L-BFGS ends."""


def penalty_of(name: Name, domain: Domain, weights: str | Path | None = None) -> Penalty:
    """R(u) of a density (owned dofs,), on the tape, the same on every rank.

    weights: of `learned`; None: those that come with Gliode. Raises GliodeError where they fit no mesh.
    """
    if name == "learned":
        energy, card = files.load_energy(files.shipped("source") if weights is None else weights, units="1")
        return learned(energy, domain, card.weight)
    comm = communicator(domain)
    if name == "sparsity":
        return lambda u: reduce(domain.mass @ u, comm)
    gradient = Gradient(domain)
    if name == "tv":
        return TotalVariation(gradient, smoothing=EDGE)
    return lambda u: reduce(gradient.weights @ gradient(u).square().sum(1) / 2, comm)


def learned(energy: Energy, domain: Domain, weight: float = 1.0) -> Learned:
    """A trained energy on a mesh. Raises GliodeError for one that is not of meshes."""
    if not isinstance(energy, MeshRidge):
        raise GliodeError(
            f"locate.weights: {type(energy).__name__} is not of meshes; take the weights of a mesh_ridge"
        )
    return Learned(energy.on(Multiscale(domain, energy.lengths)), lumped(domain), weight=weight)


def problem_with(problem: SourceProblem, defect: Tensor, regularizer: Penalty) -> LeastSquares:
    """The problem of m in L2, white residuals, data less a defect (data,), with a regularizer of m."""
    return LeastSquares(
        lumped(problem.domain),
        lambda m: problem.growing.images(positive(m)),
        problem.data - defect,
        problem.sd,
        regularizer=regularizer,
    )


def of_source(penalty: Penalty, alpha: float) -> Penalty:
    """alpha R(positive(m)), of m."""
    return lambda m: alpha * penalty(positive(m))


def minimised(problem: LeastSquares, start: Tensor) -> Result:
    """Its minimiser from a start."""
    return quasi_newton.minimise(problem, start, stopping=RULES)


def smoothed_norm(problem: SourceProblem, defect: Tensor, u: Tensor) -> float:
    """||B (F(u) + defect - y) / sd||, what the discrepancy principle looks at."""
    with torch.no_grad():
        r = (problem.growing.images(u) + defect - problem.data) / problem.sd
        return float(torch.linalg.vector_norm(problem.smooth(r)))
