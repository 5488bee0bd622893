r"""Inner products, Riesz maps, and how tensors behave under MPI.

A point m of any space is one torch tensor. Its derivative is a dual tensor of the same shape; only
`Space.riesz` turns a dual into a direction:

    inner(a, b) = <G a, b>,    G g = d  <=>  g = riesz(d),    G the Gram matrix, <., .> the duality pairing.

Under MPI a tensor is either *replicated* (the same on every rank) or *distributed* (each rank holds the
entries it owns). Two maps lead from one kind to the other, each the adjoint of the other:

    replicate: replicated -> distributed,   identity forward, all-reduce backward
    reduce:    distributed -> replicated,   all-reduce forward, identity backward

so a replicated scalar enters the distributed part of a computation once through `replicate`, and a sum over
distributed entries leaves it through `reduce`. Every rank must build the same graph, or the collectives
deadlock.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from solvers.errors import GliodeError


class Communicator(Protocol):
    """What is used of an mpi4py communicator (both calls sum)."""

    def allreduce(self, sendobj: Any, /) -> Any: ...

    def Allreduce(self, sendbuf: Any, recvbuf: Any, /) -> None: ...


def _all_sum(x: Tensor, comm: Communicator) -> Tensor:
    """Sum of x over the ranks: a new tensor on x's device."""
    local = x.detach().cpu().contiguous().numpy()
    total = np.empty_like(local)
    comm.Allreduce(local, total)
    return torch.from_numpy(total).to(x.device)


class _Replicate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator) -> Tensor:
        ctx.comm = comm
        return x.detach().clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Reduce.apply(grads[0], ctx.comm), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Replicate.apply(tangents[0], ctx.comm)


class _Reduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Communicator) -> Tensor:
        ctx.comm = comm
        return _all_sum(x, comm)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Replicate.apply(grads[0], ctx.comm), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Reduce.apply(tangents[0], ctx.comm)


class _Symmetric(Function):
    """x -> S x for a symmetric linear S given as a callable (which never sees the tape)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, operator: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.operator = operator
        return operator(x.detach()).clone()  # a copy: the callable may return its own buffer

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Symmetric.apply(grads[0], ctx.operator), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Symmetric.apply(tangents[0], ctx.operator)


def replicate(x: Tensor, comm: Communicator | None) -> Tensor:
    """A replicated x for distributed use: identity forward, all-reduce backward (comm None: serial)."""
    if comm is None:
        return x
    out: Tensor = _Replicate.apply(x, comm)
    return out


def reduce(x: Tensor, comm: Communicator | None) -> Tensor:
    """The sum of every rank's x, on every rank: all-reduce forward, identity backward (comm None: serial)."""
    if comm is None:
        return x
    out: Tensor = _Reduce.apply(x, comm)
    return out


def symmetric(x: Tensor, operator: Callable[[Tensor], Tensor]) -> Tensor:
    """S x on the tape (any order of differentiation, both modes) for a symmetric linear callable S."""
    out: Tensor = _Symmetric.apply(x, operator)
    return out


class Space(ABC):
    """A Hilbert space of tensors of one shape (under MPI: this rank's part)."""

    shape: tuple[int, ...]
    comm: Communicator | None = None

    @property
    def size(self) -> int:
        """Number of (local) entries of a point."""
        return math.prod(self.shape)

    @abstractmethod
    def gram(self, primal: Tensor) -> Tensor:
        """The dual G a of a point a, on the tape."""

    @abstractmethod
    def riesz(self, dual: Tensor) -> Tensor:
        """The primal g with G g = dual, on the tape: how a derivative becomes a direction."""

    def scaling(self) -> Tensor | None:
        """s where inner(a, b) = sum a b / s^2 (a diagonal metric), else None."""
        return None

    def pairing(self, dual: Tensor, primal: Tensor) -> Tensor:
        """<dual, primal> as a 0-d tensor on the tape, the same on every rank."""
        return reduce((dual * primal).sum(), self.comm)

    def pair(self, dual: Tensor, primal: Tensor) -> float:
        """<dual, primal>, the same on every rank."""
        return float(self.pairing(dual.detach(), primal.detach()))

    def inner(self, a: Tensor, b: Tensor) -> float:
        """(a, b) = <G a, b>."""
        return self.pair(self.gram(a.detach()), b)

    def norm(self, a: Tensor) -> float:
        """||a|| = sqrt((a, a))."""
        return math.sqrt(max(self.inner(a, a), 0.0))

    def dual_norm(self, dual: Tensor) -> float:
        """||dual|| = ||riesz(dual)||."""
        return math.sqrt(max(self.pair(dual, self.riesz(dual.detach())), 0.0))

    def zeros(self) -> Tensor:
        return torch.zeros(self.shape, dtype=torch.float64)

    def check(self, m: Tensor, what: str) -> None:
        """Raise GliodeError unless m has this space's shape."""
        if tuple(m.shape) != self.shape:
            raise GliodeError(
                f"{what} has shape {tuple(m.shape)}, its space has {self.shape}: pass one of that shape"
            )


class Euclidean(Space):
    """n replicated numbers with inner(a, b) = sum a_i b_i / scale_i^2.

    `scale`: one positive number or n of them, the standard deviations that make the parameters comparable
    (default 1).
    """

    def __init__(self, n: int, scale: float | Tensor | None = None) -> None:
        self.shape = (n,)
        s = torch.as_tensor(1.0 if scale is None else scale, dtype=torch.float64).detach()
        if s.ndim > 1 or s.numel() not in (1, n):
            raise GliodeError(
                f"Euclidean: scale has {s.numel()} entries for {n} parameters: give one, or one each"
            )
        if not bool((torch.isfinite(s) & (s > 0)).all()):
            raise GliodeError(f"Euclidean: scale must be positive and finite, got {s.tolist()}")
        self.scale = s.expand(n).clone()

    def gram(self, primal: Tensor) -> Tensor:
        return primal / self.scale.to(primal).square()

    def riesz(self, dual: Tensor) -> Tensor:
        return dual * self.scale.to(dual).square()

    def scaling(self) -> Tensor:
        return self.scale


class Diagonal(Space):
    """Entries owned by this rank with inner(a, b) = sum w_i a_i b_i: L2 with a lumped mass w.

    The metric in which bounds, L1 norms and thresholds act on each entry by itself. Raises GliodeError unless
    the weights (n,) are positive and finite.
    """

    def __init__(self, weights: Tensor, comm: Communicator | None = None) -> None:
        self.weights = weights.detach().clone()
        if self.weights.ndim != 1 or not bool((torch.isfinite(weights) & (weights > 0)).all()):
            raise GliodeError("Diagonal: the weights must be positive and finite, in one dimension")
        self.shape, self.comm = (len(weights),), comm

    def gram(self, primal: Tensor) -> Tensor:
        return primal * self.weights.to(primal)

    def riesz(self, dual: Tensor) -> Tensor:
        return dual / self.weights.to(dual)

    def scaling(self) -> Tensor:
        return self.weights.rsqrt()


class GramSpace(Space):
    """`size` entries owned by this rank, Gram matrix by two callables (finite-element L2, H1, priors).

    `apply(a)`: G a; `solve(d)`: the a with G a = d; both symmetric, tensor to tensor, free of the tape (they
    may leave torch).
    """

    def __init__(
        self,
        size: int,
        apply: Callable[[Tensor], Tensor],
        solve: Callable[[Tensor], Tensor],
        comm: Communicator | None = None,
    ) -> None:
        self.shape = (size,)
        self.comm = comm
        self._apply = apply
        self._solve = solve

    def gram(self, primal: Tensor) -> Tensor:
        return symmetric(primal, self._apply)

    def riesz(self, dual: Tensor) -> Tensor:
        return symmetric(dual, self._solve)


class DepthSobolev(Space):
    r"""Piecewise-linear weights w(t) with values w_k at the knots t_k, in H1 over depth:

        inner(v, w) = int v . w + length^2 v' . w' dt,

    exact for piecewise-linear functions. riesz solves (1 - length^2 d^2/dt^2) g = d with natural ends, g' =
    0, as linear finite elements: one symmetric tridiagonal system (L D L^T, factored once) for all entries of
    a weight.

    `times`: K >= 2 increasing knots; `shape`: of the weight at one knot, so that points have shape (K,
    *shape); `length` >= 0 in the unit of t (0: L2 in depth). `each`: the space whose inner product takes the
    place of v . w at one depth (a field's L2 or H1, under MPI distributed); None: Euclidean.
    """

    def __init__(
        self, times: Tensor, shape: tuple[int, ...], length: float, each: Space | None = None
    ) -> None:
        t = torch.as_tensor(times, dtype=torch.float64).detach()
        if t.ndim != 1 or len(t) < 2 or not bool((t.diff() > 0).all()):
            raise GliodeError("DepthSobolev: times must be at least two increasing knots")
        if not (math.isfinite(length) and length >= 0):
            raise GliodeError(f"DepthSobolev: length must be finite and not negative, got {length}")
        self.shape = (len(t), *shape)
        self._each, self.comm = each, None if each is None else each.comm
        h = t.diff()
        self._diagonal = torch.zeros_like(t)
        self._diagonal[:-1] += h / 3 + length**2 / h
        self._diagonal[1:] += h / 3 + length**2 / h
        self._off = h / 6 - length**2 / h
        pivots, below = [float(self._diagonal[0])], []
        for k, off in enumerate(self._off.tolist()):
            below.append(off / pivots[k])
            pivots.append(float(self._diagonal[k + 1]) - below[k] * off)
        self._pivots, self._below = pivots, below

    def gram(self, primal: Tensor) -> Tensor:
        out = symmetric(primal, self._product)
        return out if self._each is None else torch.stack([self._each.gram(row) for row in out])

    def riesz(self, dual: Tensor) -> Tensor:
        out = symmetric(dual, self._solve)
        return out if self._each is None else torch.stack([self._each.riesz(row) for row in out])

    def _product(self, a: Tensor) -> Tensor:
        wide = (-1,) + (1,) * (a.ndim - 1)
        diagonal, off = self._diagonal.to(a).view(wide), self._off.to(a).view(wide)
        out = diagonal * a
        out[:-1] += off * a[1:]
        out[1:] += off * a[:-1]
        return out

    def _solve(self, dual: Tensor) -> Tensor:
        rows = list(dual.unbind(0))
        for k, low in enumerate(self._below):
            rows[k + 1] = rows[k + 1].sub(rows[k], alpha=low)
        rows[-1] = rows[-1] / self._pivots[-1]
        for k in range(len(rows) - 2, -1, -1):
            rows[k] = (rows[k] / self._pivots[k]).sub(rows[k + 1], alpha=self._below[k])
        return torch.stack(rows)


class Product(Space):
    """A product of named spaces. A point is flat: the components one after another in the order given."""

    def __init__(self, spaces: Mapping[str, Space]) -> None:
        if not spaces:
            raise GliodeError("Product: needs at least one space")
        self.spaces = dict(spaces)
        self._sizes = [s.size for s in self.spaces.values()]
        self.shape = (sum(self._sizes),)
        self.comm = next((s.comm for s in self.spaces.values() if s.comm is not None), None)

    def pack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """One flat point of {name: component}, on the tape."""
        if set(parts) != set(self.spaces):
            raise GliodeError(f"Product: got components {sorted(parts)}, needs {sorted(self.spaces)}")
        for name, space in self.spaces.items():
            space.check(parts[name], f"Product: component {name!r}")
        return torch.cat([parts[name].reshape(-1) for name in self.spaces])

    def unpack(self, m: Tensor) -> dict[str, Tensor]:
        """{name: component} as views of m, on the tape."""
        parts = zip(self.spaces.items(), m.split(self._sizes), strict=True)
        return {name: part.view(space.shape) for (name, space), part in parts}

    def _each(self, method: str, point: Tensor) -> Tensor:
        parts = self.unpack(point)
        return torch.cat([getattr(s, method)(parts[name]).reshape(-1) for name, s in self.spaces.items()])

    def gram(self, primal: Tensor) -> Tensor:
        return self._each("gram", primal)

    def riesz(self, dual: Tensor) -> Tensor:
        return self._each("riesz", dual)

    def scaling(self) -> Tensor | None:
        scales = [s.scaling() for s in self.spaces.values()]
        known = [s for s in scales if s is not None]
        return torch.cat(known) if len(known) == len(scales) else None

    def pairing(self, dual: Tensor, primal: Tensor) -> Tensor:
        if self.comm is None:
            return (dual * primal).sum()
        duals, primals = self.unpack(dual), self.unpack(primal)
        terms = [s.pairing(duals[name], primals[name]) for name, s in self.spaces.items()]
        return torch.stack(terms).sum()
