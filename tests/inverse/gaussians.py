"""A Gaussian of dense matrices, and one whose draws are the columns of a root of its covariance in turn."""

from __future__ import annotations

import torch
from torch import Tensor

from solvers.spaces import GramSpace


class Dense:
    """N(mean, C): its space's Gram matrix is C^-1."""

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self.mean, self.covariance = mean, covariance
        self.precision = torch.linalg.inv(covariance)
        self.root = torch.linalg.cholesky(covariance)
        self.space = GramSpace(len(mean), lambda a: self.precision @ a, lambda d: self.covariance @ d)

    def sample(self, generator: torch.Generator) -> Tensor:
        return self.mean + self.root @ torch.randn(len(self.mean), dtype=torch.float64, generator=generator)

    def variance(self, generator: torch.Generator | None = None) -> Tensor:
        return self.covariance.diagonal()


class Columns(Dense):
    """Draws that are the mean plus the columns of a root of C, one after the other."""

    column = 0

    def sample(self, generator: torch.Generator) -> Tensor:
        self.column += 1
        return self.mean + self.root[:, (self.column - 1) % len(self.mean)]


def matern(n: int, length: float = 0.2, sd: float = 1.0) -> Tensor:
    """Covariance of n equidistant points of [0, 1]: sd^2 (1 + r) exp(-r), r = sqrt(3) |x - y| / length."""
    x = torch.linspace(0, 1, n, dtype=torch.float64)
    r = 3**0.5 * (x[:, None] - x).abs() / length
    return sd**2 * (1 + r) * torch.exp(-r)
