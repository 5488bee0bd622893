r"""Diffusion of many tumours at once on the CPU, compiled: any mesh, a vector of tumours to an instruction.

A processor's vector holds `width` numbers (8 doubles with AVX-512), so tumours go in chunks of `width` and a
state is (chunks, n, width): what an instruction works on is contiguous, and the vertices that a product
touches stay in the cache. The weights of K(w) = G^T diag(w) G are formed where they are used,

    w_e = sum_k share_ek theta_k,

from theta (chunks, K, width), a few numbers for each tumour (`solvers.operators.monomials`): nothing is
stored for each pair and tumour.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from solvers.errors import GliodeError
from solvers.evolution import is_dual
from solvers.kernels import library
from solvers.operators import Conductances

SOURCE = Path(__file__).with_name("lanes.c")
REALS = {torch.float64: "double", torch.float32: "float"}


@cache
def _compiled(dtype: torch.dtype, terms: int) -> Any:
    """The C library. Raises GliodeError where it cannot be compiled."""
    flags = ("-O3", "-march=native", "-w", f"-DREAL={REALS[dtype]}", f"-DTERMS={terms}")
    made = library(SOURCE, flags)
    size, pointer = ctypes.c_ssize_t, ctypes.c_void_p
    made.stage.argtypes = [ctypes.c_int32, size, *[pointer] * 11, size, pointer, pointer]
    made.logistic.argtypes = [size, *[pointer] * 3]
    made.logistic_adjoint.argtypes = [size, *[pointer] * 5]
    for function in (made.stage, made.logistic, made.logistic_adjoint):
        function.restype = None
    return made


def width(dtype: torch.dtype) -> int:
    """Tumours to a chunk on this processor. Raises GliodeError where nothing can be compiled."""
    if dtype not in REALS:
        raise GliodeError(f"dtype: {dtype} is not one of {', '.join(map(str, REALS))}")
    return int(ctypes.c_int32.in_dll(_compiled(dtype, 1), "lanes").value)


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _check(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise GliodeError for what C, which takes addresses alone, would misread."""
    if tuple(x.shape) != shape or x.dtype != dtype or x.device.type != "cpu" or not x.is_contiguous():
        raise GliodeError(
            f"{name}: {x.dtype} on {x.device} of shape {tuple(x.shape)}, expected {dtype} on cpu of shape"
            f" {shape}, contiguous; make it by Lanes.box, weights or numbers, of this dtype"
        )


class Lanes:
    """K(w) with the weights of D = sum_k theta_k field_k, and the lumped mass M, for chunks of tumours.

    fields: (K, cells), for instance `solvers.operators.mixture(fractions)`; mass: (n,). Raises GliodeError
    for a mass that does not fit, a dtype that is no float32 or float64, a compiler that is missing.
    """

    def __init__(
        self, pairs: Conductances, fields: Tensor, mass: Tensor, dtype: torch.dtype = torch.float64
    ) -> None:
        if mass.shape != (pairs.n,):
            raise GliodeError(f"mass: shape {tuple(mass.shape)}, expected ({pairs.n},)")
        if any(x.device.type != "cpu" for x in (pairs.first, pairs.table, fields, mass)):
            raise GliodeError("mass, fields, pairs: Lanes run on the CPU; move them, or take VoxelOperator")
        shares = pairs(fields)
        self.width, self.dtype, self.n = width(dtype), dtype, pairs.n
        self._library = _compiled(dtype, len(shares))
        order = torch.argsort(pairs.first, stable=True)
        self._first, self._second = pairs.first[order], pairs.second[order]
        counts = torch.bincount(self._first, minlength=pairs.n)
        self._start = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
        self._neighbour = self._second.to(torch.int32)
        self._shares = shares[:, order].T.to(dtype).contiguous()
        self._inverse_mass = mass.reciprocal().to(dtype)
        farthest = int((self._second - self._first).max()) if len(order) else 0
        self._rows = 1 << farthest.bit_length()
        both = shares + shares.abs()
        sums = both.new_zeros(len(both), pairs.n).index_add_(1, pairs.first, both)
        self._sums = (sums.index_add_(1, pairs.second, both) / mass).T.to(dtype).contiguous()

    @property
    def together(self) -> int:
        """Tumours that go together: a chunk for each thread."""
        return self.width * torch.get_num_threads()

    def weights(self, theta: Tensor) -> tuple[Tensor, ...]:
        """theta (batch, K) in chunks."""
        return (self.box(theta),)

    def numbers(self, values: Tensor) -> Tensor:
        """A number for each tumour (batch,), to broadcast with states."""
        return self.box(values[:, None])

    def box(self, u: Tensor) -> Tensor:
        """States (batch, n) in chunks; the last is filled up with its last tumour."""
        more = -len(u) % self.width
        if more:
            u = torch.cat([u, u[-1:].expand(more, -1)])
        return u.view(-1, self.width, u.shape[1]).transpose(1, 2).contiguous()

    def states(self, chunks: Tensor) -> Tensor:
        """Chunks as states (batch, n), those that filled up among them."""
        return chunks.transpose(1, 2).reshape(-1, chunks.shape[1])

    def split(self, u: Tensor) -> list[Any]:
        """The parts of a batch that go their own ways: its chunks."""
        return list(range(len(u)))

    def bound(self, *weights: Tensor) -> Tensor:
        """A bound of the eigenvalues of M^-1 K(w), w >= 0, for each tumour (chunks, 1, width), 1/day
        (Gershgorin).
        """
        (theta,) = weights
        _check("weights", theta, (len(theta), self._shares.shape[1], self.width), self.dtype)
        return torch.stack([(self._sums @ x).amax(0, keepdim=True) for x in theta])

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
        """g base + f a - t L a + h u for one chunk, in `spare`; see `batched.Operator`. Products only when
        transposed. Raises GliodeError for a dtype, device, shape or layout that is not that of `box`.
        """
        z = torch.empty_like(a) if spare is None else spare
        y, totals = products or (None, (None,))
        state, terms = (self.n, self.width), (self._shares.shape[1], self.width)
        for name, x, shape in (
            *(("state", x, state) for x in (a, base, u, z, y)),
            *(("weights", x, terms) for x in (*weights, *totals)),
            ("coefficients", coefficients, (5, 1, self.width)),
        ):
            if x is not None:
                _check(name, x, shape, self.dtype)
        scratch = torch.empty(self._rows, self.width, dtype=self.dtype)
        self._library.stage(
            transposed,
            self.n,
            *map(_at, (self._start, self._neighbour, self._shares, self._inverse_mass, *weights)),
            *map(_at, (a, base, z, coefficients, u, scratch)),
            self._rows - 1,
            _at(y),
            _at(totals[0]),
        )
        return z

    def rate(self, weights: Sequence[Tensor], u: Tensor) -> Tensor:
        """M^-1 K(w) u on the tape, (chunks, n, width): slower, for derivatives of derivatives."""
        (theta,) = weights
        flux = (self._shares @ theta) * (u[:, self._first] - u[:, self._second])
        sums = torch.zeros_like(u).index_add(1, self._first, flux).index_add(1, self._second, -flux)
        return self._inverse_mass[:, None] * sums


def logistic(u: Tensor, dt: Tensor, rho: Tensor) -> Tensor:
    """The flow of u' = rho u (1 - u) on (chunks, n, width): u e / (1 + u (e - 1)) with e = exp(rho dt).

    rho dt: a number, or of a shape that broadcasts to (chunks, 1, width). Raises GliodeError for others, and
    for states that are no chunks.
    """
    lanes, t, u = width(u.dtype), rho * dt, u.contiguous()
    _check("state", u, (*u.shape[:2], lanes), u.dtype)
    numbers = (len(u), 1, lanes)
    # Torch's axes count from the last.
    if t.ndim > 3 or any(k not in (1, m) for k, m in zip(t.shape[::-1], numbers[::-1], strict=False)):
        raise GliodeError(f"rho dt: shape {tuple(t.shape)} does not broadcast to {numbers}, one per tumour")
    t = t.expand(numbers).contiguous()
    _check("rho dt", t, numbers, u.dtype)
    return _Logistic.apply(u, t)  # type: ignore[no-any-return]


class _Logistic(torch.autograd.Function):
    """One pass over memory each way; derivatives of derivatives and forward mode by torch's formulas."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(u, t)
        ctx.save_for_forward(u, t)
        growth, out = torch.expm1(t), torch.empty_like(u)
        run = _compiled(u.dtype, 1).logistic
        for c in range(len(u)):
            run(u.shape[1], _at(growth[c]), _at(u[c]), _at(out[c]))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        u, t = ctx.saved_tensors
        if torch.is_grad_enabled() or is_dual(grads[0], u, t):
            by_u, by_t = _slopes(u, t)
            return grads[0] * by_u, (grads[0] * by_t).sum(1, keepdim=True)
        growth, given = torch.expm1(t), grads[0].contiguous()
        out, total = torch.empty_like(u), torch.zeros_like(growth)
        run = _compiled(u.dtype, 1).logistic_adjoint
        for c in range(len(u)):
            run(u.shape[1], *map(_at, (growth[c], u[c], given[c], out[c], total[c])))
        return out, total

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        parts = [d * by for d, by in zip(tangents, _slopes(*ctx.saved_tensors), strict=True) if d is not None]
        return sum(parts[1:], parts[0])


def _slopes(u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of the logistic flow by u and by t = rho dt."""
    by_u = torch.exp(t) * (u * torch.expm1(t) + 1.0).reciprocal().square()
    return by_u, u * (1.0 - u) * by_u
