r"""Inverse problems: an objective on a Space, its derivatives from the tape, and what they cost.

    InverseProblem   J(m) = misfit(m) + R(m)
    LeastSquares     J(m) = 1/2 ||r(m)||^2 + R(m),    r(m) = C^(-1/2) (F(m) - y) / sd
    Composite        J(m) = loss(F(m)) + R(m)

Gradients and Hessian actions are duals (see solvers.spaces). `counts` holds the solves made so far: a value
is one "forward"; a gradient one more "adjoint"; a dual-number pass one "forward" and one "tangent"; a Hessian
action by reverse over reverse one "tangent" and one "adjoint" on top of the forward and adjoint it
differentiates. Work that a checkpointed Function repeats inside its own backward is not seen here.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from inverse.roots import increasing_root
from inverse.uncertainty import ModelError
from solvers.errors import Diverged, GliodeError
from solvers.spaces import Communicator, Space, reduce

Bound = float | Tensor | None

_ONCE = once_differentiable(lambda ctx, *grads: None).__code__


class InverseProblem:
    """J(m) = misfit(m) + regularizer(m) on a space.

    misfit, regularizer: callables from a point to a 0-d tensor, on the tape (under MPI the same on every
    rank). bounds: (lower, upper), each a number, a tensor of the point's shape, or None.
    """

    def __init__(
        self,
        space: Space,
        misfit: Callable[[Tensor], Tensor],
        regularizer: Callable[[Tensor], Tensor] | None = None,
        bounds: tuple[Bound, Bound] | None = None,
    ) -> None:
        self.space = space
        self.misfit = misfit
        self.regularizer = regularizer
        self.bounds = None if bounds is None else _box(space, bounds)
        self.counts = {"forward": 0, "adjoint": 0, "tangent": 0}

    def evaluate(self, m: Tensor) -> Evaluation:
        """J at m, with its graph kept for derivatives as long as the Evaluation lives."""
        return Evaluation(self, m)

    def value(self, m: Tensor) -> float:
        """J(m); infinite where a solver has no answer."""
        self.counts["forward"] += 1
        try:
            with torch.no_grad():
                value = self.misfit(m.detach())
                return float(value if self.regularizer is None else value + self.regularizer(m.detach()))
        except Diverged:
            return math.inf

    def value_and_gradient(self, m: Tensor) -> tuple[float, Tensor]:
        """J(m) and the dual J'(m)."""
        here = self.evaluate(m)
        return here.value, here.gradient()

    def hessian_action(self, m: Tensor, d: Tensor) -> Tensor:
        """The dual J''(m) d, exact, by reverse over reverse."""
        return self.evaluate(m).hessian_action(d)

    def curvature(self, m: Tensor, d: Tensor) -> float:
        """<J''(m) d, d>, which sets the step along d."""
        return self.space.pair(self.hessian_action(m, d), d)

    def step(self, m: Tensor, d: Tensor, slope: float) -> float | None:
        """The step along d, of slope <J'(m), d> < 0: -slope / curvature; None unless that is positive."""
        curvature = self.curvature(m, d)
        return -slope / curvature if math.isfinite(curvature) and curvature > 0 else None

    def regularizer_action(self, m: Tensor, d: Tensor) -> Tensor:
        """The dual R''(m) d (zero without a regularizer); no solve."""
        if self.regularizer is None:
            return torch.zeros_like(m)
        leaf = m.detach().clone().requires_grad_()
        with torch.enable_grad():
            gradient = _differentiable_gradient(self.regularizer(leaf), leaf, "the regularizer")
        return _vector_jacobian(gradient, leaf, d)

    def start(self, m: Tensor) -> Tensor:
        """A copy of the start m, checked: shape, finite, within the bounds."""
        self.space.check(m, "start")
        if not bool(torch.isfinite(m).all()):
            raise GliodeError("start: it holds NaN or infinite values; give finite ones")
        if self.bounds is not None:
            out = (m < self.bounds[0]) | (m > self.bounds[1])
            if bool(out.any()):
                worst = out.reshape(-1).nonzero().reshape(-1).tolist()
                raise GliodeError(f"start: entries {worst[:10]} lie outside the bounds; move them inside")
        return m.detach().clone()

    def project(self, m: Tensor) -> Tensor:
        """The point of the box nearest to m, entry by entry."""
        return m if self.bounds is None else torch.minimum(torch.maximum(m, self.bounds[0]), self.bounds[1])

    def free(self, m: Tensor, dual: Tensor) -> Tensor:
        """The gradient without the entries that only push against an active bound."""
        if self.bounds is None:
            return dual
        held = ((m <= self.bounds[0]) & (dual > 0)) | ((m >= self.bounds[1]) & (dual < 0))
        return torch.where(held, torch.zeros_like(dual), dual)


class Evaluation:
    """J at one point; derivatives on request, from one graph that lives as long as this object.

    Where a solver has no answer (`solvers.errors.Diverged`) the value is infinite, which every search
    rejects, and asking for a derivative raises the solver's error.
    """

    def __init__(self, problem: InverseProblem, m: Tensor) -> None:
        self.problem = problem
        self.leaf = m.detach().clone().requires_grad_()
        self.m = self.leaf.detach()
        problem.counts["forward"] += 1
        self._gradient: Tensor | None = None
        self._differentiable: Tensor | None = None
        self._error: Diverged | None = None
        try:
            self._build()
        except Diverged as error:
            self.misfit = self.value = math.inf
            self._error = error

    def _build(self) -> None:
        with torch.enable_grad():
            misfit = self._misfit()
            if misfit.numel() != 1:
                raise GliodeError(f"misfit: returned shape {tuple(misfit.shape)}; it must return one number")
            self._root = misfit.reshape(())
            if self.problem.regularizer is not None:
                self._root = self._root + self.problem.regularizer(self.leaf)
        self.misfit = float(misfit.detach())
        self.value = float(self._root.detach())

    def _misfit(self) -> Tensor:
        return self.problem.misfit(self.leaf)

    def gradient(self) -> Tensor:
        """The dual J'(m)."""
        if self._error is not None:
            raise self._error
        if self._gradient is None:
            self.problem.counts["adjoint"] += 1
            self._gradient = _vector_jacobian(self._root, self.leaf, torch.ones_like(self._root))
        return self._gradient

    def hessian_action(self, d: Tensor) -> Tensor:
        """The dual J''(m) d by reverse over reverse; the gradient's graph serves all directions."""
        if self._error is not None:
            raise self._error
        counts = self.problem.counts
        if self._differentiable is None:
            counts["adjoint"] += 1
            self._differentiable = _differentiable_gradient(self._root, self.leaf, "the objective")
            self._gradient = self._differentiable.detach()
        counts["tangent"] += 1
        counts["adjoint"] += 1
        return _vector_jacobian(self._differentiable, self.leaf, d)


class Mapped(InverseProblem):
    """A problem of a forward map, whose linearisation along a direction is one tangent solve."""

    @abstractmethod
    def on_tape(self, m: Tensor) -> Tensor:
        """What J compares or judges, on the tape and not counted."""

    def linearised(self, m: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        """`on_tape` at m and its derivative along d, the sensitivity problem: one pass of dual numbers."""
        self.counts["forward"] += 1
        self.counts["tangent"] += 1
        try:
            with torch.no_grad(), forward_ad.dual_level():
                dual = self.on_tape(forward_ad.make_dual(m.detach(), d.detach()))
                primal, tangent = forward_ad.unpack_dual(dual)
        except NotImplementedError as error:
            raise GliodeError(
                f"forward: no tangent, an operation lacks forward mode (write its jvp): {error}"
            ) from error
        return primal.clone(), torch.zeros_like(primal) if tangent is None else tangent.clone()

    def jvp(self, m: Tensor, d: Tensor) -> Tensor:
        """The derivative along d alone; of LeastSquares J d = r'(m) d, (N,)."""
        return self.linearised(m, d)[1]


class LeastSquares(Mapped):
    """J(m) = 1/2 ||r(m)||^2 + R(m), r(m) = C^(-1/2) (F(m) - y) / sd, flattened to (N,).

    forward: point -> tensor of the shape of `data`, on the tape; noise: sd > 0 of the data, a number or one
    for each. model_error: E (N, k) in units of sd, what the model itself gets wrong: C = I + E E^T (without
    it, C = I). comm: where the data are distributed; each rank then holds its part of data, noise and E, the
    products are reduced, and the forward map uses replicated parameters through `solvers.spaces.replicate`.
    """

    def __init__(
        self,
        space: Space,
        forward: Callable[[Tensor], Tensor],
        data: Tensor,
        noise: float | Tensor,
        regularizer: Callable[[Tensor], Tensor] | None = None,
        bounds: tuple[Bound, Bound] | None = None,
        model_error: Tensor | None = None,
        comm: Communicator | None = None,
    ) -> None:
        super().__init__(space, self._half_square, regularizer, bounds)
        self.forward = forward
        self.data = data.detach()
        self.noise = torch.as_tensor(noise, dtype=data.dtype, device=data.device).detach()
        self.comm = comm
        if not bool(torch.isfinite(self.data).all()):
            raise GliodeError("data: they hold NaN or infinite values; leave those measurements out")
        if not bool((torch.isfinite(self.noise) & (self.noise > 0)).all()):
            raise GliodeError(
                "noise: the standard deviation must be positive and finite; give the data's noise level"
            )
        if self.noise.ndim and self.noise.shape != self.data.shape:
            raise GliodeError(
                f"noise: shape {tuple(self.noise.shape)}, the data have {tuple(self.data.shape)}"
            )
        if model_error is not None and model_error.shape[:1] != (self.data.numel(),):
            raise GliodeError(
                f"model_error: {tuple(model_error.shape)}, needs {self.data.numel()} rows, one a datum"
            )
        self.model_error = None if model_error is None else ModelError(model_error, comm)

    @property
    def data_size(self) -> int:
        """Number N of data on all ranks: pure noise has ||r|| near sqrt(N)."""
        return self.data.numel() if self.comm is None else int(self.comm.allreduce(self.data.numel()))

    def evaluate(self, m: Tensor) -> ResidualEvaluation:
        """J and r at m, with the graph kept for derivatives as long as the Evaluation lives."""
        return ResidualEvaluation(self, m)

    def on_tape(self, m: Tensor) -> Tensor:
        """r(m), (N,), on the tape and not counted."""
        out = self.forward(m)
        if out.shape != self.data.shape:
            raise GliodeError(
                f"forward: returned shape {tuple(out.shape)}, the data have {tuple(self.data.shape)}"
            )
        r = ((out - self.data) / self.noise).reshape(-1)
        return r if self.model_error is None else self.model_error.whiten(r)

    def _half_square(self, m: Tensor) -> Tensor:
        return 0.5 * reduce(self.on_tape(m).square().sum(), self.comm)

    def residual(self, m: Tensor) -> Tensor:
        """r(m), (N,)."""
        self.counts["forward"] += 1
        with torch.no_grad():
            return self.on_tape(m.detach())

    def vjp(self, m: Tensor, w: Tensor) -> Tensor:
        """The dual J^T w of w (N,)."""
        return self.evaluate(m).vjp(w)

    def jacobian(self, m: Tensor) -> Tensor:
        """J, (N, size), by one pass of dual numbers for each parameter."""
        units = torch.eye(m.numel(), dtype=m.dtype, device=m.device)
        return torch.stack([self.jvp(m, unit.view(m.shape)) for unit in units], 1)

    def data_product(self, a: Tensor, b: Tensor) -> Tensor:
        """a^T b over the data of all ranks; a, b: (N,) or (N, columns)."""
        return reduce(a.mT @ b if a.ndim == 2 else a @ b, self.comm)

    def curvature(self, m: Tensor, d: Tensor) -> float:
        """||J d||^2 + <R'' d, d>, the Gauss-Newton curvature: one tangent solve (the sensitivity problem)."""
        xi = self.jvp(m, d)
        return float(self.data_product(xi, xi)) + self.space.pair(self.regularizer_action(m, d), d)


class Composite(Mapped):
    """J(m) = loss(F(m)) + R(m), such as the cross-entropy of a network's scores F(m).

    forward: point -> tensor, on the tape; loss: from that tensor to a 0-d one, twice differentiable (under
    MPI the same on every rank).
    """

    def __init__(
        self,
        space: Space,
        forward: Callable[[Tensor], Tensor],
        loss: Callable[[Tensor], Tensor],
        regularizer: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(space, lambda m: loss(forward(m)), regularizer)
        self.forward, self.loss = forward, loss

    def on_tape(self, m: Tensor) -> Tensor:
        """F(m), on the tape and not counted."""
        return self.forward(m)

    def curvature(self, m: Tensor, d: Tensor) -> float:
        """<loss'' F' d, F' d> + <R'' d, d>, the Gauss-Newton curvature: one tangent solve."""
        return self._along(m, d)(0.0)[1]

    def step(self, m: Tensor, d: Tensor, slope: float) -> float | None:
        """A root of phi', phi(eta) = loss(F(m) + eta F'(m) d) + R(m + eta d); None unless phi''(0) > 0.

        One tangent solve; Newton's method then needs the loss only, and for a quadratic one a single step.
        """
        return increasing_root(self._along(m, d), slope, math.sqrt(torch.finfo(m.dtype).eps))

    def _along(self, m: Tensor, d: Tensor) -> Callable[[float], tuple[float, float]]:
        """eta -> phi'(eta), phi''(eta)."""
        at, xi = self.linearised(m, d)

        def derivatives(eta: float) -> tuple[float, float]:
            leaf = torch.tensor(eta, dtype=m.dtype, device=m.device, requires_grad=True)
            with torch.enable_grad():
                phi = self.loss(at + leaf * xi)
                if self.regularizer is not None:
                    phi = phi + self.regularizer(m.detach() + leaf * d.detach())
                first = _differentiable_gradient(phi, leaf, "the loss")
                (second,) = torch.autograd.grad(first, leaf)
            return float(first.detach()), float(second)

        return derivatives


class ResidualEvaluation(Evaluation):
    """A LeastSquares problem at one point: the residual and its products too."""

    problem: LeastSquares

    def _misfit(self) -> Tensor:
        self._residual = self.problem.on_tape(self.leaf)
        self.residual = self._residual.detach()
        return 0.5 * reduce(self._residual.square().sum(), self.problem.comm)

    def vjp(self, w: Tensor) -> Tensor:
        """The dual J^T w."""
        self.problem.counts["adjoint"] += 1
        return _vector_jacobian(self._residual, self.leaf, w)

    def gauss_newton_action(self, d: Tensor) -> Tensor:
        """The dual (J^T J + R'') d."""
        return self.vjp(self.problem.jvp(self.m, d)) + self.problem.regularizer_action(self.m, d)


def _vector_jacobian(out: Tensor, leaf: Tensor, w: Tensor) -> Tensor:
    """(d out / d leaf)^T w; the graph stays."""
    if not out.requires_grad:
        raise GliodeError(
            "misfit: its result does not depend on m through the tape; keep it in torch (or a Function)"
        )
    (gradient,) = torch.autograd.grad(out, leaf, w.detach(), retain_graph=True, allow_unused=True)
    if gradient is None:
        raise GliodeError(
            "misfit: m does not enter its result; keep it in torch (or in an autograd.Function)"
        )
    return gradient.detach()


def _differentiable_gradient(value: Tensor, leaf: Tensor, what: str) -> Tensor:
    """The gradient with its own graph, or an error where a second derivative would be wrong.

    torch itself does not raise: `autograd.grad` visits only nodes that lead to its inputs, and what is
    `once_differentiable` leads nowhere, so its part would be missing in silence. Hence both graphs are
    searched.
    """
    way_out = (
        "give it a backward made of tape operations, or use a method without second derivatives "
        "(a LeastSquares problem, step='wolfe', quasi_newton)"
    )
    for node in _nodes(value):
        backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
        if getattr(backward, "__code__", None) is _ONCE:
            raise GliodeError(f"Hessian: {node.name()} in {what} is once_differentiable: {way_out}")
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    if not gradient.requires_grad:
        raise GliodeError(
            f"Hessian: the gradient of {what} is constant, or left the tape in a backward: {way_out}"
        )
    if any(node.name() == "torch::autograd::Error" for node in _nodes(gradient)):
        raise GliodeError(f"Hessian: a Function inside {what} is once_differentiable: {way_out}")
    return gradient


def _nodes(out: Tensor) -> set[torch.autograd.graph.Node]:
    stack = [out.grad_fn]
    seen: set[torch.autograd.graph.Node] = set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [following for following, _ in node.next_functions]
    return seen


def _box(space: Space, bounds: tuple[Bound, Bound]) -> tuple[Tensor, Tensor]:
    sides = []
    for name, side, default in zip(("lower", "upper"), bounds, (-math.inf, math.inf), strict=True):
        t = torch.as_tensor(default if side is None else side, dtype=torch.float64).detach()
        if t.ndim and tuple(t.shape) != space.shape:
            raise GliodeError(f"bounds: the {name} one has shape {tuple(t.shape)}, the space {space.shape}")
        if bool(torch.isnan(t).any()):
            raise GliodeError(f"bounds: the {name} one holds NaN; use None for no bound")
        sides.append(t.expand(space.shape).clone())
    if not bool((sides[0] < sides[1]).all()):
        raise GliodeError("bounds: each lower bound must be below its upper bound")
    return sides[0], sides[1]
