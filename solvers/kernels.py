"""Small loops in C that neither PETSc nor torch does well, compiled at first use, in a second.

The library goes into the user's cache folder under a name that is a hash of the source, the compiler, its
flags and the processor. DOLFINx needs a C compiler anyway; on a machine without one the torch forms do the
same.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from solvers.errors import GliodeError


def library(source: Path, flags: tuple[str, ...] = ("-O2",)) -> ctypes.CDLL:
    """The shared library of one C file. Raises GliodeError where it cannot be compiled."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler:
        raise GliodeError(
            "no C compiler found (cc, gcc, clang or $CC): DOLFINx needs one, and so does Gliode; install gcc"
        )
    flags = (*flags, "-shared", "-fPIC")
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gliode"
    text = source.read_bytes() + " ".join((compiler, *flags, platform.platform(), _processor())).encode()
    made = folder / f"{source.stem}-{hashlib.sha256(text).hexdigest()[:16]}.so"
    try:
        if not made.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                new = Path(scratch) / made.name
                command = [*compiler.split(), *flags, "-o", str(new), str(source)]
                subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
                os.replace(new, made)  # at once: other ranks and runs see all of it or nothing
        return ctypes.CDLL(str(made))
    except subprocess.SubprocessError as error:
        detail = getattr(error, "stderr", None) or error
        raise GliodeError(
            f"{compiler} cannot compile {source.name}: {detail}; set $CC to a C compiler that works"
        ) from error
    except OSError as error:
        raise GliodeError(
            f"{made}: {error}; set $XDG_CACHE_HOME to a folder to write to and run from"
        ) from error


def _processor() -> str:
    """What code for this very processor depends on: a cache folder may be shared by several machines."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        lines = information.read_text(encoding="utf-8", errors="replace").splitlines()
        kept = {line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))}
        return "\n".join(sorted(kept))
    return f"{platform.machine()} {platform.processor()}"
