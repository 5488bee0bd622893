r"""Systems of species, u_k,t = div(D_k grad u_k) + R_k(u): reactions, and their Strang splitting.

A state is (..., species, n), the batch first. Each species has a diffusion of its own (0: it stays); the
reaction is an ODE at every vertex by itself, solved by SSP Runge-Kutta of order 3 (Shu, Osher 1988). Its
substeps h obey h L <= 1, L such that R_k(u) >= -L u_k for u >= 0: a Euler step then keeps u >= 0, and what a
Euler step keeps SSP schemes keep. Linear invariants (cells that only change their kind) are kept to rounding.

The same `Species` runs on DOLFINx (`solvers.fem.equations.species.on_domain`) and on torch alone
(`on_tensors`, from operators that DOLFINx exported); `rate` is the semi-discrete field of the latter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from solvers.errors import GliodeError
from solvers.evolution import Evolution, PointwiseStep, Step, Strang
from solvers.node.science.implicit import ImplicitDiffusion, Resolvent
from solvers.node.science.linear import Linear
from solvers.ode.integrate import integrate
from solvers.operators import Conductances
from solvers.resolvent import Scheme
from solvers.semidiscrete import SemiDiscrete
from solvers.spaces import Communicator, replicate


class Reaction(Protocol):
    """R(u; parameters), pointwise. `losses`: L above, from the parameters, 1/day."""

    @property
    def species(self) -> tuple[str, ...]:
        """Names, in the order of the state."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the rates (1/day, not negative), in the order of `rates`."""

    def rates(self, u: Tensor, *parameters: Tensor) -> Tensor:
        """R, of the shape of u (..., species, n)."""

    def losses(self, *parameters: float) -> float:
        """L: no species decays faster, for 0 <= u and totals up to 2."""


@dataclass(frozen=True)
class GoOrGrow:
    r"""Cells that divide or migrate, p and i, with n = p + i relative to the carrying capacity:

        p' = growth p (1 - n) - go a(n) p + grow b(n) i,
        i' = invasive_growth i (1 - n) + go a(n) p - grow b(n) i.

    threshold None: a = b = 1, constant rates of switching (with p immobile and invasive_growth 0 the form of
    Gerlee and Nelander 2012). Else a = 1 / (1 + exp(-(n - threshold) / width)), b = 1 - a: cells leave where
    it is crowded and settle where it is not (density-dependent switching: Pham et al. 2012). With p immobile
    and growth > go, perturbations of every wave length grow ahead of the front: give p a small D.
    """

    threshold: float | None = None
    width: float = 0.1

    def __post_init__(self) -> None:
        if self.threshold is not None and not 0 < self.threshold < 1:
            raise GliodeError(f"threshold: {self.threshold} is not in (0, 1); None for constant rates")
        if not self.width > 0:
            raise GliodeError(f"width: {self.width} must be positive")

    @property
    def species(self) -> tuple[str, ...]:
        return "proliferative", "invasive"

    @property
    def parameters(self) -> tuple[str, ...]:
        return "growth", "invasive_growth", "go", "grow"

    def rates(self, u: Tensor, *parameters: Tensor) -> Tensor:
        growth, invasive_growth, go, grow = parameters
        p, i = u.unbind(-2)
        n = p + i
        crowded: Tensor | float = 1.0
        sparse: Tensor | float = 1.0
        if self.threshold is not None:
            crowded = torch.sigmoid((n - self.threshold) / self.width)
            sparse = 1.0 - crowded
        switch = go * crowded * p - grow * sparse * i
        return torch.stack([growth * p * (1 - n) - switch, invasive_growth * i * (1 - n) + switch], -2)

    def losses(self, *parameters: float) -> float:
        growth, invasive_growth, go, grow = parameters
        return max(growth + go, invasive_growth + grow)


@dataclass(frozen=True)
class Necrosis:
    r"""Proliferating cells p, necrotic tissue n and a nutrient c (relative to the blood's):

        p' = growth h(c) p (1 - p - n) - death d(c) p,      h = c / (c + half)
        n' = death d(c) p,                                  d = 1 / (1 + (c / starving)^4)
        c' = supply (1 - c) (1 - n) - uptake h(c) p.

    Growth and uptake follow Michaelis and Menten; below `starving` cells die and their vessels with them.
    """

    half: float = 0.1
    starving: float = 0.2

    def __post_init__(self) -> None:
        if not (self.half > 0 and self.starving > 0):
            raise GliodeError("necrosis: half and starving are levels of the nutrient above 0")

    @property
    def species(self) -> tuple[str, ...]:
        return "proliferating", "necrotic", "nutrient"

    @property
    def parameters(self) -> tuple[str, ...]:
        return "growth", "death", "uptake", "supply"

    def rates(self, u: Tensor, *parameters: Tensor) -> Tensor:
        growth, death, uptake, supply = parameters
        p, n, c = u.unbind(-2)
        fed = c / (c + self.half)
        dying = death * p / (1 + (c / self.starving) ** 4)
        grown = growth * fed * p * (1 - p - n)
        return torch.stack([grown - dying, dying, supply * (1 - c) * (1 - n) - uptake * fed * p], -2)

    def losses(self, *parameters: float) -> float:
        growth, death, uptake, supply = parameters
        return max(growth + death, supply + uptake / self.half)


class Species:
    """Reaction and diffusion of species by Strang splitting (order 2), on the tape in everything.

    diffusion: step(u (..., species, n), dt, w) -> u; conductances: D per cell (..., cells) -> w (..., pairs);
    cells: their number on this rank; comm: where the states are distributed (numbers are replicated then).
    checkpoint: see `Evolution`.
    """

    def __init__(
        self,
        reaction: Reaction,
        diffusion: Step,
        conductances: Callable[[Tensor], Tensor],
        cells: int,
        comm: Communicator | None = None,
        checkpoint: int | None = None,
    ) -> None:
        self.reaction, self.conductances, self.cells, self.comm = reaction, conductances, cells, comm
        self._strang = Strang(PointwiseStep(self.react), diffusion)
        self._evolution = Evolution(self._strang, checkpoint)

    def react(self, u: Tensor, dt: Tensor, *rates: Tensor) -> Tensor:
        """The reaction alone for dt days."""
        fastest = self.reaction.losses(*(float(rate.detach().max()) for rate in rates))
        count = max(1, math.ceil(float(dt) * fastest - 1e-9))
        times = dt * torch.linspace(0, 1, count + 1, dtype=u.dtype, device=u.device)

        def field(t: Tensor, x: Tensor, *rates: Tensor) -> Tensor:
            return self.reaction.rates(x, *rates)

        return integrate(field, u, times, "ssp3", parameters=rates)

    def step(self, u: Tensor, dt: Tensor | float, D: Tensor, **rates: Tensor | float) -> Tensor:
        """u after one step of dt days; D and the rates as for `evolve`. For `Stepped`."""
        w, values = self._prepared(u, D, rates)
        return self._strang(u, dt, w, *values)

    def evolve(
        self, u: Tensor, duration: Tensor | float, steps: int, D: Tensor, **rates: Tensor | float
    ) -> Tensor:
        """u (..., species, n) after `duration` days by `steps` equal steps.

        D: (species,), (..., species, 1) or (..., species, cells), mm^2/day; rates: by name, 1/day, a number
        each, or (batch, 1) for a batch. Raises GliodeError for names that are missing or unknown, negative
        or infinite values, and shapes that do not fit.
        """
        w, values = self._prepared(u, D, rates)
        return self._evolution(u, duration, steps, w, *values)

    def _prepared(
        self, u: Tensor, D: Tensor, rates: dict[str, Tensor | float]
    ) -> tuple[Tensor, list[Tensor]]:
        """The weights of the diffusions and the rates in order, checked."""
        count = len(self.reaction.species)
        if u.ndim < 2 or u.shape[-2] != count:
            names = ", ".join(self.reaction.species)
            raise GliodeError(f"u: shape {tuple(u.shape)}, expected (..., {count}, n) for {names}")
        least = float(u.detach().min()) if u.numel() else 0.0
        if _anywhere(least < -1e-6, self.comm):
            raise GliodeError(f"u: densities are not negative; the least on this rank is {least:.3g}")
        if set(rates) != set(self.reaction.parameters):
            raise GliodeError(f"rates: {sorted(rates)}, expected {sorted(self.reaction.parameters)}")
        found = []
        for name in self.reaction.parameters:
            value = torch.as_tensor(rates[name], dtype=u.dtype, device=u.device)
            _not_negative(name, value, self.comm)
            found.append(replicate(value, self.comm))
        _not_negative("D", D, self.comm)
        D = D[:, None] if D.ndim == 1 else D
        if D.shape[-2:] not in ((count, 1), (count, self.cells)):
            raise GliodeError(f"D: shape {tuple(D.shape)}, expected ({count},) or (..., {count}, cells)")
        everywhere = replicate(D, self.comm) if D.shape[-1] == 1 else D
        return self.conductances(everywhere.expand(*D.shape[:-1], self.cells)), found


def _not_negative(name: str, value: Tensor, comm: Communicator | None) -> None:
    bad = value.detach()[~(torch.isfinite(value) & (value >= 0))]
    if _anywhere(len(bad) > 0, comm):
        raise GliodeError(f"{name}: {bad[:5].tolist() or 'elsewhere'} must be finite, not negative")


def _anywhere(bad: bool, comm: Communicator | None) -> bool:
    """Whether it is so on any rank: all raise, or none."""
    return bool(bad if comm is None else comm.allreduce(int(bad)))


def _each(step: Callable[[Tensor, Tensor], Tensor], u: Tensor, w: Tensor) -> Tensor:
    """step(u, w) of all species of a batch as one batch of states (states, n), with weights for each."""
    w = w.expand(*u.shape[:-1], w.shape[-1]).reshape(-1, w.shape[-1])
    return step(u.reshape(-1, u.shape[-1]), w).view(u.shape)


def on_tensors(
    problem: SemiDiscrete, reaction: Reaction, scheme: Scheme = "sdirk2", checkpoint: int | None = None
) -> Species:
    """The species on operators that DOLFINx exported: CPU or CUDA, batched, states (..., species, n).

    Raises GliodeError for a problem without conductances.
    """
    pairs = _pairs(problem)
    step = ImplicitDiffusion(Resolvent.of(problem), scheme)

    def diffusion(u: Tensor, dt: Tensor | float, w: Tensor) -> Tensor:
        return _each(lambda states, weights: step(states, dt, weights), u, w)

    return Species(reaction, diffusion, pairs, pairs.n_cells, checkpoint=checkpoint)


class SpeciesField:
    """The semi-discrete system without splitting, f(t, u, D=..., **rates), u (..., species, n): for
    `ScienceActivated` and `integrate`.

    D: (species,) or (..., species), mm^2/day, not negative; rates as for `Species`. Explicit schemes need
    steps below the stability limit of the fastest diffusion.
    """

    def __init__(self, problem: SemiDiscrete, reaction: Reaction) -> None:
        pairs = _pairs(problem)
        self.reaction, self._diffusion = reaction, Linear(problem)
        self._unit = pairs(pairs.table.new_ones(pairs.n_cells))

    def __call__(self, t: Tensor, u: Tensor, D: Tensor, **rates: Tensor) -> Tensor:
        def diffusion(states: Tensor, weights: Tensor) -> Tensor:
            return self._diffusion(t, states, conductances=weights)

        spread = _each(diffusion, u, D[..., None] * self._unit)
        return spread + self.reaction.rates(u, *(rates[name] for name in self.reaction.parameters))


def _pairs(problem: SemiDiscrete) -> Conductances:
    if problem.conductances is None or problem.conductances.tensor:
        raise GliodeError("species: the problem has no diffusion by a number per cell; export one")
    return problem.conductances
