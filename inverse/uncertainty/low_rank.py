r"""How sure of a field: the Laplace posterior as the prior's covariance less a low-rank part.

With a Gaussian prior N(m_0, C), whose precision C^-1 is the Gram matrix of its space, and H = J^T J the
Gauss-Newton Hessian of the misfit at the estimate,

    H v_i = lambda_i C^-1 v_i,    <C^-1 v_i, v_j> = delta_ij,    S = (H + C^-1)^-1
      S  =  C - sum_i lambda_i / (1 + lambda_i) v_i v_i^T,

exact for a linear forward map (Bui-Thanh, Ghattas, Martin, Stadler 2013, equations 20 to 22). The data of a
smoothing forward map fix few directions: the lambda_i fall fast, and those far below 1 change nothing.
Since C is the sum of all v_i v_i^T, what r kept ones leave out is bounded at each point by

    0 <= (variance - exact variance)(x) <= lambda_r / (1 + lambda_r) (prior variance - sum_i<=r v_i^2)(x).

The v_i come from a randomised double pass (Saibaba, Lee, Kitanidis 2016, algorithm 6; Villa, Petra, Ghattas
2021, algorithm 2): a basis of the images C H w of draws w of the prior, orthonormal in the space, and H on
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from scipy.special import ndtri
from torch import Tensor

from solvers.errors import GliodeError
from solvers.spaces import Space

if TYPE_CHECKING:
    from inverse.problem import LeastSquares

BLOCK = 10
"""Directions added at a time; as many beyond the last kept one have been looked at (Halko, Martinsson, Tropp
2011, section 4.2)."""


class Gaussian(Protocol):
    """N(mean, C) on a space whose Gram matrix is the precision C^-1 (riesz = C): a prior, or a posterior."""

    @property
    def space(self) -> Space: ...

    @property
    def mean(self) -> Tensor: ...

    def sample(self, generator: torch.Generator) -> Tensor:
        """One draw of N(mean, C)."""

    def variance(self, generator: torch.Generator | None = None) -> Tensor:
        """The diagonal of C: exact, or with a generator an estimate where there are many entries."""


@dataclass(frozen=True)
class Eigenpairs:
    """H v_i = values[i] G v_i, largest first, G the Gram matrix.

    values: (r,); vectors: (r, *shape), orthonormal in the space; next: an estimate of the largest value
    that is left out, 0.0 where none is; actions: how often H was applied.
    """

    values: Tensor
    vectors: Tensor
    next: float
    actions: int


def eigenpairs(
    action: Callable[[Tensor], Tensor],
    prior: Gaussian,
    least: float = 0.01,
    most: int = 200,
    seed: int = 0,
) -> Eigenpairs:
    """The pairs of a positive semidefinite `action` (primal to dual) with values >= `least`, at most `most`.

    The subspace grows by BLOCK directions, at two actions each, until it holds BLOCK values below `least`,
    the whole range of the action, or `most` + BLOCK directions. Under MPI every rank calls it. Raises
    GliodeError where an action is not finite.
    """
    if not (math.isfinite(least) and least > 0) or most < 1:
        raise GliodeError(f"eigenpairs: least {least} must be positive and finite, most {most} at least 1")
    space, generator = prior.space, torch.Generator().manual_seed(seed)
    basis: list[Tensor] = []
    duals: list[Tensor] = []  # G q, for products
    images: list[Tensor] = []  # H q
    T = torch.zeros(0, 0, dtype=torch.float64)
    actions, exhausted = 0, False
    while True:
        for _ in range(BLOCK):
            image = action(prior.sample(generator) - prior.mean)
            actions += 1
            q = _orthogonal(space, space.riesz(image), basis, duals)
            if q is None:  # the images so far span all others
                exhausted = True
                break
            basis.append(q)
            duals.append(space.gram(q))
            images.append(action(q))
            actions += 1
        old, new = len(T), len(basis)
        T = torch.nn.functional.pad(T, (0, new - old, 0, new - old))
        for j in range(old, new):
            for i in range(j + 1):
                T[i, j] = T[j, i] = (space.pair(images[j], basis[i]) + space.pair(images[i], basis[j])) / 2
        values, weights = torch.linalg.eigh(T)
        values, weights = values.flip(0), weights.flip(1)
        small = int((values < least).sum())
        if exhausted or small >= BLOCK or new >= most + BLOCK:
            break
    kept = min(new - small, most)
    shape = tuple(prior.mean.shape)
    vectors = torch.tensordot(weights[:, :kept].mT, torch.stack(basis), 1) if kept else torch.zeros(0, *shape)
    following = max(float(values[kept]), 0.0) if kept < new else 0.0
    return Eigenpairs(values[:kept], vectors.to(torch.float64), following, actions)


def _orthogonal(space: Space, a: Tensor, basis: list[Tensor], duals: list[Tensor]) -> Tensor | None:
    """a without its parts along the basis, of norm 1; None where nothing but rounding is left."""
    whole = space.norm(a)
    for _ in range(2):  # Gram-Schmidt, twice
        for q, dual in zip(basis, duals, strict=True):
            a = a - space.pair(dual, a) * q
    norm = space.norm(a)
    if not math.isfinite(norm):
        raise GliodeError("eigenpairs: the Hessian's action holds NaN or infinite values at this point")
    return a / norm if norm > 1e-12 * whole else None


def laplace(
    problem: LeastSquares,
    prior: Gaussian,
    m: Tensor,
    least: float = 0.01,
    most: int = 200,
    seed: int = 0,
) -> LowRankLaplace:
    """The Laplace posterior around the estimate m, from the eigenpairs of the misfit's J^T J.

    The problem's regularizer is not used: the prior says what it is, and m is a minimum of 1/2 ||r(m)||^2 +
    1/2 ||m - m_0||^2 in its space. An action is one tangent and one adjoint solve.
    """
    prior.space.check(m, "laplace: the estimate")
    if (weight := getattr(prior, "weight", 1.0)) != 1.0:
        raise GliodeError(
            f"laplace: the prior has weight {weight:g}, no posterior; scale its covariance, weight 1"
        )
    here = problem.evaluate(m)
    found = eigenpairs(lambda d: here.vjp(problem.jvp(m, d)), prior, least, most, seed)
    return LowRankLaplace(prior, m, found.values, found.vectors, found.next)


class LowRankLaplace:
    """N(mean, S), S = C - sum_i lambda_i / (1 + lambda_i) v_i v_i^T: a `Gaussian` itself.

    prior: N(m_0, C); mean: the estimate; values, vectors: (r,) and (r, *shape), as of `Eigenpairs`; next: an
    estimate of the largest eigenvalue that is left out. Raises GliodeError unless values are not negative
    and as many as vectors.
    """

    def __init__(
        self, prior: Gaussian, mean: Tensor, values: Tensor, vectors: Tensor, next: float = 0.0
    ) -> None:
        prior.space.check(mean, "LowRankLaplace: the mean")
        if vectors.shape != (*values.shape, *mean.shape):
            raise GliodeError(
                f"LowRankLaplace: vectors {tuple(vectors.shape)}, needs {(*values.shape, *mean.shape)}: "
                "one row for each value"
            )
        if not bool((torch.isfinite(values) & (values >= 0)).all()):
            raise GliodeError("LowRankLaplace: the eigenvalues must be finite and not negative")
        self.prior, self.mean, self.next = prior, mean.detach(), next
        self.values, self.vectors = values.detach(), vectors.detach()
        self._known: Tensor | None = None  # the prior's variance
        self.space: Space = _Updated(prior.space, self.values, self.vectors)

    @property
    def kept(self) -> int:
        """How many eigenvalues are kept."""
        return len(self.values)

    def variance(self, generator: torch.Generator | None = None) -> Tensor:
        """The pointwise variance: the prior's less sum_i lambda_i / (1 + lambda_i) v_i^2.

        generator: for an estimate of the prior's, where its entries are too many to do exactly; made once,
        so `sd`, `interval` and `neglected` then take the same.
        """
        return self._prior_variance(generator) - self._sum(self.values / (1 + self.values))

    def sd(self) -> Tensor:
        """The pointwise standard deviation (0 where an estimated variance is negative)."""
        return self.variance().clamp(min=0).sqrt()

    def neglected(self) -> Tensor:
        """At each point, by how much the variance can be too large for the eigenvalues left out.

        lambda / (1 + lambda) (prior variance - sum_i v_i^2) with lambda = `next`: a bound as far as that is
        the largest of them.
        """
        rest = (self._prior_variance() - self._sum(torch.ones_like(self.values))).clamp(min=0)
        return self.next / (1 + self.next) * rest

    def covariance(self, dual: Tensor) -> Tensor:
        """S applied to a dual."""
        return self.space.riesz(dual.detach())

    def sample(self, generator: torch.Generator) -> Tensor:
        """One draw: that of the prior, s, shrunk along the v_i by 1 / sqrt(1 + lambda_i)."""
        s = self.prior.sample(generator) - self.prior.mean
        dual, shrunk = self.prior.space.gram(s), s
        for value, v in zip(self.values.tolist(), self.vectors, strict=True):
            shrunk = shrunk - (1 - 1 / math.sqrt(1 + value)) * self.prior.space.pair(dual, v) * v
        return self.mean + shrunk

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Pointwise central credible intervals (low, high) at a level in (0, 1)."""
        if not 0 < level < 1:
            raise GliodeError(f"LowRankLaplace: the level must lie between 0 and 1, got {level}")
        half = float(ndtri(0.5 + level / 2)) * self.sd()
        return self.mean - half, self.mean + half

    def information_gain(self) -> float:
        """1/2 sum_i log(1 + lambda_i), in nats: what such data teach on average, for a linear forward map.

        Half the logarithm of det C / det S (Alexanderian, Gloor, Ghattas 2016).
        """
        return 0.5 * float(torch.log1p(self.values).sum())

    def divergence(self) -> float:
        """Kullback-Leibler divergence of this posterior from the prior, in nats: what these data have taught.

        1/2 (sum_i log(1 + lambda_i) - lambda_i / (1 + lambda_i) + ||mean - m_0||^2), the norm the prior's.
        """
        moved = self.prior.space.norm(self.mean - self.prior.mean) ** 2
        return self.information_gain() + 0.5 * (moved - float((self.values / (1 + self.values)).sum()))

    def exceedance(
        self,
        push_forward: Callable[[Tensor], Tensor],
        threshold: float,
        samples: int = 200,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The probability that push_forward(m) exceeds the threshold, entry by entry: the share of samples.

        push_forward: the nonlinear map from a point to what is asked about, such as the cell density at
        each voxel; one solve a sample. A share p is known to sqrt(p (1 - p) / samples), at 200 to 0.035.
        generator: seeded with 0 unless given.
        """
        return exceedance(self, push_forward, threshold, samples, generator)

    def _prior_variance(self, generator: torch.Generator | None = None) -> Tensor:
        if self._known is None:
            self._known = self.prior.variance(generator)
        return self._known

    def _sum(self, weights: Tensor) -> Tensor:
        """sum_i weights_i v_i^2."""
        return torch.tensordot(weights, self.vectors.square(), 1)


def exceedance(
    of: Gaussian,
    push_forward: Callable[[Tensor], Tensor],
    threshold: float,
    samples: int = 200,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`LowRankLaplace.exceedance` of any Gaussian, such as a prior."""
    if samples < 1 or not math.isfinite(threshold):
        raise GliodeError(
            f"exceedance: {samples} samples, threshold {threshold}; give 1 or more, and a number"
        )
    generator = generator or torch.Generator().manual_seed(0)
    with torch.no_grad():
        above = [push_forward(of.sample(generator)) > threshold for _ in range(samples)]
    return torch.stack(above).to(torch.float64).mean(0)


class _Updated(Space):
    """A space with the Gram matrix G + sum_i lambda_i G v_i (G v_i)^T."""

    def __init__(self, base: Space, values: Tensor, vectors: Tensor) -> None:
        self.shape, self.comm, self._base = base.shape, base.comm, base
        self._terms = [
            (value, v, base.gram(v)) for value, v in zip(values.tolist(), vectors, strict=True) if value
        ]

    def gram(self, primal: Tensor) -> Tensor:
        dual = self._base.gram(primal)
        for value, _, image in self._terms:
            dual = dual + value * self._base.pairing(image, primal) * image
        return dual

    def riesz(self, dual: Tensor) -> Tensor:
        primal = self._base.riesz(dual)
        for value, v, _ in self._terms:
            primal = primal - value / (1 + value) * self._base.pairing(dual, v) * v
        return primal

    def pairing(self, dual: Tensor, primal: Tensor) -> Tensor:
        return self._base.pairing(dual, primal)
