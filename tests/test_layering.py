"""Imports point one way, scripts -> tumour -> inverse -> solvers, and only solvers.fem needs DOLFINx."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = ["solvers", "inverse", "tumour", "scripts"]


def imports(file: Path) -> set[str]:
    """Every module that the file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_no_import_points_upwards(layer: str) -> None:
    above = LAYERS[LAYERS.index(layer) + 1 :]
    files = list((ROOT / layer).rglob("*.py"))
    upward = [(str(f), name) for f in files for name in imports(f) if name.split(".")[0] in above]
    assert files and not upward


def modules_without_dolfinx() -> list[str]:
    files = [f.relative_to(ROOT) for top in ("solvers", "inverse") for f in (ROOT / top).rglob("*.py")]
    names = [".".join(f.with_suffix("").parts).removesuffix(".__init__") for f in files]
    return sorted(name for name in names if not name.startswith("solvers.fem"))


def python_without_dolfinx(code: str) -> subprocess.CompletedProcess[str]:
    block = "import sys; sys.modules |= dict.fromkeys(['dolfinx', 'petsc4py', 'mpi4py', 'slepc4py', 'ufl']); "
    return subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, cwd=ROOT)


def test_all_but_fem_imports_where_dolfinx_is_absent() -> None:
    """A GPU machine has torch alone."""
    result = python_without_dolfinx("import " + ", ".join(modules_without_dolfinx()))
    assert result.returncode == 0, result.stderr


def test_fem_says_in_one_line_what_is_missing() -> None:
    result = python_without_dolfinx(
        "from solvers.errors import GliodeError\n"
        "try: import solvers.fem\n"
        "except GliodeError as error: print(isinstance(error, ImportError), error)"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("True DOLFINx >= 0.9 is not installed in this Python")
    assert "scripts/env" in result.stdout and result.stdout.count("\n") == 1
