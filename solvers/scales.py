r"""Smoothing at several lengths, and slopes, of many fields at once: what filters on a mesh are made of.

    S_l = (M + l^2 K)^-1 M = f_l(A),   A = M^-1 K,   f_l(t) = 1 / (1 + l^2 t),   K = D^T W D,

D the slopes at the points, W their weights (the integral of |grad m|^2 is m^T K m), M the lumped mass. All
S_l are functions of one operator, self-adjoint in L2 with the lumped mass, in [0, 1], the identity for l = 0.
With the spectrum of A in [0, bound], x = 2 t / bound - 1, a = 1 + 2 / (l^2 bound) and r = a + sqrt(a^2 - 1),

    f_l = c (1 + 2 sum_j (-r)^-j T_j(x)),   c = 2 / (l^2 bound sqrt(a^2 - 1)),   rest <= 2 c r^-J / (r - 1),

so one recurrence of Chebyshev polynomials T_j of A (Hammond, Vandergheynst and Gribonval 2011) makes every
S_l m of a whole batch, with J ~ l sqrt(bound) log(2 / rtol) / 2 products, no solve and no inner product; read
backwards (Clenshaw), it is the exact transpose. Small problems on one process are factorised instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import splu
from torch import Tensor

from solvers.errors import GliodeError
from solvers.spaces import Diagonal

DIRECT = 12_000  # entries up to which to factorise


class Exchange(Protocol):
    """Of the entries that ranks share (solvers.fem.ghosts)."""

    parallel: bool

    def extend(self, u: Tensor, /) -> Tensor: ...

    def gather(self, local: Tensor, /) -> Tensor: ...


class Scales:
    """S_l and D of fields (batch, n) for `lengths` in mm, on the tape to any order, in float64 or float32.

    space: L2 with the lumped mass; slopes: D, a SciPy matrix (d * points, n), all points' first slopes first;
    weights: (points,), W; bound: above the spectrum of M^-1 D^T W D; rtol: of f_l; exchange: under MPI, where
    D takes the rank's entries with its ghosts; direct: factorise up to so many entries. A deep copy is the
    object itself. Raises GliodeError unless the lengths rise (the first may be 0) and the sizes fit.
    """

    def __init__(
        self,
        space: Diagonal,
        slopes: Any,
        weights: Tensor,
        bound: float,
        lengths: Sequence[float],
        rtol: float = 1e-8,
        exchange: Exchange | None = None,
        direct: int = DIRECT,
    ) -> None:
        self.lengths = checked_lengths(lengths)
        if slopes.shape[0] % max(1, len(weights)):
            raise GliodeError(f"scales: {slopes.shape[0]} slopes at {len(weights)} points")
        if not (math.isfinite(bound) and bound > 0 and 0 < rtol < 1):
            raise GliodeError(f"scales: bound {bound}, rtol {rtol}: the bound must be positive, rtol below 1")
        self.space, self.weights, self.bound, self.rtol = space, weights, float(bound), rtol
        self._exchange = exchange if exchange is not None and exchange.parallel else None
        self.d = slopes.shape[0] // max(1, len(weights))
        self._D = slopes.tocsr()
        self._terms = _chebyshev(self.lengths, self.bound, rtol)
        self._direct = self._exchange is None and space.size <= direct
        self._made: dict[tuple[str, torch.dtype], Any] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Scales:
        return self

    def smooth(self, m: Tensor) -> Tensor:
        """S_l m for all lengths l, (batch, lengths, n), of m (batch, n)."""
        return linear(m, self._smooth, self._smooth_adjoint)

    def smooth_adjoint(self, duals: Tensor) -> Tensor:
        """sum_l S_l^T y_l, a dual (batch, n), of duals y (batch, lengths, n)."""
        return linear(duals, self._smooth_adjoint, self._smooth)

    def slopes(self, m: Tensor) -> Tensor:
        """D m, (..., d, points), of m (..., n)."""
        return linear(m, self._slopes, self._slopes_adjoint)

    def slopes_adjoint(self, q: Tensor) -> Tensor:
        """D^T q, a dual (..., n), of q (..., d, points); no weights in it."""
        return linear(q, self._slopes_adjoint, self._slopes)

    # Off the tape, in numbers of either kind.

    @cached_property
    def _root(self) -> Tensor:
        return self.space.weights.sqrt()

    @cached_property
    def _K(self) -> Any:
        """The stiffness matrix, under MPI the rank's part of it."""
        K = (self._D.T @ (sparse.diags_array(np.tile(self.weights.numpy(), self.d)) @ self._D)).tocsr()
        K.data[np.abs(K.data) < 1e-13 * np.abs(K.data).max(initial=0)] = 0
        K.eliminate_zeros()
        return K

    def _kept(self, what: str, kind: torch.dtype) -> Any:
        """Something in numbers of a kind, made once."""
        if (what, kind) not in self._made:
            self._made[what, kind] = getattr(self, f"_make_{what}")(torch.zeros(0, dtype=kind).numpy().dtype)
        return self._made[what, kind]

    def _make_slopes(self, number: Any) -> Any:
        D = self._D.astype(number)
        return D, D.T.tocsr()

    def _make_solves(self, number: Any) -> Any:
        """y -> (M + l^2 K)^-1 y of each length."""
        M, solves = sparse.diags_array(self.space.weights.numpy()), []
        for length in self.lengths:
            matrix = sparse.csc_matrix((M + length**2 * self._K).astype(number))
            options = {"SymmetricMode": True}
            solves.append(
                splu(matrix, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options=options).solve
            )
        return solves

    def _make_doubled(self, number: Any) -> Callable[[Tensor], Tensor]:
        """u -> 2 (2 M^-1/2 K M^-1/2 / bound - 1) u."""
        if self._exchange is None:
            root = sparse.diags_array(1 / self._root.numpy())
            X = 4 / self.bound * (root @ self._K @ root) - 2 * sparse.eye_array(self.space.size)
            X = X.tocsr().astype(number)
            return lambda u: torch.from_numpy(X @ u.numpy())
        K = self._K.astype(number)

        def product(u: Tensor) -> Tensor:
            root = self._root.to(u)[:, None]
            local = torch.from_numpy(K @ self._extended(u / root).numpy())
            return 4 / self.bound * self._gathered(local) / root - 2 * u

        return product

    def _extended(self, u: Tensor) -> Tensor:
        """(n, columns) with the ghosts below."""
        if self._exchange is None:
            return u
        return torch.stack([self._exchange.extend(v.double()) for v in u.T.contiguous()], 1).to(u)

    def _gathered(self, local: Tensor) -> Tensor:
        """The transpose of that."""
        if self._exchange is None:
            return local
        return torch.stack([self._exchange.gather(v.double()) for v in local.T.contiguous()], 1).to(local)

    def _smooth(self, m: Tensor) -> Tensor:
        if self._direct:
            dual = (m * self.space.weights.to(m)).numpy().T
            solves = zip(self._kept("solves", m.dtype), self.lengths, strict=True)
            return torch.stack([torch.from_numpy(f(dual)).T if length else m for f, length in solves], 1)
        root, doubled = self._root.to(m)[:, None], self._kept("doubled", m.dtype)
        now = root * m.T.contiguous()  # (n, batch): sparse products are fastest so
        sums = [row[0] * now for row in self._terms]
        before, now = now, doubled(now) / 2
        for j in range(1, max(map(len, self._terms))):
            for total, row in zip(sums, self._terms, strict=True):
                if j < len(row):
                    total.add_(now, alpha=row[j])
            before, now = now, doubled(now).sub_(before)
        sums = [s / root if length else m.T for s, length in zip(sums, self.lengths, strict=True)]
        return torch.stack(sums).permute(2, 0, 1).contiguous()

    def _smooth_adjoint(self, y: Tensor) -> Tensor:
        if self._direct:
            solves = zip(self._kept("solves", y.dtype), self.lengths, y.unbind(1), strict=True)
            mass = self.space.weights.to(y)
            parts = [torch.from_numpy(f(p.numpy().T)).T * mass if length else p for f, length, p in solves]
            return torch.stack(parts).sum(0)
        root, doubled = self._root.to(y)[:, None], self._kept("doubled", y.dtype)
        parts = [part.T / root for part in y.unbind(1)]
        last = later = torch.zeros_like(parts[0])  # Clenshaw's b_(j+1), b_(j+2)
        for j in range(max(map(len, self._terms)) - 1, -1, -1):
            now = (doubled(last) if j else doubled(last) / 2).sub_(later)
            for part, row in zip(parts, self._terms, strict=True):
                if j < len(row):
                    now.add_(part, alpha=row[j])
            last, later = now, last
        return (root * last).T.contiguous()

    def _slopes(self, m: Tensor) -> Tensor:
        D = self._kept("slopes", m.dtype)[0]
        rows = [torch.from_numpy(D @ u.numpy()) for u in self._extended(m.reshape(-1, m.shape[-1]).T).T]
        return torch.stack(rows).reshape(*m.shape[:-1], self.d, len(self.weights))

    def _slopes_adjoint(self, q: Tensor) -> Tensor:
        transposed = self._kept("slopes", q.dtype)[1]
        flat = q.reshape(-1, q.shape[-2] * q.shape[-1])
        local = torch.stack([torch.from_numpy(transposed @ row.numpy()) for row in flat], 1)
        return self._gathered(local).T.reshape(*q.shape[:-2], self.space.size)


def checked_lengths(lengths: Sequence[float]) -> tuple[float, ...]:
    """The lengths; raises GliodeError unless they rise from 0 or above."""
    found = tuple(float(length) for length in lengths)
    rising = all(a < b for a, b in pairwise(found))
    if not (found and found[0] >= 0 and rising and all(map(math.isfinite, found))):
        raise GliodeError(f"lengths: {list(found)}; give rising numbers of mm, from 0 or above")
    return found


def _chebyshev(lengths: Sequence[float], bound: float, rtol: float) -> list[list[float]]:
    """The coefficients of each f_l."""
    rows = []
    for length in lengths:
        if length == 0:
            rows.append([1.0])
            continue
        a = 1 + 2 / (length**2 * bound)
        root = math.sqrt((a - 1) * (a + 1))
        r, c = a + root, 2 / (length**2 * bound * root)
        count = max(1, math.ceil(math.log(2 * c / (rtol * (r - 1))) / math.log(r)) + 1)
        rows.append([c] + [2 * c * (-r) ** -j for j in range(1, count)])
    return rows


def linear(x: Tensor, apply: Callable[[Tensor], Tensor], transpose: Callable[[Tensor], Tensor]) -> Tensor:
    """L x on the tape (both modes, to any order) for a linear L and its transpose, callables off the tape."""
    out: Tensor = _Linear.apply(x, apply, transpose)
    return out


class _Linear(torch.autograd.Function):
    """x -> L x for a linear L and its transpose, given as callables that never see the tape."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, apply: Callable[[Tensor], Tensor], transpose: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.maps = apply, transpose
        return apply(x.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Linear.apply(grads[0], *reversed(ctx.maps)), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        return _Linear.apply(tangents[0], *ctx.maps)  # type: ignore[no-any-return]
