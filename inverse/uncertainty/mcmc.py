r"""Samples of the posterior exp(-Phi(m)) N(m_0, C)(dm), by chains that do not slow down as a mesh is refined.

A reference Gaussian N(m_r, S), the prior or a Laplace posterior, leaves the density exp(-I),

    I(m) = Phi(m) + 1/2 ||m - m_0||^2_{C^-1} - 1/2 ||m - m_r||^2_{S^-1},

with I = Phi for the prior. With rho = sqrt(1 - beta^2) and h = 4 (1 - rho) / (1 + rho) a proposal from m is

    m' = m_r + rho (m - m_r) + beta w,    w ~ N(-sqrt(h)/2 S g, S),

    pcn     g = 0: preconditioned Crank-Nicolson (Cotter, Roberts, Stuart, White 2013), accepted with
            probability min(1, exp(I(m) - I(m')))
    mala    g = I'(m): infinity-MALA, a semi-implicit step of the Langevin equation (Cotter et al. 2013;
            Beskos, Girolami, Lan, Farrell, Stuart 2017); each way then has the density
            exp(-sqrt(h)/2 <g, w> - h/8 <g, S g>)

Both leave N(m_r, S) as it is, so only the departure from it is ever rejected: with the Laplace posterior
(Pinski, Simpson, Stuart, Weber 2015; Rudolf, Sprungk 2018) a nearly Gaussian posterior allows beta near 1,
nearly independent draws. Small beta explore what is far from Gaussian.

beta follows the acceptance during the burn-in (Robbins and Monro 1951; log beta moves by (accepted -
target) k^-0.6 at step k, the mean of all chains), then it is fixed. All random numbers of a step are made
from (seed, chain, step), so a run that goes on from a checkpoint is the run that was never interrupted, bit
by bit.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inverse.problem import InverseProblem
from inverse.uncertainty.chains import Chains, Plan, Progress
from inverse.uncertainty.low_rank import Gaussian
from solvers.errors import GliodeError
from solvers.files import read_arrays, write_arrays

TARGET = {"pcn": 0.3, "mala": 0.574}
"""Acceptance aimed at: near the best of random walks (Roberts, Gelman, Gilks 1997) and of MALA (Roberts,
Rosenthal 1998).
"""

EVERY = 60.0  # seconds between checkpoints


Callback = Callable[[Progress], object]
Keep = Callable[[Tensor], Tensor]


def pcn(
    problem: InverseProblem,
    prior: Gaussian,
    reference: Gaussian | None = None,
    plan: Plan | None = None,
    start: Tensor | None = None,
    keep: Keep | None = None,
    checkpoint: str | Path | None = None,
    callback: Callback | None = None,
) -> Chains:
    """Preconditioned Crank-Nicolson: one forward solve a step.

    problem: its misfit is Phi; its regularizer is not used, the prior says what it is. reference: a Laplace
    posterior (None: the prior). start: of all chains, or (chains, ...) one of each (None: each draws from the
    reference). keep:
    what is kept of a point, such as some entries of a large field (None: all of it). checkpoint: a file,
    written every minute, at the end and when something goes wrong; the same call then goes on from it, also
    with more draws (under MPI one file a rank). A KeyboardInterrupt ends the run with what was drawn. A
    point whose misfit is NaN or infinite has probability zero. Raises GliodeError for a problem with
    bounds, or a checkpoint of another run.
    """
    return _Sampler("pcn", problem, prior, reference, plan, start, keep, checkpoint, callback).run()


def mala(
    problem: InverseProblem,
    prior: Gaussian,
    reference: Gaussian | None = None,
    plan: Plan | None = None,
    start: Tensor | None = None,
    keep: Keep | None = None,
    checkpoint: str | Path | None = None,
    callback: Callback | None = None,
) -> Chains:
    """Infinity-MALA: one forward and one adjoint solve a step; the arguments are those of `pcn`."""
    return _Sampler("mala", problem, prior, reference, plan, start, keep, checkpoint, callback).run()


@dataclass(frozen=True)
class _Point:
    """A point with I; of mala also g = I', a dual, and S g."""

    m: Tensor
    potential: float
    gradient: Tensor | None = None
    drift: Tensor | None = None


@dataclass(frozen=True)
class _State:
    """After `done` steps of all chains: where they are, beta, and the moves made after the burn-in."""

    done: int
    points: list[_Point]
    beta: float
    taken: list[int]


class _Sampler:
    """One run. `state` is replaced as a whole, so whatever interrupts a step leaves the state before it."""

    def __init__(
        self,
        method: str,
        problem: InverseProblem,
        prior: Gaussian,
        reference: Gaussian | None,
        plan: Plan | None,
        start: Tensor | None,
        keep: Keep | None,
        checkpoint: str | Path | None,
        callback: Callback | None,
    ) -> None:
        if problem.bounds is not None:
            raise GliodeError(
                f"{method}: bounds are not handled; sample a logarithm, say, of what is positive"
            )
        if (weight := getattr(prior, "weight", 1.0)) != 1.0:
            raise GliodeError(
                f"{method}: the prior has weight {weight:g}, no posterior; scale its covariance"
            )
        self.method, self.prior, self.reference = method, prior, reference
        self.around = prior if reference is None else reference
        self.space, self.plan, self.keep, self.callback = self.around.space, plan or Plan(), keep, callback
        self.target = self.plan.target or TARGET[method]
        self.misfit = InverseProblem(prior.space, problem.misfit)
        self.misfit.counts = problem.counts
        self._before = dict(problem.counts)
        comm: Any = prior.space.comm
        self.comm = comm if comm is not None and comm.size > 1 else None
        self.path = None if checkpoint is None else Path(checkpoint)
        if self.path is not None and self.comm is not None:
            self.path = self.path.with_name(f"{self.path.stem}.{self.comm.rank}{self.path.suffix}")
        starts: list[Tensor | None] = [None] * self.plan.chains
        if start is not None:
            each = (
                start if start.ndim > len(prior.space.shape) else start.expand(self.plan.chains, *start.shape)
            )
            if len(each) != self.plan.chains:
                raise GliodeError(f"{method}: {len(each)} starts for {self.plan.chains} chains")
            starts = [self.misfit.start(one) for one in each]
        self.samples: list[list[Tensor]] = [[] for _ in range(self.plan.chains)]
        chains = range(self.plan.chains)
        self.state = self._restored() or _State(
            0,
            [self._start(chain, starts[chain]) for chain in chains],
            self.plan.step,
            [0 for _ in chains],
        )

    def run(self) -> Chains:
        """Sample until there are as many draws as planned."""
        total, written = self.plan.burn_in + self.plan.draws, time.monotonic()
        stopped = "draws"
        try:
            while self.state.done < total:
                self._advance()
                if self.callback is not None:
                    self.callback(self._progress(total))
                if self._elapsed(written) > EVERY:
                    self._write()
                    written = time.monotonic()
        except KeyboardInterrupt:
            if self.state.done <= self.plan.burn_in:  # nothing drawn yet
                raise
            stopped = "interrupted"
        finally:
            self._write()
        samples = self._drawn()
        return Chains(
            samples=samples[:, : self.plan.draws],
            beta=self.state.beta,
            acceptance=torch.tensor(self.state.taken, dtype=torch.float64) / samples.shape[1],
            stopped_by=stopped,
            counts={name: n - self._before[name] for name, n in self.misfit.counts.items()},
        )

    def _advance(self) -> None:
        """One step of every chain."""
        done, burning = self.state.done + 1, self.state.done < self.plan.burn_in
        points, taken, beta = list(self.state.points), list(self.state.taken), self.state.beta
        accepted = 0.0
        for chain, here in enumerate(points):
            generator = self._generator(chain, done)
            threshold = float(torch.rand((), dtype=torch.float64, generator=generator))  # alike on all ranks
            there, ratio = self._propose(here, beta, generator)
            probability = math.exp(min(ratio, 0.0))
            if threshold < probability:
                points[chain] = there
            accepted += probability / len(points)
            taken[chain] += threshold < probability and not burning
        if burning:
            beta = min(beta * math.exp((accepted - self.target) * done**-0.6), 1.0)
        else:
            for samples, point in zip(self.samples, points, strict=True):
                samples.append((point.m if self.keep is None else self.keep(point.m)).detach().clone())
        self.state = _State(done, points, beta, taken)

    def _propose(self, here: _Point, beta: float, generator: torch.Generator) -> tuple[_Point, float]:
        """A proposal and the logarithm of its acceptance ratio."""
        centre = self.around.mean
        rho = math.sqrt(1 - beta**2)
        half = math.sqrt((1 - rho) / (1 + rho))  # sqrt(h) / 2
        w = self.around.sample(generator) - centre
        if here.drift is not None:
            w = w - half * here.drift
        there = self._point(centre + rho * (here.m - centre) + beta * w)
        ratio = here.potential - there.potential
        if not math.isfinite(there.potential):
            return there, -math.inf
        if self.method == "mala":
            back = (here.m - centre - rho * (there.m - centre)) / beta
            ratio += self._density(there, back, half) - self._density(here, w, half)
        return there, ratio

    def _density(self, at: _Point, w: Tensor, half: float) -> float:
        """log of the density of N(-half S g, S) relative to N(0, S) at w."""
        assert at.gradient is not None and at.drift is not None
        return -half * self.space.pair(at.gradient, w) - 0.5 * half**2 * self.space.pair(
            at.gradient, at.drift
        )

    def _point(self, m: Tensor) -> _Point:
        """I at m, and its gradient for mala."""
        if self.method == "pcn":
            return _Point(m, self.misfit.value(m) + self._departure(m)[0])
        here = self.misfit.evaluate(m)
        departure, slope = self._departure(m)
        if not math.isfinite(here.value):
            return _Point(m, here.value)
        gradient = here.gradient() + slope
        return _Point(m, here.value + departure, gradient, self.space.riesz(gradient).detach())

    def _departure(self, m: Tensor) -> tuple[float, Tensor]:
        """1/2 ||m - m_0||^2_{C^-1} - 1/2 ||m - m_r||^2_{S^-1} and its derivative."""
        if self.reference is None:
            return 0.0, torch.zeros_like(m)
        a, b = m - self.prior.mean, m - self.reference.mean
        first, second = self.prior.space.gram(a).detach(), self.space.gram(b).detach()
        return 0.5 * (self.prior.space.pair(first, a) - self.space.pair(second, b)), first - second

    def _start(self, chain: int, start: Tensor | None) -> _Point:
        found = self._point(self.around.sample(self._generator(chain, 0)) if start is None else start)
        if not math.isfinite(found.potential):
            raise GliodeError(
                f"{self.method}: the misfit is {found.potential} where chain {chain} starts; give a start"
            )
        return found

    def _generator(self, chain: int, step: int) -> torch.Generator:
        seed = np.random.SeedSequence((self.plan.seed, chain, step)).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(seed >> np.uint64(1)))

    def _elapsed(self, since: float) -> float:
        seconds = time.monotonic() - since
        return seconds if self.comm is None else float(self.comm.allreduce(seconds)) / self.comm.size

    def _progress(self, total: int) -> Progress:
        drawn = max(self.state.done - self.plan.burn_in, 1)
        return Progress(
            self.state.done, total, sum(self.state.taken) / drawn / self.plan.chains, self.state.beta
        )

    def _drawn(self) -> Tensor:
        """(chains, draws, ...), without draws of a step that did not end."""
        drawn = max(self.state.done - self.plan.burn_in, 0)
        if drawn == 0:
            return torch.zeros(self.plan.chains, 0, dtype=torch.float64)
        return torch.stack([torch.stack(chain[:drawn]) for chain in self.samples])

    def _key(self) -> str:
        plan = asdict(self.plan) | {"target": self.target}
        del plan["draws"]
        ranks = 1 if self.comm is None else self.comm.size
        return json.dumps({"method": self.method, "ranks": ranks, "size": self.prior.space.size, **plan})

    def _write(self) -> None:
        if self.path is None:
            return
        state = self.state
        arrays = {
            "done": np.array(state.done),
            "beta": np.array(state.beta),
            "taken": np.array(state.taken),
            "m": torch.stack([p.m for p in state.points]).numpy(),
            "potential": np.array([p.potential for p in state.points]),
            "samples": self._drawn().numpy(),
        }
        for name in ("gradient", "drift"):
            values = [value for p in state.points if (value := getattr(p, name)) is not None]
            if values:
                arrays[name] = torch.stack(values).numpy()
        write_arrays(self.path, self._key(), arrays)

    def _restored(self) -> _State | None:
        """The checkpoint's state, after a look whether it is this posterior's; fills `samples`."""
        saved = None if self.path is None else read_arrays(self.path, self._key())
        done = -1 if saved is None else int(saved["done"])
        if self.comm is not None and self.comm.allreduce(done) != done * self.comm.size:
            raise GliodeError(
                f"{self.path}: not of the same step on all ranks; delete these files and start anew"
            )
        if saved is None:
            if self.path is not None and self.path.exists():
                raise GliodeError(
                    f"{self.path}: belongs to another plan, method or size; name another file, or delete it"
                )
            return None
        tensors = {name: torch.from_numpy(array) for name, array in saved.items()}
        potential = [float(p) for p in saved["potential"]]
        again = self._point(tensors["m"][0]).potential
        if not abs(again - potential[0]) <= 1e-6 * (1 + abs(again)):
            raise GliodeError(
                f"{self.path}: made with other data, prior or reference (potential {potential[0]:g}, "
                f"now {again:g}); name another file, or delete it"
            )
        like = tensors["m"][0] if self.keep is None else self.keep(tensors["m"][0])
        if tensors["samples"].shape[1] and tensors["samples"].shape[2:] != like.shape:
            raise GliodeError(f"{self.path}: made with another `keep`; name another file, or delete it")
        nothing = [None] * self.plan.chains
        points = map(
            _Point, tensors["m"], potential, tensors.get("gradient", nothing), tensors.get("drift", nothing)
        )
        self.samples = [list(chain) for chain in tensors["samples"]]
        return _State(done, list(points), float(saved["beta"]), saved["taken"].tolist())
