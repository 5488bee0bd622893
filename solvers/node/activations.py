"""Activations with their derivatives by hand, and the bounds of their slopes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from solvers.errors import GliodeError


@dataclass(frozen=True)
class Activation:
    """sigma, applied entry by entry.

    value: z -> sigma(z), on the tape; pullback: (p, s) -> p sigma'(z), where s is sigma(z) if `from_value`,
    else z, and p may be spoilt; slopes: (lowest, highest) of sigma', on which guarantees rest; value_: the
    value in place of z, where there is one and the pullback needs no z.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    pullback: Callable[[Tensor, Tensor], Tensor]
    slopes: tuple[float, float]
    from_value: bool = False
    value_: Callable[[Tensor], Tensor] | None = None

    @staticmethod
    def custom(
        name: str,
        value: Callable[[Tensor], Tensor],
        derivative: Callable[[Tensor], Tensor],
        slopes: tuple[float, float],
    ) -> Activation:
        """Any callable with its derivative and the bounds of it. Raises GliodeError where they do not fit.

        Checked at 2001 points of [-10, 10]: the derivative against the tape's, the bounds against both.
        """
        z = torch.linspace(-10, 10, 2001, dtype=torch.float64, requires_grad=True)
        with torch.enable_grad():
            (true,) = torch.autograd.grad(value(z).sum(), z)
        given = derivative(z.detach())
        if given.shape != z.shape or not torch.allclose(given, true, rtol=1e-6, atol=1e-8):
            raise GliodeError(f"activation {name}: the derivative is not that of the value")
        low, high = float(true.min()), float(true.max())
        if not (slopes[0] <= low + 1e-9 and high <= slopes[1] + 1e-9):
            raise GliodeError(
                f"activation {name}: slopes {slopes}, but they reach from {low:g} to {high:g} on [-10, 10]"
            )
        return Activation(name, value, lambda p, z: p * derivative(z), slopes)


_ATEN = torch.ops.aten


def _tanh_pullback(p: Tensor, s: Tensor) -> Tensor:
    out: Tensor = _ATEN.tanh_backward.grad_input(p, s, grad_input=p)
    return out


ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation("tanh", torch.tanh, _tanh_pullback, (0.0, 1.0), True, torch.tanh_),
        Activation(
            "relu", torch.relu, lambda p, s: _ATEN.threshold_backward(p, s, 0), (0.0, 1.0), True, torch.relu_
        ),
        Activation(
            "softplus",
            torch.nn.functional.softplus,
            lambda p, z: _ATEN.softplus_backward(p, z, 1, 20),
            (0.0, 1.0),
        ),
        Activation("sigmoid", torch.sigmoid, _ATEN.sigmoid_backward, (0.0, 0.25), True, torch.sigmoid_),
        Activation("identity", lambda z: z, lambda p, z: p, (1.0, 1.0)),
    )
}


def activation(of: str | Activation) -> Activation:
    """The activation of a name, or the given one."""
    if isinstance(of, Activation):
        return of
    if of not in ACTIVATIONS:
        raise GliodeError(
            f"activation {of!r} is not one of {', '.join(ACTIVATIONS)}; others by Activation.custom"
        )
    return ACTIVATIONS[of]
