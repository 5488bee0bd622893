r"""Bilevel training: the weights that make the solutions of the regularized problems come near the truths.

    min_theta sum_i loss(m_i(theta), truth_i),    m_i(theta) = argmin_m misfit_i(m) + R_theta(m)

`Bilevel` is the model theta -> m: inputs (batch, ...) go in, minimisers come out;
`inverse.training.train` does the rest. At a minimiser J'(m, theta) = 0, and by the implicit function theorem

    dm/dtheta = -H^-1 d/dtheta R'_theta(m),    H = J''(m),

so that for the cotangent v of m the hypergradient is -(d/dtheta R'_theta(m))^T w,

    minres         H w = v by MINRES, preconditioned by the Riesz map (H need not be positive definite)
    jacobian_free  w = t g, g = riesz(v), t = <v, g> / <H g, g>: one descent step of the lower problem is
                   differentiated, its start is not (Fung, Heaton, Li, McKenzie, Osher and Yin 2022): one
                   product instead of a solve, good where the lower problem is well conditioned

(Ehrhardt and Roberts 2021 for the error that inexact solves leave.) Weights enter by the regularizer alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from scipy.sparse.linalg import LinearOperator, minres
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from inverse.optimizers import conjugate_gradients
from inverse.optimizers.iteration import Result
from inverse.problem import InverseProblem
from inverse.regularizers.learned.energy import Energy
from inverse.stopping import GradientTolerance, MaxIterations
from solvers.errors import GliodeError

Term = Callable[[Tensor], Tensor]
Make = Callable[[Tensor, Term], InverseProblem]
Solve = Callable[[InverseProblem, Tensor], Result]
Minimise = Callable[..., Result]


def lower_solver(
    tolerance: float = 1e-4, iterations: int = 200, minimise: Minimise = conjugate_gradients.minimise
) -> Solve:
    """An optimizer as lower solver, to a gradient `tolerance` times that at the start."""
    rules = (GradientTolerance(tolerance), MaxIterations(iterations))
    return lambda problem, start: minimise(problem, start, stopping=rules)


class Bilevel(nn.Module):
    """inputs (batch, ...) -> minimisers, on the tape for the energy's weights and the strength.

    make(inputs, R): the lower problem with R as its regularizer, whose point is flat, all fields of the batch
    behind one another; start(inputs): its start; `fields`: the shape of one minimiser (a batch of them is
    returned, and shown to the energy). R = strength sum_i energy(m_i); the strength is trained too, unless
    `fixed`: a weakly convex energy may be held where its guarantee makes the problem convex. margin: pixels
    at each edge of a field that are not returned, since filters see them from one side only. solve: the lower
    solver; rtol, most: of MINRES.
    """

    def __init__(
        self,
        energy: Energy,
        make: Make,
        start: Callable[[Tensor], Tensor],
        fields: tuple[int, ...],
        strength: float = 1.0,
        hypergradient: Literal["minres", "jacobian_free"] = "minres",
        fixed: bool = False,
        margin: int = 0,
        solve: Solve | None = None,
        rtol: float = 1e-3,
        most: int = 50,
    ) -> None:
        super().__init__()
        if hypergradient not in ("minres", "jacobian_free"):
            raise GliodeError(f"bilevel: hypergradient {hypergradient!r} is neither minres nor jacobian_free")
        if not strength > 0:
            raise GliodeError(f"bilevel: the strength must be positive, got {strength}")
        own = next(energy.parameters())
        self.energy, self.make, self.start, self.fields = energy, make, start, tuple(fields)
        if margin and not 0 < 2 * margin < min(fields):
            raise GliodeError(f"bilevel: a margin of {margin} leaves nothing of fields {tuple(fields)}")
        self.log_strength = nn.Parameter(torch.tensor(strength, dtype=own.dtype).log(), not fixed)
        self.margin = margin
        self.hypergradient, self.rtol, self.most = hypergradient, rtol, most
        self.solve = lower_solver() if solve is None else solve
        self.found: Result | None = None

    def regularizer(self, m: Tensor) -> Tensor:
        """R(m) of a flat point, on the tape for m and the weights."""
        value: Tensor = self.log_strength.exp() * self.energy(m.reshape(-1, *self.fields)).sum()
        return value

    def forward(self, inputs: Tensor) -> Tensor:
        strength = self.log_strength.detach().exp()
        weights = {name: t.detach() for name, t in self.energy.named_parameters()}

        def frozen(m: Tensor) -> Tensor:
            value: Tensor = (
                strength * functional_call(self.energy, weights, (m.reshape(-1, *self.fields),)).sum()
            )
            return value

        problem = self.make(inputs, frozen)
        with torch.no_grad():
            self.found = self.solve(problem, self.start(inputs))
        m = self.found.m
        if torch.is_grad_enabled():
            leaf = m.detach().requires_grad_()
            (dual,) = torch.autograd.grad(self.regularizer(leaf), leaf, create_graph=True)
            m = _Implicit.apply(dual, m, lambda v: self._solved(problem, m, v))
        return inner(m.reshape(-1, *self.fields), self.margin)

    def _solved(self, problem: InverseProblem, m: Tensor, v: Tensor) -> Tensor:
        """w of H w = v, or what stands for it."""
        space, here = problem.space, problem.evaluate(m)
        if self.hypergradient == "jacobian_free":
            g = space.riesz(v)
            curvature = space.pair(here.hessian_action(g), g)
            return g * (space.pair(v, g) / curvature) if curvature > 0 else g

        def operator(of: Term) -> LinearOperator:
            def product(x: Any) -> Any:
                return of(torch.from_numpy(x).to(v).reshape(v.shape)).double().numpy().ravel()

            return LinearOperator((v.numel(), v.numel()), product, dtype=float)

        H, M = operator(here.hessian_action), operator(space.riesz)
        w, _ = minres(H, v.double().numpy().ravel(), M=M, rtol=self.rtol, maxiter=self.most)
        return torch.from_numpy(w).to(v).reshape(v.shape)


def inner(fields: Tensor, margin: int) -> Tensor:
    """The fields (batch, *shape) without `margin` entries at each edge."""
    cut = slice(margin, -margin if margin else None)
    return fields[(slice(None), *[cut] * (fields.ndim - 1))]


class _Implicit(Function):
    """m as a function of the dual R'_theta(m): dm = -H^-1 d(dual)."""

    @staticmethod
    def forward(ctx: Any, dual: Tensor, m: Tensor, solved: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.solved = solved
        return m.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return -ctx.solved(grads[0]), None, None
