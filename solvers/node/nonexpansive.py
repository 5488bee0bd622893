r"""Non-expansive networks: ||F(x) - F(y)|| <= ||x - y|| for all x and y, of the discrete map itself.

The field of a `GradientFlow`, f(x) = -K^T sigma(K x + b) with slopes of sigma in [0, s], obeys

    <f(x) - f(y), x - y> <= -nu ||f(x) - f(y)||^2,    nu = 1 / (s ||K||^2),

and a Runge-Kutta step with circle-contractivity radius r does not expand where h <= 2 nu r (Dahlquist and
Jeltsch 1979), also where every stage has weights, and a nu, of its own: nu is then the least of them. So the
matrices of all stages are held at

    ||K|| <= sqrt(2 r / (s h)),

by an upper bound of ||K||: the power iteration's value is a lower one, and certifies nothing. The proof, and
that of the certified radius, are in docs/theory/nonexpansive.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from solvers.errors import GliodeError
from solvers.node.activations import Activation, activation
from solvers.node.fields import GradientFlow
from solvers.node.models import Node
from solvers.ode.fields import Sampled
from solvers.ode.tableau import Tableau
from solvers.ode.tableaux import TABLEAUX, tableau


def _margin(W: Tensor) -> float:
    """More than the relative rounding error of a singular value."""
    return 4 * max(W.shape[-2:]) * torch.finfo(W.dtype).eps


def spectral_bound(W: Tensor) -> Tensor:
    """||W|| of a matrix or a stack (..., m, n), rounded up by more than the error of its SVD; on the tape."""
    norm: Tensor = torch.linalg.matrix_norm(W, 2)
    return norm * (1 + _margin(W))


def limited(W: Tensor, limit: float) -> Tensor:
    """min(1, limit / ||W||) W for a matrix or a stack, so that its `spectral_bound` is at most the limit."""
    bound = spectral_bound(W) * (1 + 2 * _margin(W))  # what the product below rounds, and a second SVD
    return W * (limit / bound.clamp(min=limit))[..., None, None]


class LimitedFlow(GradientFlow):
    """-K(t)^T sigma(K(t) x + b(t)) with ||K(t)|| <= limit at every stage; the rest as `GradientFlow`.

    Scaled are the sampled rows, not the knots, since a spline overshoots its knots.
    """

    def __init__(
        self,
        dim: int,
        width: int | None,
        sigma: str | Activation,
        kind: str,
        knots: int,
        duration: float,
        limit: float,
    ) -> None:
        super().__init__(dim, width, sigma, kind, knots, duration)
        self.limit = limit

    def sample(self, stages: Tensor) -> Sequence[Sampled]:
        K, b = super().sample(stages)
        return K if math.isinf(self.limit) else Sampled(limited(K.table, self.limit), K.index), b


class NonExpansive(Node):
    """x(0) -> x(duration) of x' = -K(t)^T sigma(K(t) x + b(t)), 1-Lipschitz in L2, in training too.

    dim, width: K is (width, dim), width None for dim; the other arguments are those of the field and `Node`.
    K starts with random numbers (`field.reset`), b with 0. Raises GliodeError for a scheme without circle
    contractivity, and for an activation whose slopes are not in [0, 1].

    The guarantee is that of exact arithmetic: rounding adds some eps ||x|| to a difference, and an implicit
    scheme, which where algebraically stable takes any K, the tolerance of its Newton iteration, as little.
    """

    field: LimitedFlow

    def __init__(
        self,
        dim: int,
        width: int | None = None,
        sigma: str | Activation = "relu",
        kind: str = "linear",
        knots: int = 2,
        duration: float = 1.0,
        steps: int = 10,
        scheme: str | Tableau = "euler",
        gradient: str = "adjoint",
        store: str = "stages",
    ) -> None:
        scheme, sigma = tableau(scheme), activation(sigma)
        radius, (low, high) = scheme.contractivity_radius, sigma.slopes
        if radius == 0:
            able = ", ".join(name for name, known in TABLEAUX.items() if known.contractivity_radius)
            raise GliodeError(
                f"nonexpansive: scheme {scheme.name} has no circle contractivity: some weight b_i <= 0, or "
                f"it is partitioned; take one of {able}"
            )
        if low < 0 or high > 1:
            raise GliodeError(
                f"nonexpansive: the slopes of activation {sigma.name} reach from {low:g} to {high:g}; they "
                "must lie in [0, 1] (tanh, relu, softplus, sigmoid)"
            )
        field = LimitedFlow(dim, width, sigma, kind, knots, duration, math.inf)
        super().__init__(field, duration, steps, scheme, gradient, store)
        if high > 0:
            field.limit = math.sqrt(2 * radius / (high * float(self.times().diff().max())))
        field.reset()

    def times(self) -> Tensor:
        """In float64 whatever the weights are: the limit rests on the steps, which float32 makes unequal."""
        return torch.linspace(0, self.duration, len(self.get_buffer("grid")), dtype=torch.float64)


class Lipschitz1Linear(nn.Linear):
    """W x + b with W / max(1, ||W||) in place of W: 1-Lipschitz, to lift before a flow and to score after it.

    W starts with orthonormal rows or columns: with no more inputs than outputs an isometry.
    """

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, limited(self.weight, 1.0), self.bias)
