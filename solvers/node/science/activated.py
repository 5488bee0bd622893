r"""Science-activated networks: x' = f(t, x; w_1(t), ..., w_p(t)) with f the physics and w its unknowns.

A standalone NODE x' = sigma(W(t) x + b(t)) with the activation sigma replaced by a scientific model: the
semi-discrete right-hand side of a PDE or an ODE. Its unknown coefficients, sources and controls are the
weights, each in a `Space` of its own; what no formula is known for is a small network inside the physics or
added to it. The physics sits in the core and not in the loss, which stays free.

Two forms of one network, trained by the same `Parameters`, problems and optimizers:

    ScienceActivated   a vector field, for `Node` and `integrate` (torch alone)
    Stepped            a time step u -> u(dt) repeated: DOLFINx steps, splittings (serial and MPI)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from solvers.errors import Diverged, GliodeError
from solvers.evolution import recomputed
from solvers.node.weights import DepthWeights
from solvers.ode.fields import Sampled, VectorField
from solvers.ode.tableau import Tableau
from solvers.spaces import Communicator, Space, replicate


class Unknown(nn.Module):
    """An unknown of the physics: a number, a field, and either as a function of depth (time), w(t).

    value: where the search starts, a number or a tensor of the unknown's shape, in its own units, the same at
    all knots. depth, knots, duration: as `DepthWeights`. positive: the search is for log w. space: the inner
    product of one value (None: Euclidean); over the depth it is that of `DepthWeights.space`. trained:
    whether it is searched for at all. Raises GliodeError for a start that is not finite, not positive where
    it must be, or not of the space's shape.
    """

    def __init__(
        self,
        value: float | Tensor,
        depth: str = "constant",
        knots: int = 1,
        duration: float = 1.0,
        positive: bool = False,
        space: Space | None = None,
        trained: bool = True,
    ) -> None:
        super().__init__()
        start = value.detach() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        start = start if start.is_floating_point() else start.double()
        if not bool(torch.isfinite(start).all()):
            raise GliodeError("unknown: its start holds NaN or infinite values; give finite ones")
        if positive and not bool((start > 0).all()):
            raise GliodeError("unknown: positive=True needs a start above 0 in every entry")
        if space is not None:
            space.check(start, "unknown: the start")
        self.positive = positive
        self.weights = DepthWeights(tuple(start.shape), depth, knots, duration, space)
        stored = start.log() if positive else start
        self.weights.values = nn.Parameter(stored.expand(knots, *start.shape).clone(), requires_grad=trained)

    def value(self) -> Tensor:
        """The present values in the unknown's units, (knots, *shape); of depth "constant" (*shape,)."""
        stored = self.weights.values.detach()
        shown = stored.exp() if self.positive else stored.clone()
        return shown[0] if self.weights.kind == "constant" else shown

    def sample(self, stages: Tensor) -> Sampled:
        """At the stage times (steps, s)."""
        found = self.weights.sample(stages)
        return Sampled(found.table.exp(), found.index) if self.positive else found


class _Unknowns(nn.Module):
    """Named unknowns and networks as flat lists of sampled weights, and back to what the physics takes."""

    def __init__(self, unknowns: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name in unknowns:
            if not name.isidentifier() or hasattr(nn.ModuleDict(), name):
                raise GliodeError(f"unknowns: {name!r} cannot name an unknown; choose another identifier")
        try:
            self.all = nn.ModuleDict(unknowns)
        except TypeError as error:
            raise GliodeError(f"unknowns: {error}; give an Unknown(...) or an nn.Module") from error

    def sample(self, stages: Tensor) -> list[Sampled]:
        """All weights; an unknown has one, a network one for each parameter."""
        found: list[Sampled] = []
        for unknown in self.all.values():
            if isinstance(unknown, Unknown):
                found.append(unknown.sample(stages))
            else:
                found += [Sampled.constant(p, stages) for p in unknown.parameters()]
        return found

    def given(self, rows: Sequence[Tensor]) -> dict[str, Any]:
        """What the physics takes: a value for each unknown, a callable for each network."""
        values: dict[str, Any] = {}
        left = iter(rows)
        for name, unknown in self.all.items():
            if isinstance(unknown, Unknown):
                values[name] = next(left)
            else:
                own = {key: next(left) for key, _ in unknown.named_parameters()}
                values[name] = _Called(unknown, own)
        return values

    def replicated(self) -> list[bool]:
        """For each weight, whether every rank holds all of it."""
        found: list[bool] = []
        for unknown in self.all.values():
            if isinstance(unknown, Unknown):
                space = unknown.weights.each
                found.append(space is None or space.comm is None)
            else:
                found += [True for _ in unknown.parameters()]
        return found


class _Called:
    """A network with given parameters."""

    def __init__(self, module: nn.Module, parameters: dict[str, Tensor]) -> None:
        self.module, self.parameters = module, parameters

    def __call__(self, *inputs: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(self.module, self.parameters, inputs)
        return out


class ScienceActivated(VectorField):
    """x' = field(t, x, **unknowns) [+ closure(x)].

    field: the physics, a callable of the time, the states (..., d) and, by name, each unknown: an `Unknown`
    arrives as its value at t, any other nn.Module as a callable (what is not known inside the physics, a
    growth law g(u) say). closure: a network x -> x' added to it. Tensors that are to be found must be among
    the unknowns. A `Node` of it is a layer like any other.

    Raises Diverged, before a run, where an explicit scheme's time step is beyond its stability interval.
    """

    def __init__(
        self,
        field: Callable[..., Tensor],
        unknowns: Mapping[str, nn.Module] | None = None,
        closure: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.physics = field
        self.unknowns = _Unknowns(unknowns or {})
        self.closure = None if closure is None else _Unknowns({"closure": closure})
        self._checked: dict[tuple[str, float], list[Tensor]] = {}

    def sample(self, stages: Tensor) -> Sequence[Sampled]:
        steps, s = stages.shape
        times = Sampled(stages.reshape(-1), [list(range(n * s, n * s + s)) for n in range(steps)])
        added = [] if self.closure is None else self.closure.sample(stages)
        return times, *added, *self.unknowns.sample(stages)

    def rhs(self, x: Tensor, *w: Tensor) -> Tensor:
        t, *rows = w
        if self.closure is None:
            return self.physics(t, x, **self.unknowns.given(rows))
        count = len(list(self.closure.parameters()))
        added: Tensor = self.closure.given(rows[:count])["closure"](x)
        return self.physics(t, x, **self.unknowns.given(rows[count:])) + added

    def check(self, x0: Tensor, times: Tensor, scheme: Tableau) -> None:
        """Raise Diverged where the longest step leaves an explicit scheme's stability interval.

        The fastest rate is that of the Jacobian at the start, by power iteration, once for each scheme and
        step, and again when a weight has changed by a tenth: a bound that a mesh sets (diffusion: 4 d D /
        h^2) is found, one that only the later states set is not.
        """
        longest = float(times.detach().diff().abs().max())
        if not scheme.explicit or scheme.partitioned:
            return
        with torch.no_grad():
            weights = [w.table[w.index[0][0]] for w in self.sample(times.detach()[:1, None])]
        before = self._checked.get((scheme.name, longest))
        if before is not None and all(map(_alike, weights[1:], before[1:])):
            return
        rate, limit = fastest_rate(lambda x: self.rhs(x, *weights), x0.detach()), scheme.real_interval
        if not rate * longest <= 1.02 * limit:
            steps = math.ceil(float((times[-1] - times[0]).detach().abs()) * min(rate, 1e12) / limit)
            raise Diverged(
                f"{scheme.name}: a step of {longest:.3g} is unstable for this field, whose fastest rate is "
                f"{rate:.3g}; the longest stable step is {limit / rate:.3g}: take {steps} steps or more, "
                "a stabilised scheme (solvers.ode.tableaux.chebyshev), or an implicit one"
            )
        self._checked[scheme.name, longest] = [w.detach().clone() for w in weights]


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two weights differ by less than a tenth of the largest entry."""
    return bool(((a - b).abs() <= 0.1 * b.abs().amax()).all()) if a.numel() else True


def fastest_rate(f: Callable[[Tensor], Tensor], x: Tensor, iterations: int = 24) -> float:
    """|lambda|_max of the Jacobian of f at x, estimated by power iteration.

    The geometric mean of the growth in the last half of the iterations: with complex eigenvalues a single
    ratio ||J v|| / ||v|| goes up and down.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x)
    growth: list[float] = []
    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        out = f(leaf)
        if not out.requires_grad:
            return 0.0
        dual = torch.zeros_like(out, requires_grad=True)
        (pulled,) = torch.autograd.grad(out, leaf, dual, create_graph=True, materialize_grads=True)
        for _ in range(iterations if pulled.requires_grad else 0):
            v = v / torch.linalg.vector_norm(v)
            (v,) = torch.autograd.grad(pulled, dual, v, retain_graph=True)
            growth.append(float(torch.linalg.vector_norm(v)))
            if not math.isfinite(growth[-1]) or growth[-1] == 0.0:
                return growth[-1]
    last = growth[len(growth) // 2 :]
    return math.exp(sum(map(math.log, last)) / len(last)) if last else 0.0


class Stepped(nn.Module):
    """u(duration) from u(0) by `steps` equal steps of step(u, dt, **unknowns), u of any shape.

    step: a map on the tape, such as a DOLFINx `ImplicitStep` or a Strang splitting behind a small function;
    the unknowns arrive at the middle of each step. comm: the communicator where u is distributed; unknowns
    that every rank holds are then replicated (`solvers.spaces`). checkpoint: steps to a block whose first
    state alone is kept for the gradient (None: all). Raises GliodeError for less than one step, a duration
    that is not positive; Diverged where the state stops being finite.
    """

    def __init__(
        self,
        step: Callable[..., Tensor],
        unknowns: Mapping[str, nn.Module],
        duration: float,
        steps: int,
        comm: Communicator | None = None,
        checkpoint: int | None = None,
    ) -> None:
        super().__init__()
        if steps < 1 or not (math.isfinite(duration) and duration > 0):
            raise GliodeError(f"stepped: {steps} steps of a duration {duration}; give 1 or more, positive")
        if checkpoint is not None and checkpoint < 1:
            raise GliodeError(f"checkpoint: {checkpoint} steps to a block; give 1 or more, or none")
        self.step, self.duration, self.steps = step, duration, steps
        self.unknowns = _Unknowns(unknowns)
        self.comm, self.checkpoint = comm, checkpoint

    def forward(self, u: Tensor, trajectory: bool = False) -> Tensor:
        """u(duration); trajectory=True: u at all times, (steps + 1, *u.shape)."""
        dt = self.duration / self.steps
        middles = (torch.arange(self.steps, dtype=torch.float64)[:, None] + 0.5) * dt
        sampled = self.unknowns.sample(middles)
        tables = [
            replicate(w.table, self.comm) if everywhere else w.table
            for w, everywhere in zip(sampled, self.unknowns.replicated(), strict=True)
        ]

        size = self.checkpoint or 1
        found = [u[None]]
        for first in range(0, self.steps, size):
            numbers = range(first, min(first + size, self.steps))

            def block(u: Tensor, *tables: Tensor, numbers: range = numbers) -> Tensor:
                states = []
                for n in numbers:
                    rows = [table[w.index[n][0]] for table, w in zip(tables, sampled, strict=True)]
                    u = self.step(u, dt, **self.unknowns.given(rows))
                    if trajectory:
                        states.append(u)
                return torch.stack(states) if trajectory else u

            out = recomputed(block, u, *tables) if self.checkpoint else block(u, *tables)
            u = out[-1] if trajectory else out
            if not self._finite(u):
                raise Diverged(
                    f"stepped: the state is not finite after step {numbers[-1] + 1} of {self.steps}; take "
                    "shorter steps, or an unknown has left the range in which the physics makes sense"
                )
            if trajectory:
                found.append(out)
        return torch.cat(found) if trajectory else u

    def _finite(self, u: Tensor) -> bool:
        """Whether u is finite, on all ranks alike."""
        bad = not bool(torch.isfinite(u.detach()).all())
        return not (bad if self.comm is None else self.comm.allreduce(int(bad)))
