r"""Networks: blocks x(0) -> x(T) of a vector field, and what goes before and after them.

`Node` is a block like any nn.Module: alone, between a lifting and a projection, or inside an ordinary
network. With weights of kind "steps" it is a residual network, layer n its time step n:

    ResNet             Node(Standalone(d, kind="steps", knots=N), scheme="euler", steps=N)
    ODENet             the same of the field ODENet: y + h alpha_n sigma(K_n y + b_n)
    ODENet + simplex   the same of Standalone with learned="simplex"
    Runge-Kutta net    any of them with another scheme
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from solvers.errors import GliodeError
from solvers.node.activations import Activation, activation
from solvers.node.weights import DepthWeights
from solvers.ode.fields import VectorField
from solvers.ode.integrate import Noise, integrate
from solvers.ode.tableau import Tableau
from solvers.ode.tableaux import tableau


def simplex(v: Tensor, total: float) -> Tensor:
    """The nearest point of {h >= 0, sum h = total}, h = max(v - tau, 0), on the tape (Held, Wolfe, Crowder
    1974).
    """
    ordered = v.detach().sort(descending=True).values
    shifts = (ordered.cumsum(0) - total) / torch.arange(1, len(v) + 1, dtype=v.dtype, device=v.device)
    support = v.detach() > shifts[(ordered > shifts).sum().clamp(min=1) - 1]
    tau = (v[support].sum() - total) / support.sum()
    return torch.where(support, v - tau, torch.zeros_like(v))


class Node(nn.Module):
    """x(duration) of x' = field(t, x), x(0) the input (..., d), in equal or learned time steps.

    learned: "simplex": the time steps are the projection of free numbers on {h >= 0, sum h = duration}; for
    weights of kind "steps" or "constant". noise: injected in training mode only. The other arguments are
    those of `solvers.ode.integrate.integrate`. Raises GliodeError where the field's weights do not fit the
    steps.
    """

    def __init__(
        self,
        field: VectorField,
        duration: float = 1.0,
        steps: int = 20,
        scheme: str | Tableau = "kutta4",
        gradient: str = "adjoint",
        store: str = "stages",
        learned: str | None = None,
        noise: Noise | None = None,
    ) -> None:
        super().__init__()
        if steps < 1 or not (math.isfinite(duration) and duration > 0):
            raise GliodeError(f"node: {steps} steps of a duration {duration}; give 1 or more, positive")
        if learned not in (None, "simplex"):
            raise GliodeError(f"node: learned is {learned!r}, give 'simplex' or leave it out")
        for weights in field.modules():
            if not isinstance(weights, DepthWeights):
                continue
            if weights.kind == "steps" and len(weights.values) != steps:
                raise GliodeError(f"node: {steps} steps, but weights for {len(weights.values)}")
            if weights.kind in ("linear", "cubic"):
                if learned is not None:
                    raise GliodeError("node: learned time steps need weights of kind 'steps' or 'constant'")
                if not math.isclose(weights.duration, duration):
                    raise GliodeError(
                        f"node: the duration is {duration}, its weights know [0, {weights.duration}]"
                    )
        self.field, self.duration, self.scheme = field, duration, tableau(scheme)
        self.gradient, self.store, self.noise = gradient, store, noise
        grid = torch.linspace(0, duration, steps + 1, dtype=torch.float64)
        self.register_buffer("grid", grid, persistent=False)
        self.free_steps = nn.Parameter(torch.full((steps,), duration / steps)) if learned else None

    def times(self) -> Tensor:
        """The time grid (steps + 1,), on the tape where it is learned."""
        grid: Tensor = self.get_buffer("grid")
        if self.free_steps is None:
            return grid
        h = simplex(self.free_steps, self.duration)
        return torch.cat([torch.zeros_like(h[:1]), h.cumsum(0)])

    def forward(self, x: Tensor, trajectory: bool = False) -> Tensor:
        """x(duration); trajectory=True: x at all times, (steps + 1, ..., d)."""
        return integrate(
            self.field,
            x,
            self.times(),
            self.scheme,
            self.gradient,
            self.store,
            trajectory=trajectory,
            noise=self.noise if self.training else None,
        )


class Net(nn.Module):
    """The plain network y_(n+1) = sigma(K_n y_n + b_n), n < layers, on (..., d)."""

    def __init__(self, dim: int, layers: int = 20, sigma: str | Activation = "tanh") -> None:
        super().__init__()
        self.sigma = activation(sigma)
        self.K = DepthWeights((dim, dim), "steps", layers)
        self.b = DepthWeights((dim,), "steps", layers)

    def forward(self, x: Tensor, trajectory: bool = False) -> Tensor:
        states = [x]
        for K, b in zip(self.K.values.unbind(0), self.b.values.unbind(0), strict=True):
            states.append(self.sigma.value(nn.functional.linear(states[-1], K, b)))
        return torch.stack(states) if trajectory else states[-1]


class Augment(nn.Module):
    """x -> (x, 0): more dimensions for the flow to move in."""

    def __init__(self, extra: int) -> None:
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.pad(x, (0, self.extra))


class Components(nn.Module):
    """x -> its first `count` components: the scores of a network that stands alone."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.count]


def fixed(layer: nn.Module) -> nn.Module:
    """The layer, no longer trained: a fixed classifier or lifting."""
    return layer.requires_grad_(False)
