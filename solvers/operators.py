r"""Operators as plain tensors: matrices in compressed rows, and the weighted graph Laplacians of diffusion.

Every stiffness matrix K(D)_ij = int grad(phi_i) . D grad(phi_j) has zero row sums, so K = G^T diag(w) G with
G the differences of a state along the pairs (i, j) of vertices that share a cell and w_ij = -K_ij, linear in
D: `Conductances`. `solvers.fem` makes these; nothing here needs it. States are (..., n), the batch first.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from solvers.errors import GliodeError

WHOLE = (torch.int32, torch.int64)


@dataclass(frozen=True, eq=False)
class Sparse:
    """A matrix of `shape` in compressed rows.

    Row i has the entries pointers[i] to pointers[i + 1], with their `columns` (int32 or int64) and `values`.
    Raises GliodeError for sizes, numbers or an order that are none of a matrix.
    """

    pointers: Tensor
    columns: Tensor
    values: Tensor
    shape: tuple[int, int]

    def __post_init__(self) -> None:
        rows, columns = self.shape
        count = len(self.columns)
        whole("pointers", self.pointers, (rows + 1,), 0, count + 1)
        whole("columns", self.columns, (count,), 0, columns)
        steps = self.pointers.diff()
        if int(self.pointers[0]) != 0 or int(self.pointers[-1]) != count or bool((steps < 0).any()):
            raise GliodeError(f"pointers: must rise from 0 to the {count} entries")
        real("values", self.values, (count,))

    @staticmethod
    def of(matrix: Any) -> Sparse:
        """From SciPy, duplicates summed and columns sorted."""
        matrix = matrix.tocsr().copy()
        matrix.sum_duplicates()
        pointers, columns = (np.asarray(x, dtype=np.int32) for x in (matrix.indptr, matrix.indices))
        values = torch.from_numpy(np.asarray(matrix.data, dtype=np.float64))
        return Sparse(torch.from_numpy(pointers), torch.from_numpy(columns), values, matrix.shape)

    @cached_property
    def rows(self) -> Tensor:
        """The row of each entry, int64."""
        numbers = torch.arange(self.shape[0], device=self.columns.device)
        return numbers.repeat_interleave(self.pointers.diff())

    @cached_property
    def diagonal(self) -> Tensor:
        """Of a square matrix, (n,)."""
        on = self.rows == self.columns
        zero = torch.zeros(self.shape[0], dtype=self.values.dtype, device=self.values.device)
        return zero.index_add(0, self.rows[on], self.values[on])

    @cached_property
    def transpose(self) -> tuple[Sparse, Tensor]:
        """The transpose, and where its values stand among those of this matrix."""
        order = torch.argsort(self.columns, stable=True)
        counts = torch.bincount(self.columns, minlength=self.shape[1])
        pointers = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(self.pointers.dtype)
        columns = self.rows[order].to(self.columns.dtype)
        return Sparse(pointers, columns, self.values[order], (self.shape[1], self.shape[0])), order

    def dense(self) -> Tensor:
        """All entries, `shape`."""
        full = torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device)
        return full.index_put((self.rows, self.columns.long()), self.values, accumulate=True)


@dataclass(frozen=True, eq=False)
class Conductances:
    """The linear map D (per cell) -> w (per pair of vertices), and the products with K(w) = G^T diag(w) G.

    D is (..., cells) for isotropic diffusion, or (..., cells, d, d) symmetric for a tensor; mm^2/day. The map
    is a dense table per cell and one scatter: plain torch, differentiable.

    first, second: (pairs,) int64, the vertices of each pair, first < second; edge: (cells, k) the number of
    each cell's pairs; table: (cells, k[, d, d]), or (1, k) where all cells are equal; n: vertices;
    vertex_rule: whether the table is that of the vertex rule, whose matrices are M-matrices for D >= 0.
    Raises GliodeError for sizes or numbers that do not fit.
    """

    first: Tensor
    second: Tensor
    edge: Tensor
    table: Tensor
    n: int
    vertex_rule: bool

    def __post_init__(self) -> None:
        whole("first", self.first, (len(self.first),), 0, self.n)
        whole("second", self.second, self.first.shape, 0, self.n)
        if bool((self.first >= self.second).any()):
            raise GliodeError("first, second: each pair must come with its smaller vertex first")
        if self.edge.ndim != 2:
            raise GliodeError(f"edge: shape {tuple(self.edge.shape)}, expected (cells, pairs of a cell)")
        whole("edge", self.edge, self.edge.shape, 0, self.n_edges)
        rows = 1 if len(self.table) == 1 else len(self.edge)
        form = self.table.shape[2:3] * 2  # of a tensor D, else nothing
        real("table", self.table, (rows, self.edge.shape[1], *form))

    @property
    def n_edges(self) -> int:
        """Pairs."""
        return len(self.first)

    @property
    def n_cells(self) -> int:
        """Cells."""
        return len(self.edge)

    @property
    def tensor(self) -> bool:
        """Whether D is a tensor in each cell."""
        return self.table.ndim == 4

    def __call__(self, D: Tensor) -> Tensor:
        """The weights w, (..., pairs), of a diffusivity per cell."""
        expected = (self.n_cells, *self.table.shape[2:])
        if tuple(D.shape[-len(expected) :]) != expected:
            raise GliodeError(
                f"D: shape {tuple(D.shape)}, expected {expected} (one value per cell of this mesh)"
            )
        if D.dtype != self.table.dtype or D.device != self.table.device:
            raise GliodeError(
                f"D: {D.dtype} on {D.device}, this operator {self.table.dtype} on {self.table.device}"
            )
        batch = D.shape[: D.ndim - len(expected)]
        D = D.unsqueeze(len(batch) + 1)
        per_cell = (self.table * D).flatten(-2).sum(-1) if self.tensor else self.table * D
        per_pair = per_cell.reshape(*batch, -1)
        return _scattered(self.n_edges, (self.edge.reshape(-1), per_pair))

    def affine(self, fractions: Tensor) -> Tensor:
        """The weights of a mixture of tissues, (monomials, pairs), of `fractions` (tissues, cells).

        For diffusivities D (..., tissues) the weights of the mixture D = (sum_t f_t D_t^(1/3))^3 are
        monomials(D) @ affine(fractions): K(w) = sum_k c_k K_k for many patients at once.
        """
        return self(mixture(fractions))

    def differences(self, u: Tensor) -> Tensor:
        """G u: the differences of states (..., n) along the pairs, (..., pairs)."""
        return u[..., self.first] - u[..., self.second]

    def stiffness(self, w: Tensor, u: Tensor) -> Tensor:
        """K(w) u, dual (..., n), for weights (..., pairs); on the tape.

        `solvers.node.science.sparse` has a faster one.
        """
        flux = w * self.differences(u)
        return _scattered(self.n, (self.first, flux), (self.second, -flux))


def _scattered(size: int, *parts: tuple[Tensor, Tensor]) -> Tensor:
    """The sums (..., size) of values (..., k) at their places (k,)."""
    total = parts[0][1].new_zeros(*parts[0][1].shape[:-1], size)
    for where, values in parts:
        total = total.index_add(-1, where, values)
    return total


def _triples(tissues: int) -> list[tuple[int, int, int]]:
    return list(itertools.combinations_with_replacement(range(tissues), 3))


def monomials(D: Tensor) -> Tensor:
    """The cubic monomials of D^(1/3), (..., monomials), of diffusivities D (..., tissues) in mm^2/day.

    For two tissues a^3, a^2 b, a b^2, b^3 with a = D_1^(1/3), b = D_2^(1/3).
    """
    root = D ** (1 / 3)
    products = [root[..., i] * root[..., j] * root[..., k] for i, j, k in _triples(D.shape[-1])]
    return torch.stack(products, dim=-1)


def mixture(fractions: Tensor) -> Tensor:
    """Fields (monomials, cells) whose sum with the coefficients `monomials` is (sum_t f_t D_t^(1/3))^3.

    fractions: (tissues, cells). The rule of Landau, Lifshitz and Looyenga for mixtures in three dimensions.
    """
    if fractions.ndim != 2:
        raise GliodeError(f"fractions: shape {tuple(fractions.shape)}, expected (tissues, cells)")
    products = [
        fractions[i] * fractions[j] * fractions[k] * len(set(itertools.permutations((i, j, k))))
        for i, j, k in _triples(len(fractions))
    ]
    return torch.stack(products)


def real(name: str, values: Tensor, shape: tuple[int, ...]) -> None:
    """Raise GliodeError unless these are finite real numbers of the shape."""
    if tuple(values.shape) != tuple(shape):
        raise GliodeError(f"{name}: shape {tuple(values.shape)}, expected {tuple(shape)}")
    if not values.is_floating_point():
        raise GliodeError(f"{name}: {values.dtype}, expected real numbers")
    if not bool(torch.isfinite(values).all()):
        raise GliodeError(f"{name}: holds values that are not finite")


def whole(name: str, values: Tensor, shape: tuple[int, ...], low: int, high: int) -> None:
    """Raise GliodeError unless these are whole numbers from `low` to below `high`, of the shape."""
    if tuple(values.shape) != tuple(shape):
        raise GliodeError(f"{name}: shape {tuple(values.shape)}, expected {tuple(shape)}")
    if values.dtype not in WHOLE:
        raise GliodeError(f"{name}: {values.dtype}, expected whole numbers")
    if values.numel() and not (low <= int(values.min()) and int(values.max()) < high):
        raise GliodeError(
            f"{name}: runs from {int(values.min())} to {int(values.max())}, not from {low} to {high - 1}"
        )
