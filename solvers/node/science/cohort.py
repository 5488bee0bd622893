r"""Many tumours at once: u_t = div(D grad u) + rho g(u) for a batch of patients' parameters, in torch alone.

The evolution of `tumour.model.TumourModel`, Strang splitting with Runge-Kutta-Legendre diffusion, for all
tumours of a batch together, on what `solvers.fem.export` saved. With equal steps each tumour's state is its
own single solve's to rounding; one tape holds them all, so the identification of a cohort is one
`LeastSquares` problem. Two differences: where a step leaves the bounds [min u, max u] by more than 1e-7,
`DiffusionStep` takes two implicit Euler steps instead, here it stays (seeds that the mesh resolves do not);
and growth laws that take substeps take those of the fastest tumour of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from solvers.errors import GliodeError
from solvers.evolution import Evolution, PointwiseStep, Step, Strang
from solvers.node.science import lanes
from solvers.node.science.batched import BatchedFlow
from solvers.node.science.lanes import Lanes
from solvers.node.science.voxels import VoxelOperator
from solvers.operators import mixture, monomials
from solvers.semidiscrete import SemiDiscrete

Form = Literal["compiled", "voxels"]


class Cohort:
    """u0 -> u(age) for a batch of tumours: differentiable in everything, in both modes, twice.

    problem: diffusion with a lumped mass and the fractions `white` and `grey`. growth: the flow
    (u, dt, rho) -> u(dt) of the growth law, pointwise (default: logistic). step: the longest time step in
    days. form: "compiled" (CPU, any mesh; the default there) or "voxels" (torch, any device, voxel grids; the
    default on CUDA). stages: see `BatchedFlow`; checkpoint: see `Evolution`; fused: torch.compile for
    "voxels".

    Raises GliodeError naming the part of the problem that is missing.
    """

    def __init__(
        self,
        problem: SemiDiscrete,
        growth: Step | None = None,
        step: float = 10.0,
        form: Form | None = None,
        stages: int | None = None,
        checkpoint: int | None = None,
        dtype: torch.dtype = torch.float64,
        device: str | torch.device = "cpu",
        fused: bool = False,
    ) -> None:
        pairs, mass, device = problem.conductances, problem.mass, torch.device(device)
        form = form or ("compiled" if device.type == "cpu" else "voxels")
        if missing := {"white", "grey"} - set(problem.fractions):
            raise GliodeError(f"problem: the fractions of {', '.join(sorted(missing))} are missing")
        if not step > 0:
            raise GliodeError(f"step: {step} days must be positive")
        self.n, self.longest, self.dtype, self.device = problem.n, step, dtype, device
        fields = mixture(torch.stack([problem.fractions["white"], problem.fractions["grey"]]))
        self.operator: Lanes | VoxelOperator
        if form == "compiled":
            if device.type != "cpu":
                raise GliodeError(f"form: 'compiled' runs on the CPU, not on {device}; give 'voxels'")
            if pairs is None or not isinstance(mass, Tensor) or pairs.tensor:
                raise GliodeError("problem: no diffusion by a number in each cell, or no lumped mass")
            self.operator = Lanes(pairs, fields, mass, dtype)
            growth = PointwiseStep(growth) if growth else lanes.logistic
        elif form == "voxels":
            if problem.grid is None or (pairs is not None and not pairs.vertex_rule):
                raise GliodeError("form: 'voxels' needs a voxel grid; this mesh has 'compiled', on the CPU")
            self.operator = VoxelOperator(problem.grid, fields, dtype, device, fused)
            growth = PointwiseStep(growth or _logistic)
        else:
            raise GliodeError(f"form: {form!r} is not one of compiled, voxels")
        self.flow = BatchedFlow(self.operator, stages)
        count = 1 if form == "compiled" else 3
        self._strang = Strang(growth, self.flow, count)
        self._evolution = Evolution(self._strang, checkpoint)

    def __call__(
        self,
        u0: Tensor,
        D_white: Tensor | float,
        D_grey: Tensor | float,
        rho: Tensor | float,
        age: Tensor | float,
        steps: int | None = None,
    ) -> Tensor:
        """The densities (batch, n) at each tumour's age, from u0 (batch, n) or (n,) at age 0.

        D_white, D_grey (mm^2/day), rho (1/day), age (days): a number, or one for each tumour, (batch,) or
        (batch, 1). steps: of all, each its own age long (default: by the oldest and `step`).
        """
        given = self._numbers(u0, D_white=D_white, D_grey=D_grey, rho=rho, age=age)
        oldest = float(given[4].detach().max())
        if not float(given[4].detach().min()) > 0:
            raise GliodeError(f"age: {float(given[4].detach().min())} days must be positive")
        if steps is not None and steps < 1:
            raise GliodeError(
                f"steps: {steps} must be positive; leave it out for steps of {self.longest} days"
            )
        count = steps if steps is not None else max(1, math.ceil(oldest / self.longest - 1e-9))

        def run(u: Tensor, age: Tensor, *rest: Tensor) -> Tensor:
            return self._evolution(u, age, count, *rest)

        return self._together(run, *given)

    def step(
        self,
        u: Tensor,
        dt: Tensor | float,
        D_white: Tensor | float,
        D_grey: Tensor | float,
        rho: Tensor | float,
    ) -> Tensor:
        """One step of dt days of states (batch, n), for `Evolution` or `Stepped`: unknowns may vary in time.

        Repeated it costs more than a call, which keeps its form of the states and joins half steps.
        """
        return self._together(self._strang, *self._numbers(u, D_white=D_white, D_grey=D_grey, rho=rho, dt=dt))

    def _numbers(self, u: Tensor, **numbers: Tensor | float) -> list[Tensor]:
        """u (batch, n), then the numbers, (batch,) each."""
        if u.ndim not in (1, 2) or u.shape[-1] != self.n:
            raise GliodeError(f"u0: shape {tuple(u.shape)}, expected (batch, {self.n})")
        if u.device.type != self.device.type or u.dtype != self.dtype:
            raise GliodeError(f"u0: {u.dtype} on {u.device}, this cohort is {self.dtype} on {self.device}")
        found, sizes = [], {"u0": len(u) if u.ndim == 2 else 1}
        for name, given in numbers.items():
            x = torch.as_tensor(given, dtype=self.dtype, device=self.device)
            x = x.squeeze(1) if x.ndim == 2 else x
            if x.ndim > 1:
                raise GliodeError(f"{name}: shape {tuple(x.shape)}, expected one number or (batch,)")
            known = x.detach()
            if not bool(torch.isfinite(known).all()) or (name.startswith("D_") and bool((known < 0).any())):
                raise GliodeError(f"{name}: {known.tolist()}; must be finite, and a diffusivity not negative")
            sizes[name] = len(x) if x.ndim else 1
            found.append(x)
        batch = max(sizes.values())
        if set(sizes.values()) - {1, batch}:
            raise GliodeError(f"batch: the sizes differ, {sizes}; give one or {batch} of each")
        return [u.expand(batch, -1), *(x.expand(batch) for x in found)]

    def _together(
        self,
        run: Callable[..., Tensor],
        u: Tensor,
        D_white: Tensor,
        D_grey: Tensor,
        rho: Tensor,
        days: Tensor,
    ) -> Tensor:
        """run(u, days, *weights, rho) in the operator's form, for as many tumours as go together."""
        theta, size = monomials(torch.stack([D_white, D_grey], 1)), self.operator.together or len(u)
        # Neighbours in the order of their stages waste none in a chunk.
        speed = days.detach() * torch.maximum(D_white, D_grey).detach()
        order = torch.argsort(speed, descending=True, stable=True)
        found = []
        for chosen in order.split(size):
            box, numbers = self.operator.box, self.operator.numbers
            weights = self.operator.weights(theta[chosen])
            out = run(box(u[chosen]), numbers(days[chosen]), *weights, numbers(rho[chosen]))
            found.append(self.operator.states(out)[: len(chosen)])
        return torch.cat(found)[torch.argsort(order)]


def _logistic(u: Tensor, dt: Tensor, rho: Tensor) -> Tensor:
    growth = torch.expm1(rho * dt)
    return u * (1.0 + growth) / (1.0 + u * growth)
