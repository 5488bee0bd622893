"""Finite elements on DOLFINx and PETSc: the one package of `solvers` that needs them."""

import re
import sys

from solvers.errors import GliodeError


class MissingDolfinx(GliodeError, ImportError):
    """DOLFINx >= 0.9 is absent; the message says how to get it."""


try:
    import dolfinx
    import petsc4py  # noqa: F401  (a DOLFINx built without it cannot solve)
except ImportError as error:
    found = str(error)
else:
    version = [int(digits) for digits in re.findall(r"\d+", dolfinx.__version__)[:2]]
    found = "" if version >= [0, 9] else f"it has {dolfinx.__version__}"

if found:
    raise MissingDolfinx(
        f"DOLFINx >= 0.9 is not installed in this Python, {sys.executable} ({found}): "
        "run the command through scripts/env, or see environment.yml"
    )
