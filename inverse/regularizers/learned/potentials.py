r"""Even potentials psi(t) with trained shape, one for each channel of t (batch, channels, ...), psi(0) = 0.

    SmoothL1         psi' = h/a clamp(a t)                      convex: Huber's, curvature h or 0
    Saturating       psi' = h/a clamp(a t) - 1/b clamp(b t)     rises with h - 1, falls with -1 and levels out
    Spline           psi' a linear spline, its slopes in [-1, high], in [0, high] where convex
    LogCosh          psi' = h/a tanh(a t)                       SmoothL1 without a corner
    Student          psi  = h/a^2 log(1 + (a t)^2) / 2          fields of experts; curvature in [-h/8, h]

clamp(s) is s cut to [-1, 1]. Each says what its curvature is bounded by, psi'' in [-low, high], whatever its
weights; a ridge regularizer's guarantee rests on that. Saturating and Spline have low <= 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from solvers.errors import GliodeError


class Potential(nn.Module, ABC):
    """psi of each channel, on the tape to second order (almost everywhere)."""

    channels: int

    def forward(self, t: Tensor) -> Tensor:
        """psi(t), entry by entry."""
        return self.value_and_slope(t)[0]

    def slope(self, t: Tensor) -> Tensor:
        """psi'(t), entry by entry."""
        return self.value_and_slope(t)[1]

    @abstractmethod
    def value_and_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """psi(t) and psi'(t), which share most of their work."""

    @abstractmethod
    def curvature(self) -> tuple[Tensor, Tensor]:
        """(low, high), each (channels,) and not negative: -low <= psi'' <= high."""


def _each(p: Tensor, t: Tensor) -> Tensor:
    """(channels,) beside t (batch, channels, ...)."""
    return p.to(t).reshape(-1, *(1,) * (t.ndim - 2))


def _huber(t: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Huber's function and its slope, of curvature 1 for |t| < 1/a."""
    edge = 1 / a
    s = torch.clamp(t, -edge, edge)
    return s * (t - 0.5 * s), s


class SmoothL1(Potential):
    """h/a clamp(a t): |t| h/a with its corner rounded over |t| < 1/a; h and a trained, a channel each."""

    def __init__(self, channels: int, a: float = 1.0, h: float = 1.0) -> None:
        super().__init__()
        if not (a > 0 and h > 0):
            raise GliodeError(f"potential: a = {a}, h = {h}: both must be above 0")
        self.channels = channels
        self.log_a = nn.Parameter(torch.full((channels,), math.log(a)))
        self.log_h = nn.Parameter(torch.full((channels,), math.log(h)))

    def value_and_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        value, slope = self._shape(t, _each(self.log_a.exp(), t))
        h = _each(self.log_h.exp(), t)
        return h * value, h * slope

    def _shape(self, t: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        return _huber(t, a)

    def curvature(self) -> tuple[Tensor, Tensor]:
        h = self.log_h.exp()
        return torch.zeros_like(h), h


class LogCosh(SmoothL1):
    """h/a tanh(a t): h/a^2 log cosh(a t)."""

    def _shape(self, t: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        u = a * t
        size = u.abs()
        return (size + torch.log1p(torch.exp(-2 * size)) - math.log(2)) / a**2, torch.tanh(u) / a


class Student(SmoothL1):
    """h/a^2 log(1 + (a t)^2) / 2: the logarithm of a Student density, psi' = h t / (1 + (a t)^2)."""

    def _shape(self, t: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
        square = 1 + (a * t).square()
        return square.log() / (2 * a**2), t / square

    def curvature(self) -> tuple[Tensor, Tensor]:
        h = self.log_h.exp()
        return h / 8, h  # (1 - s^2) / (1 + s^2)^2 is lowest, -1/8, at s^2 = 3


class Saturating(Potential):
    """h/a clamp(a t) - 1/b clamp(b t), b = (1 + r) a/h: r/b |t| is left for large t; h > 1, r > 0 trained."""

    def __init__(self, channels: int, a: float = 1.0, h: float = 10.0, r: float = 0.1) -> None:
        super().__init__()
        if not (a > 0 and h > 1 and r > 0):
            raise GliodeError(f"potential: a = {a}, h = {h}, r = {r}: a and r must be above 0, h above 1")
        self.channels = channels
        self.log_a = nn.Parameter(torch.full((channels,), math.log(a)))
        self.log_h = nn.Parameter(torch.full((channels,), math.log(h - 1)))  # of h - 1
        self.log_r = nn.Parameter(torch.full((channels,), math.log(r)))

    def value_and_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        a, h = self.log_a.exp(), 1 + self.log_h.exp()
        b = (1 + self.log_r.exp()) * a / h
        h = _each(h, t)
        (v, s), (w, p) = _huber(t, _each(a, t)), _huber(t, _each(b, t))
        return h * v - w, h * s - p

    def curvature(self) -> tuple[Tensor, Tensor]:
        h = 1 + self.log_h.exp()
        return torch.ones_like(h), h


class Spline(Potential):
    """psi' odd and linear between its knots at 0, 1/a, ..., pieces/a, constant beyond; a is trained.

    The slopes of its pieces are softplus(.) - modulus: above 0 where it is 0, and psi convex.
    """

    def __init__(
        self, channels: int, a: float = 1.0, h: float = 10.0, pieces: int = 10, modulus: float = 0.0
    ) -> None:
        super().__init__()
        if not (a > 0 and h > 0 and pieces > 1 and modulus >= 0):
            raise GliodeError(
                f"potential: a = {a}, h = {h}, {pieces} pieces, modulus {modulus}: a and h must be above 0, "
                "pieces 2 or more, the modulus not negative"
            )
        self.channels, self.modulus = channels, modulus
        self.log_a = nn.Parameter(torch.full((channels,), math.log(a)))
        slopes = torch.full((channels, pieces), 0.02)  # above the modulus: nearly level, or nearly falling
        slopes[:, 0] = h + modulus
        self.raw = nn.Parameter(slopes.expm1().log() if h < 50 else slopes)

    def slopes(self) -> Tensor:
        """(channels, pieces)."""
        return nn.functional.softplus(self.raw) - self.modulus

    def value_and_slope(self, t: Tensor) -> tuple[Tensor, Tensor]:
        d = nn.functional.pad(self.slopes(), (0, 1))  # 0 beyond the last knot
        heights = nn.functional.pad(d[:, :-1].cumsum(1), (1, 0))  # of psi' at the knots, in units of 1/a
        areas = nn.functional.pad(((heights[:, :-1] + heights[:, 1:]) / 2).cumsum(1), (1, 0))
        a, size = _each(self.log_a.exp(), t), t.abs()
        u = a * size
        piece = u.detach().clamp(max=d.shape[1] - 1).long()
        v = u - piece
        at = piece + _each(torch.arange(self.channels, device=t.device) * d.shape[1], piece)
        d, height, area = (table.to(t).take(at) for table in (d, heights, areas))
        return (area + v * (height + d * v / 2)) / a**2, t.sign() * (height + d * v) / a

    def curvature(self) -> tuple[Tensor, Tensor]:
        d = self.slopes()
        return (-d).amax(1).clamp(min=0), d.amax(1).clamp(min=0)


POTENTIALS: dict[str, type[Potential]] = {
    "smooth_l1": SmoothL1,
    "log_cosh": LogCosh,
    "student": Student,
    "saturating": Saturating,
    "spline": Spline,
}
