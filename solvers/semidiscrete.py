r"""Semi-discrete problems as plain tensors: what `solvers.fem` assembled, for machines with torch alone.

    M x' = A(w) x + N(x; w) + b(w),    A(w) = sum_k w_k A_k,    b(w) = sum_k w_k b_k,

M lumped or consistent; N is given in code (a growth law, a network). Diffusion has a form of its own: every
stiffness matrix has zero row sums, so K(w) = G^T diag(w) G with G the differences over pairs of vertices and
weights w = -K_ij, linear in the diffusivity of the cells (`Conductances`); then A(w) = -K(w).

States are (..., n), the batch first. Lengths are in mm, times in days.

The file is one safetensors (which runs no code when read): real numbers float64, whole numbers int32, and in
its header the version of the format and a record in JSON. Everything is checked when it is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from solvers.errors import GliodeError
from solvers.files import atomic
from solvers.operators import Conductances, Sparse, mixture, monomials, real, whole

T = TypeVar("T")
KEY, VERSION = "gliode.semidiscrete", 1  # of the file's header; raise the version when the format changes
REAL, WHOLE = torch.float64, torch.int32
SPARSE = {"pointers": WHOLE, "columns": WHOLE, "values": REAL}
PAIRS = {"first": WHOLE, "second": WHOLE, "edge": WHOLE, "table": REAL}
GRID = {"affine": REAL, "voxel": WHOLE, "corner": WHOLE}
__all__ = ["Conductances", "Grid", "SemiDiscrete", "Sparse", "mixture", "monomials"]


@dataclass(frozen=True, eq=False)
class Grid:
    """The voxel grid a mesh of bricks was cut from.

    shape: voxels per axis; affine: (4, 4) float64, voxel index to RAS mm (voxel centres at whole indices);
    voxel: (cells, 3) the voxel of each cell; corner: (n, 3) the grid corner of each vertex, corner (i, j, k)
    at voxel coordinates (i - 1/2, j - 1/2, k - 1/2).
    """

    shape: tuple[int, int, int]
    affine: Tensor
    voxel: Tensor
    corner: Tensor

    def __post_init__(self) -> None:
        if len(self.shape) != 3 or min(self.shape) < 1:
            raise GliodeError(f"grid.shape: {self.shape}, expected three numbers of voxels")
        real("grid.affine", self.affine, (4, 4))
        for name, numbers, more in (("voxel", self.voxel, 0), ("corner", self.corner, 1)):
            whole(f"grid.{name}", numbers, (len(numbers), 3), 0, max(self.shape) + more)
            sides = torch.tensor(self.shape, device=numbers.device) + more
            if bool((numbers >= sides).any()):
                raise GliodeError(f"grid.{name}: lies outside the grid of {self.shape} voxels")

    @property
    def points(self) -> Tensor:
        """The vertices in RAS mm, (n, 3) float64."""
        return (self.corner.to(self.affine) - 0.5) @ self.affine[:3, :3].T + self.affine[:3, 3]


@dataclass(frozen=True, eq=False)
class SemiDiscrete:
    """M x' = A(w) x + N(x; w) + b(w) on n degrees of freedom, and what is known of them.

    mass: (n,) lumped, or a consistent matrix; operators: the A_k by name, n x n; loads: the b_k by name,
    (n,); conductances: diffusion K(w) by the weights of its pairs, or None; fractions: tissue -> (cells,);
    coordinates: (n, 1 to 3) in mm, None where a grid has them or where a degree of freedom has no point;
    grid: the voxel grid, or None; units: name -> unit; provenance: what the file is and where it comes from.

    Raises GliodeError naming the part whose size, type or numbers are wrong.
    """

    mass: Tensor | Sparse
    operators: Mapping[str, Sparse] = field(default_factory=dict)
    loads: Mapping[str, Tensor] = field(default_factory=dict)
    conductances: Conductances | None = None
    fractions: Mapping[str, Tensor] = field(default_factory=dict)
    coordinates: Tensor | None = None
    grid: Grid | None = None
    units: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        n = self.n
        for key in ("operators", "loads", "fractions", "units", "provenance"):
            for name, value in getattr(self, key).items():
                if not isinstance(name, str):
                    raise GliodeError(f"{key}: the name {name!r} is no text; give {str(name)!r}")
                if key in ("units", "provenance") and not isinstance(value, str):
                    raise GliodeError(f"{key}.{name}: {value!r} is no text; give {str(value)!r}")
        if isinstance(self.mass, Sparse):
            _square("mass", self.mass, n)
        else:
            real("mass", self.mass, (n,))
            if n and not float(self.mass.min()) > 0:
                raise GliodeError("mass: a lumped mass is positive everywhere")
        for name, operator in self.operators.items():
            _square(f"operators.{name}", operator, n)
        for name, load in self.loads.items():
            real(f"loads.{name}", load, (n,))
        cells = {f"fractions.{name}": len(values) for name, values in self.fractions.items()}
        for name, values in self.fractions.items():
            real(f"fractions.{name}", values, (len(values),))
        if self.conductances is not None:
            cells["conductances"] = self.conductances.n_cells
            if self.conductances.n != n:
                raise GliodeError(f"conductances: of {self.conductances.n} vertices, the mass of {n}")
        if self.grid is not None:
            cells["grid"] = len(self.grid.voxel)
            if len(self.grid.corner) != n:
                raise GliodeError(f"grid.corner: {len(self.grid.corner)} vertices, the mass has {n}")
        if len(set(cells.values())) > 1:
            raise GliodeError(f"cells: their numbers differ, {cells}")
        if self.coordinates is not None:
            real("coordinates", self.coordinates, (n, min(3, self.coordinates.shape[-1])))

    @property
    def n(self) -> int:
        """Degrees of freedom."""
        return self.mass.shape[0]

    @property
    def points(self) -> Tensor:
        """(n, 1 to 3) in mm. Raises GliodeError where the degrees of freedom have none."""
        if self.coordinates is not None:
            return self.coordinates
        if self.grid is None:
            raise GliodeError("coordinates: this problem's degrees of freedom have no points")
        return self.grid.points

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> SemiDiscrete:
        """The same on another device, its real numbers in another type."""
        return _moved(self, device, dtype)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically. Raises GliodeError for names or sizes it cannot hold."""
        from safetensors.torch import save_file

        tensors, record = _parts(self)
        with atomic(path) as temporary:
            save_file(tensors, temporary, {KEY: json.dumps(record, allow_nan=False)})

    @staticmethod
    def load(path: str | Path) -> SemiDiscrete:
        """What `save` wrote, on the CPU.

        Raises GliodeError naming the file and the part: missing, damaged, of another version of the format,
        parts that are missing or of a wrong type or size, numbers out of range or not finite.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                return _Reader(file).problem()
        except (OSError, SafetensorError) as error:
            raise GliodeError(f"{path}: missing or damaged ({error}); export it anew") from error
        except GliodeError as error:
            raise GliodeError(f"{path}: {error}; export it anew") from error


def _parts(problem: SemiDiscrete) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file and its record."""
    tensors: dict[str, Tensor] = {}

    def keep(key: str, values: Tensor) -> None:
        if not values.is_floating_point() and values.numel() and int(values.max()) > np.iinfo(np.int32).max:
            raise GliodeError(f"{key}: holds numbers above the {np.iinfo(np.int32).max} of the format")
        kind = REAL if values.is_floating_point() else WHOLE
        tensors[key] = values.detach().to("cpu", kind, copy=True).contiguous()

    def keep_matrix(key: str, matrix: Sparse) -> None:
        for part in SPARSE:
            keep(f"{key}.{part}", getattr(matrix, part))

    if isinstance(problem.mass, Sparse):
        keep_matrix("mass", problem.mass)
    else:
        keep("mass", problem.mass)
    for name, operator in problem.operators.items():
        keep_matrix(f"operators.{name}", operator)
    for name, load in problem.loads.items():
        keep(f"loads.{name}", load)
    for name, values in problem.fractions.items():
        keep(f"fractions.{name}", values)
    if problem.conductances is not None:
        for part in PAIRS:
            keep(f"conductances.{part}", getattr(problem.conductances, part))
    if problem.grid is not None:
        for part in GRID:
            keep(f"grid.{part}", getattr(problem.grid, part))
    if problem.coordinates is not None:
        keep("coordinates", problem.coordinates)
    record = {
        "version": VERSION,
        "n": problem.n,
        "consistent": isinstance(problem.mass, Sparse),
        "operators": list(problem.operators),
        "loads": list(problem.loads),
        "fractions": list(problem.fractions),
        "vertex_rule": None if problem.conductances is None else problem.conductances.vertex_rule,
        "grid": None if problem.grid is None else list(problem.grid.shape),
        "coordinates": problem.coordinates is not None,
        "units": dict(problem.units),
        "provenance": dict(problem.provenance),
    }
    return tensors, record


class _Reader:
    """Takes an open safetensors file apart."""

    def __init__(self, file: Any) -> None:
        self.file, self.keys = file, set(file.keys())
        text = (file.metadata() or {}).get(KEY)
        if text is None:
            raise GliodeError("no semi-discrete problem of Gliode: its header has no record")
        try:
            record = json.loads(text)
            version = record["version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise GliodeError(f"its record is damaged ({error!r})") from error
        if version != VERSION:
            raise GliodeError(f"written in version {version} of the format, this Gliode reads {VERSION}")
        self.record: dict[str, Any] = record

    def problem(self) -> SemiDiscrete:
        n, vertex_rule = self.said("n", int), self.said("vertex_rule", bool, None)
        shape, has = self.said("grid", list, None), self.said("coordinates", bool)
        operators, loads, fractions = (self.names(key) for key in ("operators", "loads", "fractions"))
        conductances = grid = None
        if vertex_rule is not None:
            first, second, edge, table = self.parts("conductances", PAIRS)
            conductances = Conductances(first.long(), second.long(), edge, table, n, vertex_rule)
        if shape is not None:
            if len(shape) != 3 or not all(type(side) is int for side in shape):
                raise GliodeError(f"grid: its shape is {shape}, expected three numbers")
            grid = Grid(tuple(shape), *self.parts("grid", GRID))
        mass = self.matrix("mass", n) if self.said("consistent", bool) else self.tensor("mass")
        if isinstance(mass, Tensor):
            real("mass", mass, (n,))
        return SemiDiscrete(
            mass,
            {name: self.matrix(f"operators.{name}", n) for name in operators},
            {name: self.tensor(f"loads.{name}") for name in loads},
            conductances,
            {name: self.tensor(f"fractions.{name}") for name in fractions},
            self.tensor("coordinates") if has else None,
            grid,
            self.texts("units"),
            self.texts("provenance"),
        )

    def said(self, key: str, kind: type, *others: Any) -> Any:
        """An entry of the record."""
        value = self.record.get(key, KEY)
        if type(value) is not kind and not any(value is other for other in others):
            raise GliodeError(f"{key}: missing in its record, or no {kind.__name__}")
        return value

    def names(self, key: str) -> list[str]:
        found: list[str] = self.said(key, list)
        if not all(isinstance(name, str) for name in found):
            raise GliodeError(f"{key}: its record has other things than names")
        return found

    def texts(self, key: str) -> dict[str, str]:
        found: dict[str, str] = self.said(key, dict)
        if not all(isinstance(text, str) for text in found.values()):
            raise GliodeError(f"{key}: its record has other things than text")
        return found

    def parts(self, key: str, kinds: Mapping[str, torch.dtype]) -> list[Tensor]:
        return [self.tensor(f"{key}.{part}", kind) for part, kind in kinds.items()]

    def tensor(self, key: str, kind: torch.dtype = REAL) -> Tensor:
        """A tensor of the type that its place has."""
        if key not in self.keys:
            raise GliodeError(f"{key}: missing")
        found: Tensor = self.file.get_tensor(key)
        if found.dtype != kind or found.ndim == 0:
            raise GliodeError(f"{key}: holds {found.dtype} of shape {tuple(found.shape)}, expected {kind}")
        return found

    def matrix(self, key: str, n: int) -> Sparse:
        pointers, columns, values = self.parts(key, SPARSE)
        try:
            return Sparse(pointers, columns, values, (n, n))
        except GliodeError as error:
            raise GliodeError(f"{key}.{error}") from error


def _moved(value: T, device: str | torch.device | None, dtype: torch.dtype | None) -> T:
    """A tensor, or all tensors of a dataclass or mapping, moved; real numbers converted."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)  # type: ignore[return-value]
    if isinstance(value, Mapping):
        return {name: _moved(part, device, dtype) for name, part in value.items()}  # type: ignore[return-value]
    if is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: _moved(getattr(value, f.name), device, dtype) for f in fields(value)}
        return replace(value, **parts)
    return value


def _square(name: str, matrix: Sparse, n: int) -> None:
    if matrix.shape != (n, n):
        raise GliodeError(f"{name}: shape {matrix.shape}, expected {(n, n)}")
