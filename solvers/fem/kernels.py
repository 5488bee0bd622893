"""The one loop that neither PETSc nor torch does well, in C; FFCx, and so DOLFINx, needs a C compiler anyway.

It is compiled at first use, in a second, into the user's cache folder under a name that is a hash of the
source.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from solvers.errors import GliodeError

SOURCE = Path(__file__).with_name("stage.c")
FLAGS = ("-O2", "-shared", "-fPIC")
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
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise GliodeError(
            "no C compiler found (cc, gcc, clang or $CC): DOLFINx needs one, and so does Gliode; install gcc"
        )
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gliode"
    text = SOURCE.read_bytes() + " ".join((compiler, *FLAGS, platform.platform())).encode()
    library = folder / f"stage-{hashlib.sha256(text).hexdigest()[:16]}.so"
    try:
        if not library.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / library.name
                command = [*compiler.split(), *FLAGS, "-o", str(made), str(SOURCE)]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
                os.replace(made, library)  # at once: other ranks and runs see all of it or nothing
        function = ctypes.CDLL(str(library)).stage
    except subprocess.SubprocessError as error:
        detail = getattr(error, "stderr", None) or error
        raise GliodeError(
            f"{compiler} cannot compile {SOURCE.name}: {detail}; set $CC to a C compiler that works"
        ) from error
    except OSError as error:
        raise GliodeError(
            f"{library}: {error}; set $XDG_CACHE_HOME to a folder to write to and run from"
        ) from error
    size, pointer, real = ctypes.c_ssize_t, ctypes.c_void_p, ctypes.c_double
    function.argtypes = [size, *[pointer] * 5, real, *[pointer] * 5, real, real]
    function.restype = None
    return function
