r"""Gaussian noise through a map: to first order, and by Monte Carlo to compare.

    m ~ N(m0, C)    ->    F(m) ~ N(F(m0), J C J^T) to first order,    J = F'(m0).

Exact for affine F, wrong by O(|C|) relative where F is curved on the scale of the noise. Noise of the
weights is the same with F as a map of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from inverse.sensitivity.directional import Linearisation, Map, checked, output, same_shape, serial
from solvers.errors import GliodeError
from solvers.spaces import Space

LARGEST = 10_000  # outputs with a full covariance: 0.8 GB


@dataclass(frozen=True)
class Propagation:
    """Of F(m): mean and standard deviation, of its shape; covariance (N, N), None where only the diagonal was
    asked for.
    """

    mean: Tensor
    sd: Tensor
    covariance: Tensor | None


class _Noise:
    """N(0, C) for points like m, from `sd` (a number, or one for each entry) or `covariance` (or a Space)."""

    def __init__(self, m: Tensor, sd: float | Tensor | None, covariance: Tensor | Space | None) -> None:
        if (sd is None) == (covariance is None):
            raise GliodeError("noise: give either sd or covariance")
        self.m, self.n = m, m.numel()
        self.space: Space | None = None
        self.matrix: Tensor | None = None
        self.sd: Tensor | None = None
        if isinstance(covariance, Space):
            self.space = serial(covariance, m, "m")
        elif covariance is not None:
            if covariance.shape != (self.n, self.n):
                raise GliodeError(
                    f"covariance: shape {tuple(covariance.shape)}, m needs ({self.n}, {self.n})"
                )
            self.matrix = covariance.detach().to(m)
        else:
            given = torch.as_tensor(sd, dtype=m.dtype, device=m.device).detach()
            if given.ndim:
                same_shape(given, m, "sd", "m")
            if not bool((torch.isfinite(given) & (given >= 0)).all()):
                raise GliodeError("sd: a standard deviation is finite and not negative")
            self.sd = given.expand(m.shape)

    def apply(self, dual: Tensor) -> Tensor:
        """C w."""
        if self.space is not None:
            return self.space.riesz(dual)
        if self.matrix is not None:
            return (self.matrix @ dual.reshape(-1)).view(dual.shape)
        assert self.sd is not None
        return self.sd.square() * dual

    def root(self) -> Callable[[Tensor], Tensor]:
        """z -> L z with L L^T = C; a Space's covariance is made dense for it."""
        if self.sd is not None:
            sd = self.sd
            return lambda z: sd * z
        units = torch.eye(self.n, dtype=self.m.dtype, device=self.m.device)
        dense = torch.stack([self.apply(unit.view(self.m.shape)).reshape(-1) for unit in units])
        L, failed = torch.linalg.cholesky_ex((dense + dense.mT) / 2)
        if int(failed):
            raise GliodeError("covariance: it is not positive definite; add a little to its diagonal")
        return lambda z: (L @ z.reshape(-1)).view(z.shape)


def propagate(
    F: Map,
    m: Tensor,
    sd: float | Tensor | None = None,
    covariance: Tensor | Space | None = None,
    diagonal: bool = False,
) -> Propagation:
    """F(m) and the first-order covariance J C J^T of its error, by min(n, N) products.

    m: n entries, shape any; sd: of independent noise, a number or a tensor like m; covariance: (n, n)
    instead, or the Space whose inner product is the precision C^-1, so that C = riesz; diagonal: only the
    standard deviations, for maps of many outputs N. Raises GliodeError for a full covariance of more than
    10,000 outputs.
    """
    line = Linearisation(F, m)
    noise, N = _Noise(line.m, sd, covariance), line.value.numel()
    _affordable(N, diagonal)
    if noise.n >= N:  # row i of J
        rows = (line.adjoint(unit.view(line.value.shape)) for unit in _units(line.value))
        if diagonal:
            variance = torch.stack([(row * noise.apply(row)).sum() for row in rows])
            return _result(line.value, variance, None)
        J = torch.stack([*rows])
        full = J.flatten(1) @ torch.stack([noise.apply(row) for row in J]).flatten(1).mT
        return _result(line.value, full.diagonal(), (full + full.mT) / 2)
    variance = torch.zeros(N, dtype=line.value.dtype, device=line.value.device)
    factor, root = [], noise.root()
    for unit in _units(line.m):  # column j of J L
        column = line.tangent(root(unit.view(line.m.shape))).reshape(-1)
        variance += column.square()
        if not diagonal:
            factor.append(column)
    B = None if diagonal else torch.stack(factor)
    return _result(line.value, variance, None if B is None else B.mT @ B)


def monte_carlo(
    F: Map,
    m: Tensor,
    sd: float | Tensor | None = None,
    covariance: Tensor | Space | None = None,
    samples: int = 1000,
    generator: torch.Generator | None = None,
    diagonal: bool = False,
) -> Propagation:
    """Mean and covariance of F(m + noise) over `samples` draws, one call of F each.

    Arguments as in `propagate`; generator: for the seed (None: torch's own). The mean is known to sd /
    sqrt(samples), a standard deviation to about 1 / sqrt(2 samples) of itself.
    """
    m = checked(m, "m")
    noise = _Noise(m, sd, covariance)
    if samples < 2:
        raise GliodeError(f"samples: {samples}; a variance needs two or more")
    root, device = noise.root(), m.device if generator is None else generator.device
    mean = square = torch.zeros(0)
    shape: torch.Size | None = None
    for count in range(1, samples + 1):  # Welford's update: no cancellation, and nothing kept
        z = torch.randn(m.shape, generator=generator, dtype=m.dtype, device=device).to(m.device)
        with torch.no_grad():
            out = output(F(m + root(z))).detach()
        if not bool(torch.isfinite(out).all()):
            raise GliodeError(
                f"F: sample {count} gave NaN or infinite values; is the noise too large for it?"
            )
        if shape is None:
            shape = out.shape
            _affordable(out.numel(), diagonal)
            mean = torch.zeros_like(out).reshape(-1)
            square = torch.zeros_like(mean) if diagonal else mean.new_zeros(len(mean), len(mean))
        before = out.reshape(-1) - mean
        mean = mean + before / count
        after = out.reshape(-1) - mean
        square += before * after if diagonal else torch.outer(before, after)
    assert shape is not None
    square /= samples - 1
    if diagonal:
        return _result(mean.view(shape), square, None)
    return _result(mean.view(shape), square.diagonal(), (square + square.mT) / 2)


def _units(like: Tensor) -> Iterator[Tensor]:
    """The unit vectors, one at a time."""
    for i in range(like.numel()):
        unit = torch.zeros(like.numel(), dtype=like.dtype, device=like.device)
        unit[i] = 1
        yield unit


def _affordable(outputs: int, diagonal: bool) -> None:
    if not diagonal and outputs > LARGEST:
        raise GliodeError(f"covariance: {outputs} x {outputs} numbers; ask for diagonal=True")


def _result(mean: Tensor, variance: Tensor, covariance: Tensor | None) -> Propagation:
    return Propagation(mean, variance.clamp(min=0).sqrt().view(mean.shape), covariance)
