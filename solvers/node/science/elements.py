r"""Discontinuous elements as arrays: what discontinuous Galerkin needs of a mesh of affine cells.

A state is (..., cells, nodes, components), batch first. All cells are images of one reference cell, so that
the tables of the basis are common, and what a cell's shape changes are a few small matrices, one each or, on
an even grid, one for all. `interval` and `rectangle` are made here; `solvers.fem.equations.conservation`
makes the same from any DOLFINx mesh of intervals, triangles or parallelograms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.polynomial import legendre
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor

from solvers.errors import GliodeError
from solvers.node.science.laws import courant

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Reference:
    """The reference cell: the basis at nodes (n, dim), quadrature points and the points of its faces.

    values (q, n), derivatives (dim, q, n), weights (q,), points (q, dim); traces (m, n), face_points (m,
    dim), face_weights (m,), face_normals (m, dim), face (m,) the number of the face a point lies on.
    """

    degree: int
    nodes: Array
    points: Array
    weights: Array
    values: Array
    derivatives: Array
    face_points: Array
    face_weights: Array
    face_normals: Array
    face: NDArray[np.int64]
    traces: Array


@dataclass(frozen=True)
class Elements:
    """A mesh of K cells with n nodes, q quadrature points and m face points each; C is K, or 1 on even grids.

    points (K, q, dim), weights (C, q), face_weights (C, m), normals (C, m, dim); values (q, n), traces (m,
    n); stiffness (C, dim, n, q) and lift (C, n, m), both with the inverse mass; mean (n,), linear (n, n) the
    L2 projection on linear functions, projection (n, q) that of values at the points; exterior (K * m,) the
    face point opposite, itself where `boundary` (K, m); neighbours (K, faces) cells, itself at the boundary.
    """

    dim: int
    degree: int
    points: Tensor
    weights: Tensor
    face_weights: Tensor
    normals: Tensor
    values: Tensor
    traces: Tensor
    stiffness: Tensor
    lift: Tensor
    mean: Tensor
    linear: Tensor
    projection: Tensor
    exterior: Tensor
    boundary: Tensor
    neighbours: Tensor

    def to(self, *where: Any) -> Elements:
        """On another device or in another precision, as Tensor.to."""
        device = self.points.to(*where).device
        moved: dict[str, Any] = {}
        for item in fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Tensor):
                moved[item.name] = value.to(*where) if value.is_floating_point() else value.to(device)
        return replace(self, **moved)

    @property
    def count(self) -> int:
        """K."""
        return int(self.points.shape[0])

    @property
    def volumes(self) -> Tensor:
        """(C,)."""
        return self.weights.sum(-1)

    def project(self, f: Callable[[Tensor], Sequence[Any]]) -> Tensor:
        """The L2 projection, (K, n, components), of f: points (K, q, dim) -> a sequence of components.

        Jumps at the edges of cells are kept: no point lies on one.
        """
        at = self.points
        parts = [torch.as_tensor(part, dtype=at.dtype, device=at.device) for part in f(at)]
        return self.projection @ torch.stack([part.expand(at.shape[:-1]) for part in parts], -1)

    def evaluate(self, u: Tensor) -> Tensor:
        """u at the quadrature points, (..., K, q, components)."""
        return self.values @ u

    def means(self, u: Tensor) -> Tensor:
        """Cell means, (..., K, components)."""
        return torch.einsum("n,...nc->...c", self.mean, u)

    def integral(self, u: Tensor) -> Tensor:
        """int u, (..., components)."""
        return (self.means(u) * self.volumes[:, None]).sum(-2)

    def distance(self, u: Tensor, exact: Callable[[Tensor], Sequence[Any]], order: int = 1) -> Tensor:
        """The L1 or L2 norm (`order`) of u - exact by the cells' quadrature, (..., components)."""
        parts = [torch.as_tensor(part, dtype=u.dtype, device=u.device) for part in exact(self.points)]
        gap = (self.evaluate(u) - torch.stack(parts, -1)).abs() ** order
        return (gap * self.weights[..., None]).sum((-3, -2)) ** (1 / order)


def build(reference: Reference, origins: Array, jacobians: Array, periods: Sequence[float] = ()) -> Elements:
    """The cells x = origin + J X, origins (K, g), jacobians (C, g, dim) with C = K or 1.

    Faces are matched by their points, modulo `periods` (0: not periodic) from the least coordinates on. A
    closed curve of intervals (g > dim = 1) is taken as its arc. Raises GliodeError where faces do not match.
    """
    r, dim = reference, reference.nodes.shape[1]

    def placed(X: Array) -> Array:
        return np.asarray(origins[:, None] + np.einsum("kgd,md->kmg", jacobians, X))

    at = placed(r.face_points)
    exterior, boundary = _matched(at.reshape(-1, at.shape[-1]), origins, periods)
    cells, m = at.shape[:2]
    faces = int(r.face[-1]) + 1
    first = [int(np.flatnonzero(r.face == f)[0]) for f in range(faces)]
    neighbours = (exterior.reshape(cells, m) // m)[:, first]

    J = jacobians
    if jacobians.shape[1] > dim:  # one-dimensional: the arc length
        J = np.linalg.norm(jacobians, axis=1, keepdims=True)
    inverse, determinant = np.linalg.inv(J), np.abs(np.linalg.det(J))
    normals = np.einsum("ked,me->kmd", inverse, r.face_normals)
    stretch = np.linalg.norm(normals, axis=-1)
    mass = np.einsum("q,qi,qj->ij", r.weights, r.values, r.values)
    solve = np.linalg.inv(mass)
    gradients = np.einsum("eqn,ked->kdqn", r.derivatives, inverse)
    linear = np.column_stack([np.ones(len(r.points)), r.points])[:, : 1 if r.degree == 0 else None]
    at_nodes = np.column_stack([np.ones(len(r.nodes)), r.nodes])[:, : linear.shape[1]]
    gram = linear.T @ (r.weights[:, None] * linear)
    to_linear = at_nodes @ np.linalg.solve(gram, linear.T @ (r.weights[:, None] * r.values))

    def tensor(a: Any) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(a))

    return Elements(
        dim=dim,
        degree=r.degree,
        points=tensor(placed(r.points)),
        weights=tensor(determinant[:, None] * r.weights),
        face_weights=tensor(determinant[:, None] * stretch * r.face_weights),
        normals=tensor(normals / stretch[..., None]),
        values=tensor(r.values),
        traces=tensor(r.traces),
        stiffness=tensor(np.einsum("ij,q,kdqj->kdiq", solve, r.weights, gradients)),
        lift=tensor(np.einsum("ij,mj,km->kim", solve, r.traces, stretch * r.face_weights)),
        mean=tensor(r.weights @ r.values / r.weights.sum()),
        linear=tensor(to_linear),
        projection=tensor(solve @ (r.values * r.weights[:, None]).T),
        exterior=tensor(exterior),
        boundary=tensor(boundary.reshape(cells, m)),
        neighbours=tensor(neighbours),
    )


def _matched(
    points: Array, origins: Array, periods: Sequence[float]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """For each face point the one opposite, and whether there is none."""
    low = points.min(0)
    box = np.zeros(points.shape[1])
    box[: len(periods)] = periods
    wrapped = points - low
    around = box > 0
    wrapped[:, around] %= box[around]
    wrapped[:, around] = np.where(wrapped[:, around] >= box[around], 0.0, wrapped[:, around])
    near = 1e-9 * max(float(np.ptp(points, axis=0).max()), 1e-300)
    pairs = cKDTree(wrapped, boxsize=box).query_pairs(near, output_type="ndarray")
    exterior = np.arange(len(points))
    if np.unique(pairs).size != pairs.size:
        raise GliodeError(
            "mesh: a face belongs to more than two cells; a periodic grid needs 3 or more cells"
        )
    exterior[pairs[:, 0]], exterior[pairs[:, 1]] = pairs[:, 1], pairs[:, 0]
    return exterior, exterior == np.arange(len(points))


def _legendre(X: Array, count: int) -> tuple[Array, Array]:
    """Legendre polynomials of [0, 1] at X (p,) and their derivatives, (p, count) each."""
    unit = np.eye(count)
    at = 2 * X - 1
    slopes = [2 * legendre.legval(at, legendre.legder(row)) for row in unit]
    return np.asarray(legendre.legvander(at, count - 1)), np.stack(slopes, 1)


def _line(degree: int) -> tuple[Array, Array, Array, Callable[[Array], tuple[Array, Array]]]:
    """Lobatto nodes on [0, 1], Gauss points and weights, and the Lagrange basis with its derivatives."""
    inner = legendre.legroots(legendre.legder([0] * degree + [1])) if degree > 1 else np.zeros(0)
    nodes = np.concatenate([[-1.0], inner, [1.0]]) / 2 + 0.5 if degree else np.array([0.5])
    at, weights = legendre.leggauss(degree + 1)
    inverse = np.linalg.inv(_legendre(nodes, degree + 1)[0])

    def basis(X: Array) -> tuple[Array, Array]:
        values, slopes = _legendre(X, degree + 1)
        return values @ inverse, slopes @ inverse

    return nodes, at / 2 + 0.5, weights / 2, basis


def reference_box(degree: int, dim: int) -> Reference:
    """[0, 1] or its square with products of Lagrange polynomials at Lobatto nodes and Gauss quadrature."""
    courant(degree)
    nodes, at, weights, basis = _line(degree)
    values, slopes = basis(at)
    ends = basis(np.array([0.0, 1.0]))[0]
    if dim == 1:
        X = np.array([[0.0], [1.0]])
        return Reference(
            degree, nodes[:, None], at[:, None], weights, values, slopes[None], X, np.ones(2),
            np.array([[-1.0], [1.0]]), np.array([0, 1]), ends,
        )  # fmt: skip

    def kron(a: Array, b: Array) -> Array:
        return np.asarray(np.kron(a, b), dtype=np.float64)

    def grid(a: Array, b: Array) -> Array:
        return np.stack([np.repeat(a, len(b)), np.tile(b, len(a))], 1)

    face_points, traces, normals = [], [], []
    for axis in (0, 1):
        for side in (0, 1):
            end = np.array([float(side)])
            face_points.append(grid(end, at) if axis == 0 else grid(at, end))
            one = ends[side : side + 1]
            traces.append(kron(one, values) if axis == 0 else kron(values, one))
            normals.append(np.tile(np.eye(2)[axis] * (2 * side - 1), (len(at), 1)))
    return Reference(
        degree, grid(nodes, nodes), grid(at, at), kron(weights, weights), kron(values, values),
        np.stack([kron(slopes, values), kron(values, slopes)]), np.concatenate(face_points),
        np.tile(weights, 4), np.concatenate(normals), np.repeat(np.arange(4), len(at)),
        np.concatenate(traces),
    )  # fmt: skip


def interval(low: float, high: float, cells: int, degree: int, periodic: bool = False) -> Elements:
    """[low, high] in equal cells. Raises GliodeError for an empty interval or less than 3 cells."""
    _require(low < high and cells >= 3, f"interval: {cells} cells of [{low}, {high}]")
    h = (high - low) / cells
    origins = low + h * np.arange(cells, dtype=np.float64)[:, None]
    return build(reference_box(degree, 1), origins, np.array([[[h]]]), [high - low] if periodic else ())


def rectangle(
    low: tuple[float, float],
    high: tuple[float, float],
    cells: tuple[int, int],
    degree: int,
    periodic: bool = False,
) -> Elements:
    """The rectangle between two corners in equal cells, x slowest. Raises GliodeError as `interval`."""
    _require(all(a < b and n >= 3 for a, b, n in zip(low, high, cells, strict=True)), f"rectangle: {cells}")
    h = (np.array(high) - low) / cells
    i, j = np.meshgrid(np.arange(cells[0]), np.arange(cells[1]), indexing="ij")
    origins = np.array(low) + h * np.stack([i.ravel(), j.ravel()], 1)
    periods = [b - a for a, b in zip(low, high, strict=True)] if periodic else []
    return build(reference_box(degree, 2), origins, np.diag(h)[None], periods)


def _require(good: bool, what: str) -> None:
    if not good:
        raise GliodeError(f"{what}: give increasing ends and 3 cells or more in each direction")
