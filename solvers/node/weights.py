r"""Weights that depend on the depth, w(t) on [0, T], and the spaces that they live in."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from scipy.interpolate import CubicSpline
from torch import Tensor, nn

from solvers.errors import GliodeError
from solvers.evolution import is_dual
from solvers.ode.fields import Sampled
from solvers.spaces import DepthSobolev, Euclidean, Product, Space

KINDS = ("linear", "cubic", "steps", "constant")


class DepthWeights(nn.Module):
    """w(t) of shape `shape`, with values w_k (knots, *shape) at equal distances on [0, duration].

    kind: "linear": linear between the knots; "cubic": the natural cubic spline through them; "steps":
    constant in each of `knots` time steps (a layer's own weights); "constant": one value. each: the space of
    the values at one knot (None: Euclidean). Raises GliodeError for other kinds, too few knots (2; cubic 3),
    a duration that is not positive.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        kind: str = "linear",
        knots: int = 1,
        duration: float = 1.0,
        each: Space | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise GliodeError(f"weights: kind {kind!r} is not one of {', '.join(KINDS)}")
        least = {"linear": 2, "cubic": 3}.get(kind, 1)
        if knots < least or (kind == "constant" and knots != 1):
            raise GliodeError(
                f"weights: {knots} knots for kind {kind!r}; give {least}"
                + (" or more" * (kind != "constant"))
            )
        if not (math.isfinite(duration) and duration > 0):
            raise GliodeError(f"weights: the duration must be positive and finite, got {duration}")
        self.kind, self.duration, self.each = kind, duration, each
        self.values = nn.Parameter(torch.zeros(knots, *shape))
        self._basis: tuple[bytes, Tensor, list[list[int]]] | None = None

    @property
    def knots(self) -> Tensor:
        """The times of the values (of "steps": the middle of each)."""
        count = len(self.values)
        if self.kind in ("linear", "cubic"):
            return torch.linspace(0, self.duration, count, dtype=torch.float64)
        return (torch.arange(count, dtype=torch.float64) + 0.5) * (self.duration / count)

    def sample(self, stages: Tensor) -> Sampled:
        """At the stage times (steps, s)."""
        if self.kind == "constant":
            return Sampled.constant(self.values[0], stages)
        if self.kind == "steps":
            return Sampled.stepwise(self.values, stages, "weights")
        if stages.requires_grad or is_dual(stages):
            raise GliodeError(
                f"weights: learned times need weights of kind 'steps' or 'constant', not {self.kind!r}"
            )
        basis, index = self._at(stages)
        table = basis @ self.values.reshape(len(self.values), -1)
        return Sampled(table.view(-1, *self.values.shape[1:]), index)

    def _at(self, stages: Tensor) -> tuple[Tensor, list[list[int]]]:
        """The knots' shares (rows, knots) in the values at the stage times, kept from call to call."""
        times = stages.double().cpu()
        key = times.numpy().tobytes()
        if self._basis is None or self._basis[0] != key:
            if float(times.min()) < -1e-9 or float(times.max()) > self.duration * (1 + 1e-6) + 1e-9:
                raise GliodeError(
                    f"weights: known on [0, {self.duration:g}], asked at {float(times.min()):g} to "
                    f"{float(times.max()):g}; give the duration of the integration"
                )
            different, which = torch.unique(times.mul(1e9 / self.duration).round(), return_inverse=True)
            different = (different / 1e9).clamp(0, 1) * (len(self.values) - 1)
            if self.kind == "linear":
                left = different.floor().clamp(max=len(self.values) - 2).long()
                share = (different - left)[:, None]
                unit = torch.eye(len(self.values), dtype=torch.float64)
                basis = (1 - share) * unit[left] + share * unit[left + 1]
            else:
                count = len(self.values)
                spline = CubicSpline(
                    range(count), torch.eye(count, dtype=torch.float64).numpy(), bc_type="natural"
                )
                basis = torch.from_numpy(spline(different.numpy()))
            self._basis = key, basis, which.tolist()
        _, basis, index = self._basis
        return basis.to(self.values), index

    def space(self, length: float) -> Space:
        """H1 over the depth with a length scale (0: L2); see `solvers.spaces.DepthSobolev`."""
        shape = tuple(self.values.shape[1:])
        if len(self.values) == 1:
            return self.each or Euclidean(math.prod(shape))
        return DepthSobolev(self.knots, shape, length, self.each)

    def roughness(self) -> float:
        """The mean over depth and entries of |w'(t)|."""
        if len(self.values) == 1:
            return 0.0
        values = self.values.detach().double().cpu()
        return float((values.diff(dim=0).abs() / float(self.knots.diff()[0])).mean())


class Parameters:
    """A module's parameters as one point of a Product space: depth-varying weights in `DepthWeights.space`,
    all others Euclidean.

    `space`: that Product; `pack()`: the present values, flat; `unpack(m)`: {name: tensor} for
    torch.func.functional_call, on the tape; `load(m)`: into the module. Only parameters that require a
    gradient.
    """

    def __init__(self, module: nn.Module, length: float = 0.0) -> None:
        spaces: dict[str, Space] = {}
        self.module = module
        self.own = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self.own:
            raise GliodeError("model: no parameter requires a gradient; there is nothing to train")
        deep = {id(m.values): m for m in module.modules() if isinstance(m, DepthWeights)}
        for name, parameter in self.own.items():
            weights = deep.get(id(parameter))
            spaces[name] = Euclidean(parameter.numel()) if weights is None else weights.space(length)
        self.space = Product(spaces)

    def pack(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.own.values()])

    def unpack(self, m: Tensor) -> Mapping[str, Tensor]:
        parts = m.split([p.numel() for p in self.own.values()])
        return {name: part.view(p.shape) for (name, p), part in zip(self.own.items(), parts, strict=True)}

    def load(self, m: Tensor) -> None:
        with torch.no_grad():
            for name, part in self.unpack(m).items():
                self.own[name].copy_(part)
