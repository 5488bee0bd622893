r"""Small linear problems at any alpha by one singular value decomposition.

    min 1/2 ||(A x - y) / sd||^2 + alpha / 2 ||x - x0||_X^2,    G = L L^T the Gram matrix of X
    A L^(-T) = U S V^T,    x = x0 + L^(-T) V diag(s / (s^2 + alpha sd^2)) U^T (y - A x0)

(Engl, Hanke, Neubauer 1996, chapter 5). The decomposition serves all data, noise levels and alphas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from inverse.optimizers.gauss_newton import dense
from solvers.errors import GliodeError
from solvers.spaces import Space

SMALL = 5000


@dataclass(frozen=True)
class Regularized:
    """A solution: m = x, value = J(x), residual_norm = ||(A x - y) / sd||."""

    m: Tensor
    value: float
    residual_norm: float


class SpectralTikhonov:
    """The decomposition of a linear map from points of a space to data of any shape.

    values: s, (k,), falling; left: U (N, k); right: L^(-T) V (n, k), orthonormal in the space. Raises
    GliodeError for more than 5000 unknowns, and for a space distributed over ranks.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], space: Space) -> None:
        if space.comm is not None or space.size > SMALL:
            raise GliodeError(
                f"SpectralTikhonov: dense work for one process and at most {SMALL} unknowns, got "
                f"{space.size}; solve by newton_cg"
            )
        self.space = space
        self.matrix = torch.from_numpy(dense(forward, space.zeros()))
        root = torch.linalg.cholesky(torch.from_numpy(dense(space.gram, space.zeros())))
        whitened = torch.linalg.solve_triangular(root, self.matrix.mT, upper=False).mT
        self.left, self.values, right = torch.linalg.svd(whitened, full_matrices=False)
        self.right = torch.linalg.solve_triangular(root.mT, right.mT, upper=True)

    def power(self, w: Tensor, mu: float) -> Tensor:
        """(A* A)^mu w, A* the adjoint in the space: a source of known smoothness."""
        coefficients = self.right.mT @ self.space.gram(w).reshape(-1)
        return (self.right @ (self.values ** (2 * mu) * coefficients)).view(self.space.shape)

    def problem(self, data: Tensor, noise: float, reference: Tensor | None = None) -> SpectralProblem:
        """The problem of these data, of standard deviation `noise` each, with x0 = reference (None: zero)."""
        if not (math.isfinite(noise) and noise > 0):
            raise GliodeError(f"noise: the standard deviation must be positive and finite, got {noise}")
        if data.numel() != len(self.matrix):
            raise GliodeError(f"data: {data.numel()} numbers, the map gives {len(self.matrix)}")
        x0 = self.space.zeros() if reference is None else reference
        self.space.check(x0, "reference")
        return SpectralProblem(self, data.detach().reshape(-1), noise, x0)


class SpectralProblem:
    """What the rules ask for: `solve`, `freedom` and `size`."""

    def __init__(self, svd: SpectralTikhonov, data: Tensor, noise: float, reference: Tensor) -> None:
        self._svd, self._noise, self._reference = svd, noise, reference
        away = data - svd.matrix @ reference.reshape(-1)
        self._coefficients = svd.left.mT @ away
        self._unseen = max(float(away @ away - self._coefficients @ self._coefficients), 0.0)
        self.size = data.numel()

    def _damped(self, alpha: float) -> Tensor:
        """s^2 + alpha sd^2."""
        return self._svd.values.square() + alpha * self._noise**2

    def solve(self, alpha: float, start: Tensor) -> Regularized:
        """The minimiser at alpha (whatever the start)."""
        damped = self._damped(alpha)
        x = self._svd.values / damped * self._coefficients
        left = alpha * self._noise**2 / damped * self._coefficients
        square = (float(left @ left) + self._unseen) / self._noise**2
        m = self._reference + (self._svd.right @ x).view(self._reference.shape)
        return Regularized(m, square / 2 + alpha / 2 * float(x @ x), math.sqrt(square))

    def freedom(self, alpha: float, m: Tensor) -> float:
        """sum s^2 / (s^2 + alpha sd^2), the trace of the influence matrix (whatever m)."""
        return float((self._svd.values.square() / self._damped(alpha)).sum())
