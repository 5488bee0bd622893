r"""Products with sparse matrices on the tape.

    y = A(v) x,    dJ/dx = A(v)^T dJ/dy,    dJ/dv_e = sum_b (dJ/dy)_(b,i) x_(b,j)  for the entry e at (i, j),

bilinear in the values v and the states x, so the family of the two products (`product` and the sampled one in
its gradient) is closed under differentiation: both modes, to any order. Many states are one sparse-dense
product: SciPy's on the CPU (torch's own is 3 to 50 times slower there), torch's compressed rows on CUDA.

States are (..., n), the batch first; memory as (n, batch) is the fastest: keep it by making states as
transposed views, torch.empty(n, batch).T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from solvers.errors import GliodeError
from solvers.operators import Conductances, Sparse

_CHUNK = 4_000_000  # numbers gathered at once in a sampled product


def product(A: Sparse, x: Tensor, values: Tensor | None = None) -> Tensor:
    """A x, (..., rows), of states x (..., columns), with `values` (entries,) in the place of A's own.

    On the tape in x and the values, both modes, to any order. Raises GliodeError for a wrong size, device or
    type of numbers.
    """
    values = A.values if values is None else values
    agree(values, x, A.shape[1])
    if values.shape != A.values.shape or values.device != A.columns.device:
        raise GliodeError(
            f"values: {tuple(values.shape)} on {values.device}, the matrix has {tuple(A.values.shape)} on"
            f" {A.columns.device}"
        )
    out: Tensor = _Product.apply(values, x, A)
    return out


def agree(operator: Tensor, x: Tensor, n: int) -> None:
    """Raise GliodeError where states (..., n) do not fit an operator's numbers."""
    if not x.ndim or x.shape[-1] != n:
        raise GliodeError(f"state: shape {tuple(x.shape)}, expected (..., {n}): the batch first")
    if x.device != operator.device or x.dtype != operator.dtype:
        raise GliodeError(
            f"state: {x.dtype} on {x.device}, the operators {operator.dtype} on {operator.device}; move one, "
            "e.g. SemiDiscrete.to(device, dtype)"
        )


class _Product(torch.autograd.Function):
    """A(values) x."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, x: Tensor, A: Sparse) -> Tensor:
        ctx.A = A
        ctx.save_for_backward(values, x)
        ctx.save_for_forward(values, x)
        return _multiplied(A, values.detach(), x.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        values, x = ctx.saved_tensors
        by_values = _Sampled.apply(grads[0], x, ctx.A) if ctx.needs_input_grad[0] else None
        by_x = None
        if ctx.needs_input_grad[1]:
            transposed, order = ctx.A.transpose
            by_x = _Product.apply(values[order], grads[0], transposed)
        return by_values, by_x, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        values, x = ctx.saved_tensors
        parts = [] if tangents[0] is None else [_Product.apply(tangents[0], x, ctx.A)]
        parts += [] if tangents[1] is None else [_Product.apply(values, tangents[1], ctx.A)]
        return sum(parts[1:], parts[0])


class _Sampled(torch.autograd.Function):
    """The entries of g^T x, summed over the batch, at the places of A's."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, A: Sparse) -> Tensor:
        ctx.A = A
        ctx.save_for_backward(g, x)
        ctx.save_for_forward(g, x)
        G, X = _by_column(g.detach()), _by_column(x.detach())
        size = max(1, _CHUNK // max(1, X.shape[1]))
        parts = [
            (G[rows] * X[columns]).sum(1)
            for rows, columns in zip(A.rows.split(size), A.columns.long().split(size), strict=True)
        ]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        g, x = ctx.saved_tensors
        by_g = _Product.apply(grads[0], x, ctx.A) if ctx.needs_input_grad[0] else None
        by_x = None
        if ctx.needs_input_grad[1]:
            transposed, order = ctx.A.transpose
            by_x = _Product.apply(grads[0][order], g, transposed)
        return by_g, by_x, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        g, x = ctx.saved_tensors
        parts = [] if tangents[0] is None else [_Sampled.apply(tangents[0], x, ctx.A)]
        parts += [] if tangents[1] is None else [_Sampled.apply(g, tangents[1], ctx.A)]
        return sum(parts[1:], parts[0])


def _by_column(x: Tensor) -> Tensor:
    """States (..., n) as (n, batch)."""
    return x.reshape(-1, x.shape[-1]).T


def _multiplied(A: Sparse, values: Tensor, x: Tensor) -> Tensor:
    return _times(A, values, _by_column(x)).T.reshape(*x.shape[:-1], A.shape[0])


def _times(A: Sparse, values: Tensor, columns: Tensor) -> Tensor:
    """A (values) X of X (n, batch), off the tape."""
    if columns.is_cuda:
        return torch.sparse_csr_tensor(A.pointers, A.columns, values, A.shape) @ columns
    parts = (values.numpy(), A.columns.numpy(), A.pointers.numpy())
    return torch.from_numpy(csr_matrix(parts, A.shape, copy=False) @ columns.numpy())


class Stiffness:
    """u -> K(w) u on the tape, K(w) = G^T diag(w) G, for a batch of states and one set of weights or many.

    w (pairs,): one matrix in compressed rows times all states; w (batch, pairs): one for each state. Both
    modes, to any order: dJ/dw = (G dJ/d(Ku)) (G u), pair by pair.
    """

    def __init__(self, pairs: Conductances) -> None:
        self.pairs, n = pairs, pairs.n
        i, j = pairs.first, pairs.second
        every = torch.arange(n, device=i.device)
        rows, columns = torch.cat([every, i, j]), torch.cat([every, j, i])
        self._order = torch.argsort(rows * n + columns)
        self.pattern = _compressed(
            rows[self._order], columns[self._order], pairs.table.new_ones(len(rows)), n
        )

    def diagonal(self, w: Tensor) -> Tensor:
        """K(w)'s diagonal, (..., n)."""
        zero = w.new_zeros(*w.shape[:-1], self.pairs.n)
        return zero.index_add(-1, self.pairs.first, w).index_add(-1, self.pairs.second, w)

    def __call__(self, w: Tensor, u: Tensor) -> Tensor:
        """K(w) u, (..., n)."""
        if w.ndim not in (1, 2) or w.shape[-1] != self.pairs.n_edges:
            raise GliodeError(f"conductances: {tuple(w.shape)}, expected (pairs,) or (batch, pairs)")
        agree(w, u, self.pairs.n)
        if w.ndim == 2 and u.shape[:-1] != w.shape[:1]:
            raise GliodeError(f"conductances: of {len(w)} states, the states are {tuple(u.shape)}")
        out: Tensor = _Stiffness.apply(w, u, self)
        return out

    def at(self, w: Tensor) -> Callable[[Tensor], Tensor]:
        """u -> K(w) u off the tape, for many products with one w."""
        if w.is_cuda and w.ndim == 2:
            return lambda u: self.pairs.stiffness(w, u)
        values = torch.cat([self.diagonal(w), -w, -w], -1)[..., self._order]
        if w.ndim == 1:
            return lambda u: _multiplied(self.pattern, values, u)
        return lambda u: torch.stack(
            [_multiplied(self.pattern, v, x) for v, x in zip(values, u, strict=True)]
        )


class _Stiffness(torch.autograd.Function):
    """K(w) u, bilinear and symmetric."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, u: Tensor, stiffness: Stiffness) -> Tensor:
        ctx.stiffness = stiffness
        ctx.save_for_backward(w, u)
        ctx.save_for_forward(w, u)
        return stiffness.at(w.detach())(u.detach())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        w, u = ctx.saved_tensors
        by_w = by_u = None
        if ctx.needs_input_grad[0]:
            G = ctx.stiffness.pairs.differences
            by_w = (G(grads[0]) * G(u)).sum_to_size(w.shape)
        if ctx.needs_input_grad[1]:
            by_u = _Stiffness.apply(w, grads[0], ctx.stiffness)
        return by_w, by_u, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        w, u = ctx.saved_tensors
        parts = [] if tangents[0] is None else [_Stiffness.apply(tangents[0], u, ctx.stiffness)]
        parts += [] if tangents[1] is None else [_Stiffness.apply(w, tangents[1], ctx.stiffness)]
        return sum(parts[1:], parts[0])


class PairOperator:
    """K(w) and a lumped mass M as `solvers.node.science.batched` needs them: sparse-dense products, any mesh.

    States are (n, batch), weights (pairs, batch), numbers of a tumour (1, batch). shares: (K, pairs), from
    which `weights` makes w = sum_k theta_k share_k, e.g. `Conductances.affine(fractions)`.
    """

    together: int | None = None  # tumours that go together: all

    def __init__(self, pairs: Conductances, mass: Tensor, shares: Tensor | None = None) -> None:
        self.pairs, self.shares, self.n = pairs, shares, pairs.n
        self._inverse_mass = mass.reciprocal()[:, None]
        i, j = pairs.first, pairs.second
        ones = pairs.table.new_ones(len(i), 2)
        ones[:, 1] = -1.0
        rows = torch.arange(len(i), device=i.device).repeat_interleave(2)
        self.differences = _compressed(rows, torch.stack([i, j], 1).ravel(), ones.ravel(), pairs.n)

    def conductances(self, D: Tensor) -> tuple[Tensor, ...]:
        """The weights of D (batch, cells), mm^2/day."""
        return (self.pairs(D).T.contiguous(),)  # one memory, by which `BatchedFlow` knows them again

    def weights(self, theta: Tensor) -> tuple[Tensor, ...]:
        """The weights of theta (batch, K)."""
        if self.shares is None:
            raise GliodeError("shares: not given; make the weights by conductances(D)")
        return (self.shares.T @ theta.T,)

    def box(self, u: Tensor) -> Tensor:
        """States (batch, n) in the operator's form."""
        return u.T

    def states(self, box: Tensor) -> Tensor:
        """Back to (batch, n)."""
        return box.T

    def numbers(self, values: Tensor) -> Tensor:
        """A number for each tumour (batch,), to broadcast with states."""
        return values[None]

    def split(self, u: Tensor) -> list[Any]:
        """The parts of a batch that go their own ways: one."""
        return [...]

    def bound(self, *weights: Tensor) -> Tensor:
        """A bound of the eigenvalues of M^-1 K(w), (1, batch), 1/day (Gershgorin)."""
        (w,) = weights
        if self.pairs.vertex_rule and bool((w < 0).any()):
            raise GliodeError("diffusion: D is negative somewhere")
        zero, both = w.new_zeros(self.n, w.shape[1]), w + w.abs()
        rows = zero.index_add_(0, self.pairs.first, both).index_add_(0, self.pairs.second, both)
        return (rows * self._inverse_mass).amax(0, keepdim=True)

    def advance(
        self,
        weights: Sequence[Tensor],
        a: Tensor,
        base: Tensor | None,
        coefficients: Tensor,
        u: Tensor | None = None,
        transposed: bool = False,
        products: tuple[Tensor, Sequence[Tensor]] | None = None,
        spare: Tensor | None = None,
    ) -> Tensor:
        """g base + f a - t L a + h u, in memory of its own; see `batched.Operator`."""
        g, f, t, h, c = coefficients.unbind(0)
        G, back = self.differences, self.differences.transpose[0]
        flux = _times(G, G.values, self._inverse_mass * a if transposed else a)
        if products is not None:
            y, (total,) = products
            total.addcmul_(c * flux, _times(G, G.values, y))
        rate = _times(back, back.values, flux.mul_(weights[0]))
        if not transposed:
            rate.mul_(self._inverse_mass)
        out = (f * a).addcmul_(rate, t, value=-1.0)
        if base is not None:
            out.addcmul_(base, g)
        if u is not None:
            out.addcmul_(u, h)
        return out

    def rate(self, weights: Sequence[Tensor], u: Tensor) -> Tensor:
        """M^-1 K(w) u on the tape."""
        G = self.differences
        flux = weights[0].T * product(G, u.T)
        return self._inverse_mass * product(G.transpose[0], flux).T


def _compressed(rows: Tensor, columns: Tensor, values: Tensor, n: int) -> Sparse:
    """From sorted rows."""
    counts = torch.bincount(rows)
    pointers = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
    return Sparse(pointers, columns.to(torch.int32), values, (len(counts), n))
