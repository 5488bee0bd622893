"""The one loop of a diffusion step that neither PETSc nor torch does well, in C (see `solvers.kernels`)."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from solvers.kernels import library

SOURCE = Path(__file__).with_name("stage.c")
FloatArray = np.ndarray[Any, np.dtype[np.float64]]


class Stage:
    """Products with K(w) = G^T diag(w) G on n vertices, G the differences over pairs.

    start: (n + 1,) the pairs whose first vertex is i are start[i] to start[i + 1]; second: (pairs,) their
    second vertex, larger than the first.
    """

    def __init__(self, start: Any, second: Any) -> None:
        self._start = np.ascontiguousarray(start, dtype=np.int32)
        self._second = np.ascontiguousarray(second, dtype=np.int32)
        self._function = _compiled()

    def __call__(
        self,
        w: FloatArray,
        a: FloatArray,
        q: FloatArray,
        products: tuple[float, FloatArray, FloatArray] | None = None,
        update: tuple[FloatArray, FloatArray | None, FloatArray, float, float] | None = None,
    ) -> None:
        """q = K(w) a. All arrays are contiguous float64; only base and z may be the same.

        products (c, y, g): g += c (G a)(G y) for each pair. update (inverse_mass, base, z, f, t):
        z = base + f a - t inverse_mass q, without base if it is None.
        """
        c, y, g = products or (0.0, None, None)
        inverse_mass, base, z, f, t = update or (None, None, None, 0.0, 0.0)
        pointers = (None if x is None else x.ctypes.data for x in (y, g, inverse_mass, base, z))
        at_y, at_g, at_mass, at_base, at_z = pointers
        self._function(
            len(self._start) - 1,
            self._start.ctypes.data,
            self._second.ctypes.data,
            w.ctypes.data,
            a.ctypes.data,
            q.ctypes.data,
            c,
            at_y,
            at_g,
            at_mass,
            at_base,
            at_z,
            f,
            t,
        )


@cache
def _compiled() -> Any:
    """The C function. Raises GliodeError where it cannot be compiled."""
    function = library(SOURCE).stage
    size, pointer, real = ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_double
    function.argtypes = [size, *[pointer] * 5, real, *[pointer] * 5, real, real]
    function.restype = None
    return function
