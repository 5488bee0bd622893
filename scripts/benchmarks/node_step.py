r"""A training step of three NODEs: time and memory against autograd and torchdiffeq, paired in one run.

float32, batch 512, 20 Runge-Kutta steps of order 4 on [0, 1], forward and backward for all weights:

    1   x' = W2 tanh(W1 x + b1) + b2,    d = 2, width 16
    2   the same, d = 64, width 64
    3   x' = tanh(W(t) x + b(t)),        d = 64, linear between 21 knots

CPU: one thread, processor time. CUDA: synchronised wall time. Every round runs every kind once, in turning
order; ratios are medians over the rounds of the ratio within a round. glibc is told to keep freed memory:
when it returns memory depends on what ran before, and the page faults that follow cost up to a third of a
step.

The rivals are what a careful user would write. torchdiffeq is asked for the final state only (its "rk4" is
the 3/8 rule: as many stages, and gradients that differ by the error of the method). In problem 3 it and the
plain loop take W and b at the stage times from tables made once a step (interpolating the unbound knots takes
as long; indexing the knots in the right-hand side would pay a zeroed copy of all of them each time), and its
adjoint goes from knot to knot, with the two knots next to it as its parameters: with all 21 the augmented
state is larger than the batch. Nothing is compiled.

Memory: the peak of the running sum of what is allocated and freed during a step, by torch.profiler (CPU) or
the caching allocator (CUDA); weights, input and time grid were there before.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile
from torchdiffeq import odeint, odeint_adjoint

from scripts.benchmarks import Check
from solvers.node.fields import Standalone, TwoLayer
from solvers.ode.fields import VectorField
from solvers.ode.integrate import integrate

STEPS, BATCH = 20, 512
KNOTS = STEPS + 1
H = 1 / STEPS
RULE = {"method": "rk4", "options": {"step_size": H}}

Kind = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Bars:
    """The largest share of torchdiffeq's time, direct and adjoint."""

    direct: float
    adjoint: float


def loop(f: Callable[[float, Tensor], Tensor], x: Tensor) -> Tensor:
    """The classical scheme as one would write it, on the tape."""
    for n in range(STEPS):
        t = n * H
        k1 = f(t, x)
        k2 = f(t + H / 2, torch.add(x, k1, alpha=H / 2))
        k3 = f(t + H / 2, torch.add(x, k2, alpha=H / 2))
        k4 = f(t + H, torch.add(x, k3, alpha=H))
        x = torch.add(x, k1 + 2 * (k2 + k3) + k4, alpha=H / 6)
    return x


class Problem(ABC):
    """A field, a batch, and the step that all kinds make: the gradient of mean |x(1)|^2 / 2."""

    def __init__(self, field: VectorField, x0: Tensor) -> None:
        self.field, self.x0 = field, x0
        self.parameters = tuple(field.parameters())
        self.times = torch.linspace(0, 1, STEPS + 1, dtype=x0.dtype, device=x0.device)
        self.ends = self.times[[0, -1]]

    def gradient(self, x: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(0.5 * x.square().sum() / len(x), parameters)
        return tuple(g.view(p.shape) for g, p in zip(found, self.parameters, strict=True))

    def ours(self, store: str = "stages") -> tuple[Tensor, ...]:
        x = integrate(self.field, self.x0, self.times, "kutta4", store=store)
        return self.gradient(x, self.parameters)

    @abstractmethod
    def plain(self) -> tuple[Tensor, ...]:
        """By `loop` and autograd."""

    @abstractmethod
    def direct(self) -> tuple[Tensor, ...]:
        """By torchdiffeq's odeint and autograd."""

    @abstractmethod
    def adjoint(self) -> tuple[Tensor, ...]:
        """By torchdiffeq's odeint_adjoint."""

    def kinds(self) -> dict[str, Kind]:
        return {
            "ours": self.ours,
            "ours, states only": lambda: self.ours("states"),
            "plain autograd": self.plain,
            "torchdiffeq, direct": self.direct,
            "torchdiffeq, adjoint": self.adjoint,
        }


class Perceptron(nn.Module):
    """W2 tanh(W1 x + b1) + b2."""

    def __init__(self, weights: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.W1, self.b1, self.W2, self.b2 = (nn.Parameter(w.detach()[0].clone()) for w in weights)

    def forward(self, t: Tensor | float, x: Tensor) -> Tensor:
        return linear(torch.tanh(linear(x, self.W1, self.b1)), self.W2, self.b2)


class TwoLayerProblem(Problem):
    """Problems 1 and 2."""

    def __init__(self, field: TwoLayer, x0: Tensor) -> None:
        super().__init__(field, x0)
        self.rival = Perceptron(self.parameters)
        self.own = tuple(self.rival.parameters())

    def plain(self) -> tuple[Tensor, ...]:
        return self.gradient(loop(self.rival, self.x0), self.own)

    def direct(self) -> tuple[Tensor, ...]:
        return self.gradient(odeint(self.rival, self.x0, self.ends, **RULE)[-1], self.own)

    def adjoint(self) -> tuple[Tensor, ...]:
        return self.gradient(odeint_adjoint(self.rival, self.x0, self.ends, **RULE)[-1], self.own)


class Table:
    """tanh(W(t) x + b(t)) with W and b at all stages made at once, and taken in the order of the calls."""

    def __init__(self, nodes: tuple[float, ...], like: Tensor) -> None:
        share = torch.tensor(nodes, dtype=torch.float64)[:, None]
        unit = torch.eye(KNOTS, dtype=torch.float64)
        stages = [(1 - share) * unit[n] + share * unit[n + 1] for n in range(STEPS)]
        different, order = torch.cat(stages).unique(dim=0, return_inverse=True)
        self.basis, self.order = different.to(like), order.tolist()

    def make(self, W: Tensor, b: Tensor) -> Callable[[Tensor | float, Tensor], Tensor]:
        Ws = (self.basis @ W.flatten(1)).view(-1, *W.shape[1:]).unbind(0)
        bs = (self.basis @ b).unbind(0)
        rows = iter(self.order)

        def f(t: Tensor | float, x: Tensor) -> Tensor:
            row = next(rows)
            return torch.tanh(linear(x, Ws[row], bs[row]))

        return f


class Between(nn.Module):
    """tanh(W(t) x + b(t)) from knot n to the next."""

    def __init__(self, n: int, *knots: Tensor) -> None:
        super().__init__()
        self.n, self.knots = n, knots

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        W0, W1, b0, b1 = self.knots
        share = t.detach() * STEPS - self.n
        return torch.tanh(linear(x, torch.lerp(W0, W1, share), torch.lerp(b0, b1, share)))


class StandaloneProblem(Problem):
    """Problem 3."""

    def __init__(self, field: Standalone, x0: Tensor) -> None:
        super().__init__(field, x0)
        self.classical = Table((0, 1 / 2, 1 / 2, 1), x0)
        self.three_eighths = Table((0, 1 / 3, 2 / 3, 1), x0)

    def plain(self) -> tuple[Tensor, ...]:
        return self.gradient(loop(self.classical.make(*self.parameters), self.x0), self.parameters)

    def direct(self) -> tuple[Tensor, ...]:
        f = self.three_eighths.make(*self.parameters)
        return self.gradient(odeint(f, self.x0, self.ends, **RULE)[-1], self.parameters)

    def adjoint(self) -> tuple[Tensor, ...]:
        W, b = (values.unbind(0) for values in self.parameters)
        x = self.x0
        for n in range(STEPS):
            near = (W[n], W[n + 1], b[n], b[n + 1])
            step = self.times[n : n + 2]
            x = odeint_adjoint(Between(n, *near), x, step, method="rk4", adjoint_params=near)[-1]
        return self.gradient(x, self.parameters)


def problems(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, tuple[Problem, Bars]]:
    """The three, with the same random weights and batch on every device and in every precision."""
    random = torch.Generator().manual_seed(0)

    def batch(dim: int) -> Tensor:
        return torch.randn(BATCH, dim, generator=random, dtype=torch.float64).to(device, dtype)

    def started(field: TwoLayer | Standalone) -> None:
        field.reset(rough=0.1, generator=random)
        for name in field.names:
            values = field.weights(name).values
            if name.startswith("b"):  # zero at the start, which would hide a mistake
                values.data.normal_(0, 0.1, generator=random)
        field.to(device, dtype)

    two = {"1 (d=2, width 16)": TwoLayer(2, 16), "2 (d=64, width 64)": TwoLayer(64, 64)}
    deep = Standalone(64, knots=KNOTS)
    fields: list[TwoLayer | Standalone] = [*two.values(), deep]
    for field in fields:
        started(field)
    found: dict[str, tuple[Problem, Bars]] = {
        name: (TwoLayerProblem(mlp, batch(mlp.weights("W1").values.shape[-1])), bars)
        for (name, mlp), bars in zip(two.items(), (Bars(0.62, 0.35), Bars(0.78, 0.5)), strict=True)
    }
    found["3 (d=64, W(t), 21 knots)"] = (StandaloneProblem(deep, batch(64)), Bars(0.62, 0.35))
    return found


def distance(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """The largest relative difference of a weight's gradient."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.cpu() - b.cpu()).norm() / b.norm()) for a, b in pairs)


def clock(device: torch.device) -> float:
    """Seconds: of the processor, or of the wall once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def times(kinds: dict[str, Kind], device: torch.device, rounds: int) -> dict[str, list[float]]:
    """Seconds of every kind in every round, after three rounds to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    names = list(kinds)
    for turn in range(-3, rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            start = clock(device)
            kinds[name]()
            spent = clock(device) - start
            if turn >= 0:
                seconds[name].append(spent)
    return seconds


def keep_freed_memory() -> None:
    """Let malloc serve every size from memory that it keeps, where it is glibc's."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(parameter, 2**30)


def peak(kind: Kind, device: torch.device) -> float:
    """The most that one step holds at a time, in MiB."""
    kind()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kind()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kind()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(file))
        trace = json.loads(file.read_text())["traceEvents"]
    changes = [e for e in trace if e["name"] == "[memory]"]
    held = most = 0
    for event in sorted(changes, key=lambda e: float(e["ts"])):
        held += event["args"]["Bytes"]
        most = max(most, held)
    return most / 2**20


def compared(name: str, problem: Problem, bars: Bars, device: torch.device, rounds: int) -> list[Check]:
    """Times, their ratios, memory, and whether the rivals compute the same."""
    kinds, on_cpu = problem.kinds(), device.type == "cpu"
    ours, *others = problem.ours(), problem.direct(), problem.adjoint()
    seconds = times(kinds, device, rounds)

    def ratio(of: str, to: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[of], seconds[to], strict=True))

    checks = [Check(f"{name}: {kind}", 1e3 * statistics.median(s), "ms") for kind, s in seconds.items()]
    for rival, bar in (("direct", bars.direct), ("adjoint", bars.adjoint)):
        what = f"{name}: ours / torchdiffeq, {rival}"
        value = ratio("ours", f"torchdiffeq, {rival}")
        checks.append(Check.at_most(what, value, bar) if on_cpu else Check(what, value))
    checks.append(Check(f"{name}: ours / plain autograd", ratio("ours", "plain autograd")))
    for rival, found in zip(("direct", "adjoint"), others, strict=True):
        what = f"{name}: torchdiffeq's gradient, {rival}, relative to ours"
        checks.append(Check.at_most(what, distance(found, ours), 1e-3))
    memory = {kind: peak(kinds[kind], device) for kind in list(kinds)[:4]}
    checks += [Check(f"{name}: peak memory, {kind}", value, "MiB") for kind, value in memory.items()]
    share = memory["ours"] / memory["plain autograd"]
    return [*checks, Check.at_most(f"{name}: peak memory, ours / plain autograd", share, 1.0)]


def run(full: bool, device: str = "cpu") -> list[Check]:
    """All checks; `--full` with four times the rounds. The bars on times are the CPU's."""
    torch.set_num_threads(1)
    keep_freed_memory()
    place = torch.device(device)
    checks = []
    for name, (problem, _) in problems(place, torch.float64).items():
        error = max(distance(problem.ours(store), problem.plain()) for store in ("stages", "states"))
        checks.append(Check.at_most(f"{name}: gradient relative to autograd's, float64", error, 1e-12))
    for name, (problem, bars) in problems(place).items():
        checks += compared(name, problem, bars, place, 160 if full else 40)
        if place.type == "cuda":
            reference = problems(torch.device("cpu"))[name][0]
            error = distance(problem.ours(), reference.ours())
            checks.append(Check.at_most(f"{name}: gradient on CUDA relative to the CPU's", error, 1e-5))
    return checks
