r"""Closures: what no formula is known for, as a small network that keeps what is known by construction.

A growth law in u_t = div(D grad u) + rho g(u), u in [0, 1] the cell density over carrying capacity:

    g(u) = u c(u),   g(0) = g(1) = 0,   g > 0 in between,   so 0 <= u <= 1 is kept by every trained law

    Decreasing   c(u) = int_u^1 p / scale,   p > 0: the more crowded, the slower a cell divides
    Positive     c(u) = (1 - u) exp(n(u)) / scale,   no order: a weak Allee effect too

Only rho g is seen in data, so one of the two must be fixed: both laws take the logistic's value at a density
`at`, g(at) = at (1 - at), and rho (1/day) is then that of the logistic that grows as fast there.

As an unknown of `ScienceActivated` or `Stepped` a law arrives as the callable g(u). `GrowthFlow` is the same
law as the flow u -> u(dt) of splitting methods.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor, nn

from solvers.errors import Diverged, GliodeError
from solvers.node.collocation import Perceptron
from solvers.ode.integrate import integrate

NODES = 64  # of Decreasing
LONGEST = 0.25  # step of GrowthFlow, in units of its fastest rate
MOST_STEPS = 10_000  # in one dt


class Law(nn.Module):
    """g(u) = u c(u) with g(0) = g(1) = 0 and g(at) = at (1 - at), entry by entry of u, in float64.

    at: a density in (0, 1), best in the middle of those that the data visit, or rho is found badly. Raises
    GliodeError for others.
    """

    def __init__(self, at: float = 0.5) -> None:
        super().__init__()
        if not 0 < at < 1:
            raise GliodeError(f"closure: at is a density in (0, 1) that the data visit, got {at}")
        self.at = at

    @abstractmethod
    def per_capita(self, u: Tensor) -> Tensor:
        """c(u), of u's shape."""

    def forward(self, u: Tensor) -> Tensor:
        """g(u), of u's shape."""
        return u * self.per_capita(u)


class Decreasing(Law):
    """c(u) = (1 - at) C(u) / C(at),   C(u) = int_u^1 p dv,   p = exp(n(sqrt v)) > 0.

    c falls to c(1) = 0, also beyond 1, where g < 0. n, constant for the logistic law, is a perceptron with
    one layer of `width` tanh; the root gives room to low densities, where laws differ most. p is linear
    between its values at 64 places (k/64)^2, so C is exact, and a state of any size costs a look-up.
    Integrals of positive networks: Wehenkel and Louppe (2019).
    """

    roots: Tensor
    places: Tensor

    def __init__(self, width: int = 8, at: float = 0.5, seed: int = 0) -> None:
        super().__init__(at)
        self.network = Perceptron((0.0,), (1.0,), width=width, layers=1, seed=seed)
        self.network.layers[-1].bias.requires_grad_(False)  # it cancels
        roots = torch.linspace(0, 1, NODES + 1, dtype=torch.float64)[:, None]
        self.register_buffer("roots", roots, persistent=False)
        self.register_buffer("places", roots[:, 0].square(), persistent=False)

    def per_capita(self, u: Tensor) -> Tensor:
        all_u = torch.cat([u.reshape(-1), u.new_tensor([self.at])])
        inside = all_u.clamp(0.0, 1.0)
        cell = torch.bucketize(inside.detach(), self.places[1:-1], right=True)
        p, gaps = torch.exp(self.network(self.roots)[:, 0]), self.places.diff()
        areas = gaps * (p[1:] + p[:-1]) / 2
        beyond = areas.sum() - areas.cumsum(0)  # the integral from each cell's right end to 1
        beyond, right, slope = torch.stack([beyond, p[1:], -p.diff() / gaps]).index_select(1, cell)
        rest = self.places[1:][cell] - inside
        C = beyond + rest * (right + slope * rest / 2) - (right + slope * rest) * (all_u - inside)
        return ((1 - self.at) * C[:-1] / C[-1]).view(u.shape)


class Positive(Law):
    """c(u) = (1 - u) exp(n(u) - n(at)), n a perceptron with one layer of `width` tanh."""

    def __init__(self, width: int = 8, at: float = 0.5, seed: int = 0) -> None:
        super().__init__(at)
        self.network = Perceptron((0.0,), (1.0,), width=width, layers=1, seed=seed)
        self.network.layers[-1].bias.requires_grad_(False)  # it cancels

    def per_capita(self, u: Tensor) -> Tensor:
        n, at = self.network(u.reshape(-1, 1)), self.network(u.new_tensor([[self.at]]))
        return (1 - u) * torch.exp(n - at).view(u.shape)


class GrowthFlow(nn.Module):
    """The flow of u' = rho g(u) of a learned law: forward(u, dt, rho) is the state after dt (as in
    tumour.growth).

    Runge-Kutta steps of order 4 for s = ln(u(t)/u(0)), s' = rho c(u(0) e^s): 0 is kept exactly, no density
    turns negative, and none leaves [0, 1] by more than the scheme's error. The longest step is a quarter
    in units of the fastest rate, max(rho u |c'(u)|, rho c / 4) over the densities in [0, 1]. Raises Diverged
    where that is not finite, or so fast that one dt takes over 10000 steps.
    """

    def __init__(self, law: Law) -> None:
        super().__init__()
        self.law = law

    def forward(self, u: Tensor, dt: Tensor | float, rho: Tensor | float) -> Tensor:
        t = torch.as_tensor(dt, dtype=u.dtype) * rho
        count = float(t.detach().abs().max()) * self.rate() / LONGEST
        if not count <= MOST_STEPS:
            raise Diverged(
                f"closure: the learned law's flow takes {count:.3g} steps in one dt (at most {MOST_STEPS}): "
                "dt, rho or the network's parameters are not finite, or far too large"
            )
        times = torch.linspace(0, 1, max(math.ceil(count - 1e-9), 1) + 1, dtype=torch.float64)

        def field(_: Tensor, s: Tensor) -> Tensor:
            return t * self.law.per_capita(u * torch.exp(s))

        return u * torch.exp(integrate(field, torch.zeros_like(u), times, "kutta4", gradient="autograd"))

    def rate(self) -> float:
        """max(u |c'(u)|, c(u) / 4), from 65 densities in [0, 1]."""
        with torch.no_grad():
            u = torch.linspace(0, 1, 65, dtype=torch.float64).square()
            c = self.law.per_capita(u)
            slopes = c.diff() / u.diff() * (u[1:] + u[:-1]) / 2
            return float(torch.maximum(slopes.abs().max(), c.max() / 4))
