r"""Leading singular triplets of F'(m) in the metrics of its input and output, by products alone.

With Gram matrices G_X of the inputs and G_Y of the outputs, the sensitivity is largest along the v_1 with

    s_1 = max ||F'(m) v||_Y / ||v||_X,    riesz_X(F'(m)^T G_Y F'(m) v_i) = s_i^2 v_i,    F'(m) v_i = s_i u_i,

(v_i, v_j)_X = (u_i, u_j)_Y = delta_ij. Two ways to a subspace that holds the v_i:

    "lanczos"     ARPACK on the eigenproblem above (Lehoucq, Sorensen, Yang 1998), to a tolerance
    "randomised"  subspace iteration from random vectors (Halko, Martinsson, Tropp 2011; in a metric: Saibaba,
                  Lee, Kitanidis 2016): a number of products known beforehand, good where the s_i decay

Both end with a singular value decomposition of F'(m) on that subspace, which undoes the squaring: values
below the root of rounding times s_1 are found too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor

from inverse.sensitivity.directional import Linearisation, Map, serial
from solvers.errors import GliodeError
from solvers.spaces import Space

METHODS = ("lanczos", "randomised")
OVERSAMPLING = 10  # random vectors beyond k (Halko, Martinsson, Tropp 2011, section 4.2)


@dataclass(frozen=True)
class SingularTriplets:
    """F'(m) inputs[i] = values[i] outputs[i], largest first.

    values: (k,); inputs: (k, *m.shape), orthonormal in the input space; outputs: (k, *F(m).shape),
    orthonormal in the output space.
    """

    values: Tensor
    inputs: Tensor
    outputs: Tensor


class _Flat(Space):
    """Tensors of any shape with the sum of products."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape

    def gram(self, primal: Tensor) -> Tensor:
        return primal

    def riesz(self, dual: Tensor) -> Tensor:
        return dual


def singular_values(
    F: Map,
    m: Tensor,
    k: int = 1,
    space: Space | None = None,
    output_space: Space | None = None,
    method: str = "lanczos",
    tol: float = 1e-10,
    power: int = 2,
    seed: int = 0,
) -> SingularTriplets:
    """The k leading singular triplets of F'(m).

    m: the whole input is one point (for a batch of samples see `local_lipschitz`); space, output_space:
    metrics of m and of F(m) (None: the sum of products); method: see above; tol: of "lanczos", relative,
    of the squared values; power: of "randomised", rounds of subspace iteration beyond the first, more
    where the values decay slowly; seed: of the start vectors. Where m or F(m) has no more than max(2k +
    1, 20) entries the whole Jacobian is made from products instead, whatever the method. Serial: spaces
    distributed over ranks are refused.
    """
    if method not in METHODS:
        raise GliodeError(f"method {method!r} is not one of {', '.join(METHODS)}")
    if not 0 < tol < 1 or power < 0:
        raise GliodeError(f"tol, power: {tol}, {power}; give a tol between 0 and 1 and a power of 0 or more")
    line = Linearisation(F, m)
    X = _metric(space, line.m, "m")
    Y = _metric(output_space, line.value, "F(m)")
    least = min(X.size, Y.size)
    if not 1 <= k <= least:
        raise GliodeError(f"k: {k} singular values, the Jacobian is {Y.size} x {X.size}; give 1 to {least}")
    generator = torch.Generator().manual_seed(seed)
    if least <= max(2 * k + 1, 20):
        basis = _whole(line, X, Y, generator)
    elif method == "lanczos":
        basis = _lanczos(line, X, Y, k, tol, generator)
    else:
        basis = _randomised(line, X, Y, min(k + OVERSAMPLING, least), power, generator)
    return _on_subspace(line, Y, basis, k, generator)


def _metric(space: Space | None, point: Tensor, what: str) -> Space:
    return _Flat(tuple(point.shape)) if space is None else serial(space, point, what)


def _tangents(line: Linearisation, rows: Tensor) -> Tensor:
    """F'(m) v for every row v."""
    return torch.stack([line.tangent(v) for v in rows])


def _adjoints(line: Linearisation, X: Space, Y: Space, rows: Tensor) -> Tensor:
    """riesz_X F'(m)^T G_Y u for every row u."""
    return torch.stack([X.riesz(line.adjoint(Y.gram(u))) for u in rows])


def _whole(line: Linearisation, X: Space, Y: Space, generator: torch.Generator) -> Tensor:
    """A basis of all inputs, or of those that the outputs depend on, whichever is smaller."""
    if X.size <= Y.size:
        units = torch.eye(X.size, dtype=line.m.dtype, device=line.m.device)
        rows = units.view(-1, *X.shape)
    else:
        units = torch.eye(Y.size, dtype=line.value.dtype, device=line.value.device)
        rows = torch.stack([X.riesz(line.adjoint(w)) for w in units.view(-1, *Y.shape)])
    return _orthonormal(X, rows, generator)[0]


def _lanczos(
    line: Linearisation, X: Space, Y: Space, k: int, tol: float, generator: torch.Generator
) -> Tensor:
    """The leading eigenvectors of F'(m)^T G_Y F'(m) v = s^2 G_X v, by ARPACK."""

    def point(v: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(v).reshape(X.shape)).to(line.m)

    def array(v: Tensor) -> np.ndarray:
        found: np.ndarray = v.detach().reshape(-1).cpu().double().numpy()
        return found

    def operator(f: Map) -> LinearOperator:
        return LinearOperator((X.size, X.size), matvec=lambda v: array(f(point(v))), dtype=np.float64)

    flat, start = isinstance(X, _Flat), _noise(X, line.m, generator)
    if not line.tangent(start).any():  # F'(m) = 0, as where every ReLU is off: ARPACK cannot start
        return _orthonormal(X, torch.zeros(k, *X.shape).to(line.m), generator)[0]
    try:
        _, vectors = eigsh(
            operator(lambda v: line.adjoint(Y.gram(line.tangent(v)))),
            k,
            M=None if flat else operator(X.gram),
            Minv=None if flat else operator(X.riesz),
            which="LA",
            v0=array(start),
            tol=max(tol, 10 * torch.finfo(line.m.dtype).eps),
        )
    except ArpackError as error:
        raise GliodeError(
            f"singular_values: Lanczos found no {k} values ({error}); raise tol or take method='randomised'"
        ) from error
    rows = torch.stack([point(v) for v in vectors.T[::-1]])
    return _orthonormal(X, rows, generator)[0]


def _randomised(
    line: Linearisation, X: Space, Y: Space, size: int, power: int, generator: torch.Generator
) -> Tensor:
    """power + 1 rounds of subspace iteration from `size` random vectors."""
    start = torch.stack([X.riesz(_noise(X, line.m, generator)) for _ in range(size)])
    basis, _ = _orthonormal(X, start, generator)
    for _ in range(power + 1):
        images, _ = _orthonormal(Y, _tangents(line, basis), generator)
        basis, _ = _orthonormal(X, _adjoints(line, X, Y, images), generator)
    return basis


def _on_subspace(
    line: Linearisation, Y: Space, basis: Tensor, k: int, generator: torch.Generator
) -> SingularTriplets:
    """The decomposition of F'(m) on an orthonormal basis V of inputs: F'(m) V = U R, and R is small."""
    images, R = _orthonormal(Y, _tangents(line, basis), generator)
    left, values, right = torch.linalg.svd(R)
    return SingularTriplets(
        values[:k],
        torch.tensordot(right[:k].to(basis), basis, 1),
        torch.tensordot(left[:, :k].mT.to(images), images, 1),
    )


def _orthonormal(space: Space, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Orthonormal rows q and R with rows_j = sum_i R_ij q_i: Gram-Schmidt, each row twice.

    A row that depends on the earlier ones to rounding is replaced by a random one, with R_jj = 0.
    """
    count = len(rows)
    flat = rows.reshape(count, -1)
    q, duals = torch.zeros_like(flat), torch.zeros_like(flat)
    R = torch.zeros(count, count, dtype=flat.dtype, device=flat.device)
    for j in range(count):
        a = flat[j]
        rounding = 10 * torch.finfo(a.dtype).eps * space.norm(a.view(space.shape))
        for _ in range(2):
            share = duals[:j] @ a
            a = a - share @ q[:j]
            R[:j, j] += share
        norm = space.norm(a.view(space.shape))
        if norm > rounding:
            R[j, j] = norm
        else:
            a = space.riesz(_noise(space, a, generator)).reshape(-1)
            for _ in range(2):
                a = a - (duals[:j] @ a) @ q[:j]
            norm = space.norm(a.view(space.shape))
        q[j] = a / norm
        duals[j] = space.gram(q[j].view(space.shape)).reshape(-1)
    return q.view(rows.shape), R


def _noise(space: Space, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(space.shape, generator=generator, dtype=torch.float64).to(like)
