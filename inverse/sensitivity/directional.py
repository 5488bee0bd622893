r"""The derivative of a map F at a point m, through products alone.

    tangent    xi = F'(m) d      one pass of dual numbers: the sensitivity problem
    adjoint    F'(m)^T w         one sweep of the tape: the adjoint problem, a dual (see solvers.spaces)

F goes from a tensor of any shape to a tensor of any shape, on the tape; each autograd.Function in it
needs a jvp for the first and a backward for the second.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from solvers.errors import GliodeError
from solvers.spaces import Space

Map = Callable[[Tensor], Tensor]


class Linearisation:
    """F at m: `value` = F(m), and products with F'(m) from one graph that lives as long as this object."""

    def __init__(self, F: Map, m: Tensor) -> None:
        self.F, self.m = F, checked(m, "m")
        self._leaf = self.m.clone().requires_grad_()
        with torch.enable_grad():
            self._out = output(F(self._leaf))
        self.value = self._out.detach()

    def tangent(self, d: Tensor) -> Tensor:
        """F'(m) d, of the shape of F(m)."""
        return directional(self.F, self.m, d)[1]

    def adjoint(self, w: Tensor) -> Tensor:
        """The dual F'(m)^T w, of the shape of m."""
        same_shape(w, self.value, "w", "F(m)")
        gradient: Tensor | None = None
        if self._out.requires_grad:
            cotangent = w.detach().to(self._out)
            (gradient,) = torch.autograd.grad(
                self._out, self._leaf, cotangent, retain_graph=True, allow_unused=True
            )
        if gradient is None:
            raise GliodeError(
                "F: its result does not depend on m through the tape; keep it in torch (or in an "
                "autograd.Function)"
            )
        return gradient.detach()


def directional(F: Map, m: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """F(m) and the sensitivity F'(m) d along d, by one pass of dual numbers.

    Raises GliodeError where d has not the shape of m, or something in F has no forward mode.
    """
    m = checked(m, "m")
    same_shape(d, m, "d", "m")
    try:
        with torch.no_grad(), forward_ad.dual_level():
            dual = output(F(forward_ad.make_dual(m, d.detach().to(m))))
            value, tangent = forward_ad.unpack_dual(dual)
            return value.clone(), torch.zeros_like(value) if tangent is None else tangent.clone()
    except NotImplementedError as error:
        raise GliodeError(
            f"F: no tangent, an operation lacks forward mode (write its jvp): {error}"
        ) from error


def adjoint(F: Map, m: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """F(m) and the dual F'(m)^T w, by one sweep of the tape."""
    line = Linearisation(F, m)
    return line.value, line.adjoint(w)


def checked(m: Tensor, what: str) -> Tensor:
    """m off the tape. Raises GliodeError unless it is a tensor of finite real numbers."""
    if not isinstance(m, Tensor) or not m.is_floating_point():
        kind = m.dtype if isinstance(m, Tensor) else type(m).__name__
        raise GliodeError(f"{what}: a derivative needs a tensor of floating-point numbers, not {kind}")
    if not bool(torch.isfinite(m).all()):
        raise GliodeError(f"{what}: it holds NaN or infinite values; give finite ones")
    return m.detach()


def output(out: Tensor) -> Tensor:
    """What F returned. Raises GliodeError unless it is one tensor of real numbers."""
    if not isinstance(out, Tensor) or not out.is_floating_point():
        kind = out.dtype if isinstance(out, Tensor) else type(out).__name__
        raise GliodeError(f"F: returned {kind}; it must return one tensor of floating-point numbers")
    return out


def serial(space: Space, point: Tensor, what: str) -> Space:
    """The space, checked to be one of `point` on this rank alone."""
    space.check(point, what)
    if space.comm is not None and int(space.comm.allreduce(1)) > 1:
        raise GliodeError(f"{what}: its space is distributed over ranks; run this on one rank")
    return space


def same_shape(a: Tensor, b: Tensor, what: str, other: str) -> None:
    if a.shape != b.shape:
        raise GliodeError(
            f"{what}: shape {tuple(a.shape)}, but {other} has {tuple(b.shape)}; give one like it"
        )
