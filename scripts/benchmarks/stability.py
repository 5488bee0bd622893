r"""Stability of reconstructions: how far they move when the data do, at most, under attack, and by noise.

Tomography of 64 x 64 pixels. m(y) is the minimiser of 1/2 ||(A m - y) / sd||^2 + R(m), a fixed point, or what
a network makes of y. Of each, in the Euclidean norms of images and data,

    gain     max ||m'(y) e|| / ||e||, the largest singular value of m' = H^-1 A^T / sd^2, H the Hessian at
             m(y) (inverse.sensitivity, by implicit differentiation; of a network by its own derivatives)
    attack   the largest ||m(y + e) - m(y)|| / ||truth|| that was found for ||e|| = sd sqrt(data)
    noise    the same for random e, the mean

What is provable is held to it, in the derivative and under the finite attack. With z the change of m for e,
mu the modulus of strong (below 0: weak) convexity of R, s the least singular value of A, optimality says

    ||A z||^2 + sd^2 mu ||z||^2 <= <A z, e>,   so   ||A z|| <= c ||e||,   ||z|| <= c / s ||e||

with c = 1 for mu >= 0 and 1 / (1 + mu sd^2 / s^2) where that is positive, and for mu > 0 also
||z|| <= ||e|| / (2 sd sqrt(mu)). A fixed point of m -> D(m - tau A^T (A m - y)) with ||D'|| <= 1 moves by
||A|| / s^2 at most, and a continuous unrolling by ||B|| + lambda ||A|| T, B its naive inversion.

All are tuned for PSNR on validation pictures by one search; the weights are those of data/regularizers.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh, gmres, minres
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from inverse.datasets.images import ellipses, photograph, square
from inverse.image_problems import TEST_SEED, ImageProblem, image_problem, restored
from inverse.optimizers import newton_cg, plug_and_play
from inverse.regularizers.learned import files
from inverse.regularizers.learned.energy import Energy, Learned
from inverse.regularizers.tikhonov import Tikhonov
from inverse.regularizers.total_variation import ImageGradient, TotalVariation
from inverse.sensitivity import Linearisation, singular_values
from inverse.stopping import GradientTolerance, MaxIterations, StepTolerance
from scripts.benchmarks import Check
from scripts.benchmarks._image_contest import learned as contestants
from scripts.benchmarks._images import Parameters, psnr, tuned
from solvers.spaces import Euclidean

PROBLEM, SIZE, NOISE_SEED = "tomography", 64, 91
TUNE_ON, TUNE_SEED = ("flower", "ihc"), 92
EXACT, SOLVE, VALUES, NUDGE = 1e-10, 1e-9, 1e-2, 1e-4
"""Relative tolerances: of minimisers, linear solves, singular values; the step of differences, in noises."""
AGREE, ROUNDING = 1e-3, 1e-4
ASCENTS, DRAWS = 3, 2


Linear = Callable[[Tensor], Tensor]


class _Implicit(Function):
    """y -> m(y), with the products that a `Reconstruction` has for its derivative."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, of: Reconstruction) -> Tensor:
        ctx.of, ctx.y = of, y.detach().clone()
        return of.solved(ctx.y).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.of.transposed(ctx.y, grads[0]), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return ctx.of.tangent(ctx.y, tangents[0])


@dataclass
class Reconstruction:
    """m(y), flat, on the tape; the last few are kept. exact: to the tolerance that derivatives need."""

    problem: ImageProblem
    kept: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __call__(self, y: Tensor) -> Tensor:
        m: Tensor = _Implicit.apply(y, self)
        return m

    def solved(self, y: Tensor) -> Tensor:
        """m(y), from the nearest that is known."""
        for known, m in self.kept:
            if torch.equal(known, y):
                return m
        near = min(self.kept, key=lambda pair: float((pair[0] - y).norm()), default=None)
        m = self.solve(y, None if near is None else near[1])
        self.kept = [*self.kept[-4:], (y, m)]
        return m

    def solve(self, y: Tensor, start: Tensor | None) -> Tensor:
        raise NotImplementedError

    def tangent(self, y: Tensor, e: Tensor) -> Tensor:
        raise NotImplementedError

    def transposed(self, y: Tensor, w: Tensor) -> Tensor:
        raise NotImplementedError

    def bound(self) -> tuple[float, float]:
        """Of ||A z|| / ||e|| and ||z|| / ||e||; inf where nothing is proved."""
        return math.inf, math.inf


def _operator(n: int, product: Callable[[Tensor], Tensor]) -> LinearOperator:
    return LinearOperator(
        (n, n), lambda v: product(torch.from_numpy(np.asarray(v, dtype=float).ravel())).numpy(), dtype=float
    )


@dataclass
class Minimiser(Reconstruction):
    """modulus: of strong convexity of R, negative for weak; None where nothing is known."""

    penalty: Any = None
    modulus: float | None = None

    def solve(self, y: Tensor, start: Tensor | None) -> Tensor:
        inverse = self.problem.least_squares(y, self.penalty)
        zero = inverse.evaluate(inverse.space.zeros()).gradient()
        m = restored(self.problem, y, self.penalty, start, tolerance=1e-4, iterations=400).m
        rules = (GradientTolerance(0.0, EXACT * inverse.space.dual_norm(zero)), MaxIterations(30))
        return newton_cg.minimise(inverse, m, hessian="full", stopping=rules).m

    def _by_hessian(self, y: Tensor, right: Tensor) -> Tensor:
        m = self.solved(y)
        A, sd = self.problem.A, self.problem.sd

        def product(d: Tensor) -> Tensor:
            return A.adjoint(A(d)).reshape(-1) / sd**2 + self.penalty.hessian_action(m, d)

        x, _ = minres(_operator(len(m), product), right.numpy(), rtol=SOLVE, maxiter=2000)
        return torch.from_numpy(x)

    def tangent(self, y: Tensor, e: Tensor) -> Tensor:
        return self._by_hessian(y, self.problem.A.adjoint(e).reshape(-1) / self.problem.sd**2)

    def transposed(self, y: Tensor, w: Tensor) -> Tensor:
        return self.problem.A(self._by_hessian(y, w)).reshape(y.shape) / self.problem.sd**2

    def bound(self) -> tuple[float, float]:
        if self.modulus is None:
            return math.inf, math.inf
        sd, s = self.problem.sd, least_singular_value()
        share = 1 + min(self.modulus, 0.0) * (sd / s) ** 2
        if share <= 0:
            return math.inf, math.inf
        direct = 1 / (2 * sd * math.sqrt(self.modulus)) if self.modulus > 0 else math.inf
        return 1 / share, min(1 / (share * s), direct)


@dataclass
class PlugAndPlay(Reconstruction):
    """The fixed point of T(m, y) = D(m - tau A^T (A m - y)), tau = 1 / ||A||^2."""

    denoiser: Any = None
    last: tuple[Tensor, tuple[Linear, Linear, Linear, Linear]] | None = None

    def _map(self, m: Tensor, y: Tensor) -> Tensor:
        A = self.problem.A
        moved = m - A.adjoint(A(m) - y).reshape(-1) / (1.01 * self.problem.norm**2)
        return self.denoiser(moved.reshape(1, *A.shape)).reshape(-1)  # type: ignore[no-any-return]

    def near(self, y: Tensor, start: Tensor | None) -> Tensor:
        """By the iteration, to 1e-4."""
        m = self.problem.naive(y).reshape(-1) if start is None else start
        tau = self.problem.sd**2 / (1.01 * self.problem.norm**2)
        rules = (StepTolerance(1e-4), MaxIterations(150))
        inverse, shape = self.problem.least_squares(y), self.problem.A.shape
        return plug_and_play.minimise(inverse, m, self.denoiser, shape, tau=tau, stopping=rules).m

    def solve(self, y: Tensor, start: Tensor | None) -> Tensor:
        """On by Newton's method for m - T(m, y) = 0."""
        m = self.near(y, start)
        for _ in range(10):
            with torch.no_grad():
                rest = m - self._map(m, y)
            if float(rest.norm()) <= 1e-10 * float(m.norm()):
                break
            m = m - self._solved(self._slopes(m, y)[0], rest)
        return m

    def _step(self, d: Tensor) -> Tensor:
        """A^T A d / (1.01 ||A||^2)."""
        A = self.problem.A
        return A.adjoint(A(d)).reshape(-1) / (1.01 * self.problem.norm**2)

    def _slopes(self, m: Tensor, y: Tensor) -> tuple[Linear, Linear, Linear, Linear]:
        """I - T' and its transpose, D' and its transpose: forward mode does not nest, so both by the tape."""
        A = self.problem.A
        moved = m - A.adjoint(A(m) - y).reshape(-1) / (1.01 * self.problem.norm**2)
        with torch.enable_grad():
            leaf = moved.detach().requires_grad_()
            out = self.denoiser(leaf.reshape(1, *A.shape)).reshape(-1)
            w = torch.zeros_like(leaf).requires_grad_()
            (back,) = torch.autograd.grad(out, leaf, w, create_graph=True)

        def along(d: Tensor) -> Tensor:
            return torch.autograd.grad(back, w, d, retain_graph=True)[0]

        def against(d: Tensor) -> Tensor:
            return torch.autograd.grad(out, leaf, d, retain_graph=True)[0]

        def straight(d: Tensor) -> Tensor:
            return d - along(d - self._step(d))

        def turned(d: Tensor) -> Tensor:
            back = against(d)
            return d - (back - self._step(back))

        return straight, turned, along, against

    def tangent(self, y: Tensor, e: Tensor) -> Tensor:
        straight, _, along, _ = self._at(y)
        moved = self.problem.A.adjoint(e).reshape(-1) / (1.01 * self.problem.norm**2)
        return self._solved(straight, along(moved))

    def transposed(self, y: Tensor, w: Tensor) -> Tensor:
        _, turned, _, against = self._at(y)
        back = against(self._solved(turned, w))
        return self.problem.A(back).reshape(y.shape) / (1.01 * self.problem.norm**2)

    def _at(self, y: Tensor) -> tuple[Linear, Linear, Linear, Linear]:
        if self.last is None or not torch.equal(self.last[0], y):
            self.last = y, self._slopes(self.solved(y), y)
        return self.last[1]

    def _solved(self, product: Linear, right: Tensor) -> Tensor:
        x, _ = gmres(_operator(len(right), product), right.numpy(), rtol=1e-4, restart=60, maxiter=2)
        return torch.from_numpy(x)

    def bound(self) -> tuple[float, float]:
        move = self.problem.norm / least_singular_value() ** 2
        return math.inf, 1.01 * move


@dataclass
class Network(Reconstruction):
    """A module from data to images."""

    module: Any = None

    def __call__(self, y: Tensor) -> Tensor:
        m: Tensor = self.module(y[None])[0].reshape(-1)
        return m

    def bound(self) -> tuple[float, float]:
        if not hasattr(self.module, "amplification"):
            return math.inf, math.inf
        zero = torch.zeros(self.problem.A.data_shape, dtype=torch.float64)
        naive = singular_values(lambda y: self.problem.naive(y[None])[0], zero, tol=VALUES).values[0]
        return math.inf, float(naive) * (1 + VALUES) + self.module.amplification()


@cache
def least_singular_value() -> float:
    """s of the problem's A: 1 / s^2 is the largest eigenvalue of (A^T A)^-1, by Cholesky and Lanczos."""
    A = image_problem(PROBLEM, SIZE).A
    unit = torch.eye(SIZE**2, dtype=torch.float64).reshape(-1, SIZE, SIZE)
    L = torch.linalg.cholesky(A.adjoint(A(unit)).reshape(SIZE**2, -1))

    def inverse(v: Tensor) -> Tensor:
        return torch.cholesky_solve(v[:, None], L)[:, 0]

    largest = eigsh(_operator(SIZE**2, inverse), 1, tol=1e-8, return_eigenvectors=False)
    return float(largest[0]) ** -0.5


# ---- The methods ------------------------------------------------------------------------------------------

Make = Callable[[ImageProblem, Parameters], Reconstruction]


@dataclass(frozen=True)
class Method:
    """make: of its parameters; start: of their search."""

    name: str
    make: Make
    start: Parameters


def _tikhonov(problem: ImageProblem, parameters: Parameters) -> Reconstruction:
    weight = parameters["weight"]
    return Minimiser(problem, penalty=Tikhonov(Euclidean(SIZE**2), weight), modulus=weight)


def _tv(problem: ImageProblem, parameters: Parameters) -> Reconstruction:
    penalty = TotalVariation(ImageGradient(problem.A.shape), parameters["weight"], smoothing=0.02)
    return Minimiser(problem, penalty=_Twice(penalty), modulus=0.0)


class _Twice:
    """A penalty on the tape, with its second derivative from there."""

    def __init__(self, penalty: Callable[[Tensor], Tensor]) -> None:
        self.penalty = penalty

    def __call__(self, m: Tensor) -> Tensor:
        return self.penalty(m)

    def hessian_action(self, m: Tensor, d: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = m.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.penalty(leaf), leaf, create_graph=True)
            (action,) = torch.autograd.grad(slope, leaf, d)
        return action


def _learned(energy: Energy, scale: float) -> Make:
    def make(problem: ImageProblem, parameters: Parameters) -> Reconstruction:
        weight = parameters["weight"]
        penalty = Learned(energy, Euclidean(SIZE**2), problem.A.shape, weight, scale)
        modulus = -penalty.guarantee().modulus
        if modulus == 0:  # the sums of squares in it are strongly convex
            modulus = weight * float(getattr(energy, "squares", 0.0))
        return Minimiser(problem, penalty=penalty, modulus=modulus if math.isfinite(modulus) else None)

    return make


def methods() -> dict[str, Method]:
    """By name: classical ones, and all of data/regularizers that are for this problem."""
    found = [
        Method("Tikhonov", _tikhonov, {"weight": 100.0}),
        Method("smoothed TV", _tv, {"weight": 30.0}),
    ]
    for method in contestants(PROBLEM):
        stem = method.name.split("(")[-1].rstrip(")")
        module, card = files.load(files.shipped(stem))
        start = {name: value for name, value in method.start.items() if name != "scale"}
        found.append(Method(method.name, _make(module, card.scale), start))
    return {method.name: method for method in found}


def _make(module: nn.Module, scale: float) -> Make:
    if isinstance(module, Energy):
        return _learned(module, scale)
    if hasattr(module, "averaged"):
        return lambda problem, of: PlugAndPlay(problem, denoiser=module.at(of["level"]))  # type: ignore[operator]
    return lambda problem, of: Network(problem, module=module.double().on(problem))  # type: ignore[operator]


# ---- What is measured -------------------------------------------------------------------------------------


def pictures() -> dict[str, Tensor]:
    """Two that nothing was trained or tuned on."""
    return {"camera": square(photograph("camera"), SIZE), "ellipses": ellipses(1, SIZE, TEST_SEED)[0]}


@dataclass
class Found:
    """Of one method, a number for each picture."""

    name: str
    parameters: Parameters
    gain: list[float] = field(default_factory=list)
    seen: list[float] = field(default_factory=list)
    differ: list[float] = field(default_factory=list)
    attack: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)
    clean: list[float] = field(default_factory=list)
    attacked: list[float] = field(default_factory=list)
    excess: list[float] = field(default_factory=list)
    bounds: tuple[float, float] = (math.inf, math.inf)
    seconds: float = 0.0


def measured(name: str) -> Found:
    """One method: tuned, then looked at on every picture."""
    torch.set_num_threads(1)
    begin = time.perf_counter()
    problem, method = image_problem(PROBLEM, SIZE), methods()[name]
    found = Found(name, best(problem, method))
    for number, truth in enumerate(pictures().values()):
        of = method.make(problem, found.parameters)
        found.bounds = of.bound()
        look(found, of, problem.measured(truth[None], NOISE_SEED + number)[0], truth)
    found.seconds = time.perf_counter() - begin
    return found


def best(problem: ImageProblem, method: Method) -> Parameters:
    """Of the largest PSNR on the validation pictures."""
    truths = torch.stack([square(photograph(name), SIZE) for name in TUNE_ON])
    data = problem.measured(truths, TUNE_SEED)

    def score(parameters: Parameters) -> float:
        total = 0.0
        for y, truth in zip(data, truths, strict=True):
            of = method.make(problem, parameters)
            if isinstance(of, Minimiser):
                m = restored(problem, y, of.penalty, tolerance=1e-3, iterations=100).m
            elif isinstance(of, PlugAndPlay):
                m = of.near(y, None)
            else:
                with torch.no_grad():
                    m = of(y)
            total += psnr(m.reshape(truth.shape), truth) / len(truths)
        return total

    return tuned(score, method.start, 8).parameters


def look(found: Found, of: Reconstruction, y: Tensor, truth: Tensor) -> None:
    """Put the numbers of one picture into `found`."""
    problem, radius = of.problem, of.problem.sd * math.sqrt(y.numel())
    with torch.no_grad():
        m = of(y)
    triplet = singular_values(of, y, tol=VALUES)
    value, e, moved = float(triplet.values[0]), triplet.inputs[0], triplet.outputs[0]
    h = NUDGE * radius
    with torch.no_grad():
        difference = (of(y + h * e) - of(y - h * e)) / (2 * h)
    found.gain.append(value)
    found.differ.append(float((difference - value * moved).norm()) / value)

    step, largest, worst = radius * e, 0.0, m
    ratios = [float(problem.A(moved).norm()) * value]
    for _ in range(ASCENTS):
        line = Linearisation(of, y + step)
        away = line.value - m
        ratios.append(float(problem.A(away).norm()) / radius)
        if float(away.norm()) > largest:
            largest, worst = float(away.norm()), line.value
        slope = line.adjoint(away)
        step = radius * slope / slope.norm()
    found.attack.append(largest / float(truth.norm()))
    found.excess.append(max(value, largest / radius))
    drawn = []
    for seed in range(DRAWS):
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            away = of(y + radius * noise / noise.norm()) - m
        drawn.append(float(away.norm() / truth.norm()))
        ratios.append(float(problem.A(away).norm()) / radius)
    found.noise.append(sum(drawn) / DRAWS)
    found.seen.append(max(ratios))
    found.clean.append(psnr(m.reshape(truth.shape), truth))
    found.attacked.append(psnr(worst.reshape(truth.shape), truth))


def run(full: bool) -> list[Check]:
    """All methods, two at a time."""
    from rich.progress import track

    os.environ["OMP_NUM_THREADS"] = "1"
    names = list(methods())
    with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1)) as pool:
        found = list(track(pool.imap(measured, names), PROBLEM, total=len(names)))
    return [check for of in found for check in checks(of)]


def checks(of: Found) -> list[Check]:
    """The rows of a method."""
    tuned_to = ", ".join(f"{name} {value:.3g}" for name, value in of.parameters.items())
    words = (
        f"gain {_all(of.gain)}; attack {_all(of.attack, 100)} %, noise {_all(of.noise, 100)} %; PSNR "
        f"{_all(of.clean)} dB, attacked {_all(of.attacked)} dB; {tuned_to}; {of.seconds:.0f} s"
    )
    rows = [
        Check(of.name, words),
        Check.at_most(f"{of.name}: derivative against differences", max(of.differ), AGREE),
    ]
    shown, moved = of.bounds
    if math.isfinite(shown):
        rows.append(Check.at_most(f"{of.name}: ||A z|| / ||e||, proved", max(of.seen), shown + ROUNDING))
    if math.isfinite(moved):
        rows.append(Check.at_most(f"{of.name}: ||z|| / ||e||, proved", max(of.excess), moved))
    return rows


def _all(values: list[float], times: float = 1.0) -> str:
    return " / ".join(f"{times * value:.3g}" for value in values)
