r"""A trained R of coefficient fields in the search for them: `regularizer: learned`.

    R(m) = weight sum_fields R_theta(a),    R_theta a MeshRidge (inverse.regularizers.learned.mesh)

in place of h1 or tv: the filters are in mm, so weights trained at 6 mm serve any mesh. R_theta is trained as
minus the logarithm of a prior's density beside 1/2 ||r||^2, so alpha = 1 is where the search for it begins.

R'' may be indefinite, so neither Newton-CG nor the Laplace posterior can have it for a metric. Both take

    s G,    G = K + M / length^2,    s = mean of <R''(m) d, d> over draws d of N(0, G^-1) / n,

the H1 metric of the same mean curvature. `curvature` says between what numbers R'' at m runs relative to it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from inverse.regularizers.gaussian import GaussianPrior
from inverse.regularizers.learned.energy import Learned
from inverse.regularizers.learned.files import load_energy, shipped
from inverse.regularizers.learned.mesh import MeshRidge
from solvers.errors import GliodeError
from solvers.fem.multiscale import Multiscale
from solvers.fem.spaces import lumped
from solvers.fem.weighted import WeightedSobolev
from solvers.spaces import GramSpace, Product, Space
from tumour.fields import Coefficients, Name

UNITS, SHIPPED = "1", "field"  # of the logarithm of a factor; the weights that come with Gliode
DRAWS, STEPS, LEAST = 4, 30, 1e-2


class LearnedPenalty:
    """R of all fields at once, on the tape, and the metric that stands for it at a point.

    weights: a file as scripts/train.py writes it, None: the one that comes with Gliode; length: mm, of G.
    Raises GliodeError for unknowns by tissue, and for weights of something else than fields on meshes.
    """

    quadratic = False

    def __init__(self, coefficients: Coefficients, weights: Path | None, length: float) -> None:
        if coefficients.by == "tissue":
            raise GliodeError("fields: a learned regularizer is of fields; with `by: tissue` take h1")
        path = shipped(SHIPPED) if weights is None else weights
        energy, card = load_energy(path, units=UNITS)
        if not isinstance(energy, MeshRidge):
            raise GliodeError(
                f"{path}: a {type(energy).__name__} is not for fields on meshes; a MeshRidge is"
            )
        self.coefficients, self.card = coefficients, card
        domain = coefficients.domain
        on = energy.on(Multiscale(domain, energy.lengths))
        self._R = Learned(on, lumped(domain), weight=card.weight, scale=card.scale)
        self._metric = WeightedSobolev(domain, length**-2)

    def weighted(self, alpha: float) -> Callable[[Tensor], Tensor]:
        """alpha R, on the tape."""
        zero = torch.zeros((), dtype=torch.float64)
        return lambda m: alpha * sum((self._R(a) for a in self.coefficients.parts(m).values()), zero)

    def space(self, m: Tensor) -> Product:
        """s G of each field at m."""
        return Product({name: self._scaled(self._scale(a)) for name, a in self._parts(m).items()})

    def prior(self, m: Tensor, alpha: float) -> GaussianPrior:
        """N(0, (alpha s G)^-1): what R is taken for at m."""
        scales = {name: self._scale(a) for name, a in self._parts(m).items()}
        space = Product({name: self._scaled(alpha * s) for name, s in scales.items()})

        def draw(generator: torch.Generator) -> Tensor:
            return torch.cat([self._metric.sample(generator) / (alpha * s) ** 0.5 for s in scales.values()])

        flat = GramSpace(sum(space.shape), space.gram, space.riesz, space.comm)
        return GaussianPrior(flat, 0.0, draw)

    def curvature(self, m: Tensor) -> tuple[float, float]:
        """The least and the largest <R'' d, d> / <s G d, d> at m, over all fields, by Lanczos."""
        found = []
        for a in self._parts(m).values():
            scale = self._scale(a)
            space = self._metric.space

            def relative(d: Tensor, a: Tensor = a) -> Tensor:
                return self._metric.space.riesz(self._R.hessian_action(a, d))

            ends = lanczos(space, relative, self._metric.sample(torch.Generator().manual_seed(1)))
            found += [float(end) / scale for end in ends]
        return min(found), max(found)

    def said(self, m: Tensor) -> str:
        """What the standard deviations rest on, one sentence."""
        low, high = self.curvature(m)
        kind = "indefinite there, so no Gaussian's" if low < 0 else "positive there"
        span = f"from {low:.2g} to {high:.2g} times"
        return f"R'' is {kind}, {span} the H1 metric that stands for it in the posterior"

    def _parts(self, m: Tensor) -> dict[Name, Tensor]:
        return self.coefficients.parts(m.detach())

    def _scale(self, a: Tensor) -> float:
        """s at a field; where R'' is negative on the average, LEAST of the one of no departure."""
        here = self._mean(a)
        return max(here, LEAST * self._mean(torch.zeros_like(a)), 1e-12)

    def _mean(self, a: Tensor) -> float:
        generator, space = torch.Generator().manual_seed(0), self._metric.space
        draws = [self._metric.sample(generator) for _ in range(DRAWS)]
        top = sum(space.pair(self._R.hessian_action(a, d), d) for d in draws)
        return top / sum(space.pair(space.gram(d), d) for d in draws)

    def _scaled(self, s: float) -> GramSpace:
        G = self._metric.space
        return GramSpace(G.shape[0], lambda a: s * G.gram(a), lambda d: G.riesz(d) / s, G.comm)


def lanczos(
    space: Space, operator: Callable[[Tensor], Tensor], start: Tensor, steps: int = STEPS
) -> tuple[float, float]:
    """The extreme Ritz values of an operator self-adjoint in the space: near the ends of its spectrum."""
    basis, diagonal, beside = [start / space.norm(start)], [], []
    for _ in range(min(steps, start.numel())):
        v = operator(basis[-1])
        diagonal.append(space.inner(v, basis[-1]))
        for _ in range(2):  # against all, twice: rounding costs orthogonality
            for q in basis:
                v = v - space.inner(v, q) * q
        size = space.norm(v)
        if not size > 1e-10 * abs(diagonal[0]):
            break
        beside.append(size)
        basis.append(v / size)
    T = np.diag(diagonal) + np.diag(beside[: len(diagonal) - 1], 1) + np.diag(beside[: len(diagonal) - 1], -1)
    values = np.linalg.eigvalsh(T)
    return float(values[0]), float(values[-1])
