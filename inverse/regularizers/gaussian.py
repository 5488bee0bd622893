r"""Gaussian priors of fields: R(m) = weight / 2 ||m - mean||^2 in the norm of the precision C^-1.

With weight 1 that is minus the logarithm of the density of N(mean, C), up to a constant.

The space's Gram matrix is the precision C^-1 and its Riesz map the covariance C, so that gradients and inner
iterations in `prior.space` are preconditioned by the prior. `solvers.fem.priors` makes the pieces of
BiLaplacian fields; any space and draw of the same covariance do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from inverse.regularizers.tikhonov import Tikhonov
from solvers.errors import GliodeError
from solvers.spaces import Space, reduce

EXACT = 20_000  # entries up to which the variance is exact
RANK, DRAWS = 100, 200


class GaussianPrior(Tikhonov):
    """N(mean, C) as a regularizer: `space`, `mean`, `weight`, value, dual gradient, Hessian action, draws.

    space: Gram matrix C^-1, Riesz map C; mean: a point, or a number for a constant field; draw: generator ->
    a draw of N(0, C) (under MPI the rank's part; generators of all ranks seeded alike), e.g. the `sample` of
    `solvers.fem.priors.bilaplacian`. `sample` and `variance` are those of C itself, whatever the weight.
    """

    def __init__(
        self,
        space: Space,
        mean: Tensor | float,
        draw: Callable[[torch.Generator], Tensor],
        weight: float = 1.0,
    ) -> None:
        if not isinstance(mean, Tensor):
            mean = torch.full(space.shape, mean, dtype=torch.float64)
        if not bool(torch.isfinite(mean).all()):
            raise GliodeError("GaussianPrior: the mean holds NaN or infinite values")
        super().__init__(space, weight, mean)
        self.mean = mean.detach().clone()
        self._draw = draw

    def sample(self, generator: torch.Generator) -> Tensor:
        """A draw of N(mean, C)."""
        return self.mean + self._draw(generator)

    def variance(
        self, generator: torch.Generator | None = None, rank: int = RANK, draws: int = DRAWS
    ) -> Tensor:
        r"""The diagonal of C: the pointwise prior variance.

        generator None: exact, by one application of C an entry; refused above 20,000 entries. With a
        generator (all ranks alike): with P the projection onto the range of C found by `rank` draws,

            diag C = 2 diag(P C) - diag(P C P) + diag((1 - P) C (1 - P)),

        the first two exactly (2 `rank` applications of C), the last by the mean square of `draws` draws. It
        is unbiased, and its relative standard deviation at a point is sqrt(2 / draws) times the share of the
        last term in the variance, so below 0.1 for 200.
        """
        if generator is None:
            return self._columns()
        Y = torch.stack([self._draw(generator) for _ in range(rank)], 1)
        Y = torch.stack([self.space.riesz(y) for y in Y.unbind(1)], 1)
        Q = self._orthonormal(self._orthonormal(Y))
        CQ = torch.stack([self.space.riesz(q) for q in Q.unbind(1)], 1)
        core = reduce(Q.mT @ CQ, self.space.comm)
        known = 2 * (Q * CQ).sum(1) - ((Q @ core) * Q).sum(1)
        rest = torch.zeros_like(known)
        for _ in range(draws):
            x = self._draw(generator)
            rest += (x - Q @ reduce(Q.mT @ x, self.space.comm)).square() / draws
        return known + rest

    def _columns(self) -> Tensor:
        comm: Any = self.space.comm
        n = self.space.size
        sizes = [n] if comm is None else comm.allgather(n)
        if sum(sizes) > EXACT:
            raise GliodeError(
                f"variance: {sum(sizes)} entries are too many to do exactly; pass a generator for an estimate"
            )
        first = 0 if comm is None else sum(sizes[: comm.rank])
        out = torch.zeros(n, dtype=torch.float64)
        for k in range(sum(sizes)):
            unit = torch.zeros(n, dtype=torch.float64)
            mine = first <= k < first + n
            if mine:
                unit[k - first] = 1.0
            column = self.space.riesz(unit)
            if mine:
                out[k - first] = column[k - first]
        return out

    def _orthonormal(self, Y: Tensor) -> Tensor:
        """Y R^-1 with R^T R = Y^T Y: orthonormal columns over all ranks (twice is enough)."""
        values, vectors = torch.linalg.eigh(reduce(Y.mT @ Y, self.space.comm))
        kept = values > 1e-14 * values[-1]
        return Y @ (vectors[:, kept] / values[kept].sqrt())
