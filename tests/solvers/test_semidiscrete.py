"""Semi-discrete problems: the pair weights, mixtures of tissues, and the file, whatever is wrong with it."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.sparse import random as random_matrix
from torch import Tensor

from solvers.errors import GliodeError
from solvers.semidiscrete import KEY, Conductances, Grid, SemiDiscrete, Sparse, mixture, monomials

F64 = torch.float64


def chain(cells: int, h: float) -> Conductances:
    """P1 on an interval: each cell has one pair, with the weight D/h."""
    first = torch.arange(cells)
    edge = torch.arange(cells, dtype=torch.int32)[:, None]
    return Conductances(first, first + 1, edge, torch.full((1, 1), 1 / h, dtype=F64), cells + 1, True)


def bricks() -> Conductances:
    """Two unit cubes side by side, by the vertex rule: each edge of a cube has the weight D/4."""
    corner = torch.tensor([[i, j, k] for i in range(3) for j in range(2) for k in range(2)])
    number = {tuple(c): i for i, c in enumerate(corner.tolist())}
    edges: dict[tuple[int, int], int] = {}
    of_cell: list[list[int]] = []
    for x in range(2):
        own = [c for c in number if x <= c[0] <= x + 1]
        ends = [(number[a], number[b]) for a in own for b in own if b > a and _apart(a, b) == 1]
        of_cell.append([edges.setdefault(pair, len(edges)) for pair in ends])
    first, second = (torch.tensor([pair[side] for pair in edges]) for side in (0, 1))
    table = torch.full((1, 12), 0.25, dtype=F64)
    return Conductances(first, second, torch.tensor(of_cell, dtype=torch.int32), table, 12, True)


def _apart(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def problem(consistent: bool = False) -> SemiDiscrete:
    """All that a file can hold, on the two cubes."""
    A = random_matrix(12, 12, 0.3, random_state=1).tocsr()
    M = Sparse.of(A + A.T + 20 * random_matrix(12, 12, 0, random_state=1) + _eye(12))
    voxel = torch.tensor([[0, 0, 0], [1, 0, 0]])
    corner = torch.tensor([[i, j, k] for i in range(3) for j in range(2) for k in range(2)])
    affine = torch.tensor([[2.0, 0, 0, -1], [0, 2, 0, 3], [0, 0, 2, 5], [0, 0, 0, 1]], dtype=F64)
    return SemiDiscrete(
        M if consistent else torch.rand(12, dtype=F64) + 0.5,
        {"first": Sparse.of(A)},
        {"values": torch.rand(12, dtype=F64)},
        bricks(),
        {"white": torch.tensor([0.25, 1.0], dtype=F64), "grey": torch.tensor([0.75, 0.0], dtype=F64)},
        torch.rand(12, 3, dtype=F64) if consistent else None,
        Grid((2, 1, 1), affine, voxel, corner),
        {"t": "day"},
        {"source": "a test"},
    )


def _eye(n: int) -> Any:
    from scipy.sparse import eye

    return eye(n)


# ---- Operators --------------------------------------------------------------------------------------------


def test_the_weights_of_a_chain_give_the_stiffness_of_finite_elements() -> None:
    """K = tridiag(-D_i/h, (D_i + D_(i+1))/h, -D_(i+1)/h)."""
    pairs, D = chain(3, 0.5), torch.tensor([1.0, 3.0, 2.0], dtype=F64)
    K = torch.tensor([[2, -2, 0, 0], [-2, 8, -6, 0], [0, -6, 10, -4], [0, 0, -4, 4]], dtype=F64)
    u = torch.rand(5, 4, dtype=F64)
    torch.testing.assert_close(pairs.stiffness(pairs(D), u), u @ K)


def test_a_batch_is_its_members() -> None:
    pairs = bricks()
    D, u = torch.rand(3, 2, dtype=F64), torch.rand(3, 12, dtype=F64)
    w = pairs(D)
    for one, wi, Di, ui in zip(pairs.stiffness(w, u), w, D, u, strict=True):
        torch.testing.assert_close(wi, pairs(Di))
        torch.testing.assert_close(one, pairs.stiffness(wi, ui))
    quadratic = (pairs.stiffness(w, u) * u).sum(-1)
    torch.testing.assert_close(quadratic, (w * pairs.differences(u) ** 2).sum(-1))


def test_a_shared_edge_has_the_mean_of_its_cells() -> None:
    """Eight edges of a cube at weight D/4; on the four in the common face the cells add up."""
    w = bricks()(torch.tensor([1.0, 3.0], dtype=F64))
    assert sorted(w.tolist()) == [0.25] * 8 + [0.75] * 8 + [1.0] * 4


@pytest.mark.parametrize("tissues", [1, 2, 3])
def test_a_mixture_is_affine_in_its_monomials(tissues: int) -> None:
    f = torch.rand(tissues, 2, dtype=F64)
    D = torch.rand(4, tissues, dtype=F64)
    mixed = (D ** (1 / 3) @ f) ** 3
    torch.testing.assert_close(monomials(D) @ mixture(f), mixed)
    pairs = bricks()
    torch.testing.assert_close(monomials(D) @ pairs.affine(f), pairs(mixed))


def test_the_weights_are_differentiable() -> None:
    pairs, D = bricks(), torch.rand(2, 2, dtype=F64, requires_grad=True)
    u = torch.rand(2, 12, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda D, u: pairs.stiffness(pairs(D), u), (D, u), check_forward_ad=True)


def test_a_tensor_has_the_weights_of_its_form() -> None:
    """One triangle (0, 0), (1, 0), (0, 1): w_ij = -1/2 grad(phi_i) . D grad(phi_j)."""
    g = torch.tensor([[-1.0, -1.0], [1.0, 0.0], [0.0, 1.0]], dtype=F64)
    first, second = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 2])
    table = -0.5 * torch.einsum("pi,pj->pij", g[first], g[second])
    table = (table + table.transpose(1, 2)) / 2
    pairs = Conductances(first, second, torch.arange(3)[None], table[None], 3, False)
    D = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=F64)
    K = 0.5 * g @ D @ g.T
    torch.testing.assert_close(pairs.stiffness(pairs(D[None]), torch.eye(3, dtype=F64)), K)


def test_a_diffusivity_that_does_not_fit_is_refused() -> None:
    with pytest.raises(GliodeError, match=r"D: shape \(3,\), expected \(2,\)"):
        bricks()(torch.ones(3, dtype=F64))
    with pytest.raises(GliodeError, match=r"D: torch.float32 on cpu, this operator torch.float64 on cpu"):
        bricks()(torch.ones(2))
    with pytest.raises(GliodeError, match=r"D: torch.float64 on meta, this operator"):
        bricks()(torch.ones(2, dtype=F64, device="meta"))


def test_a_sparse_matrix_and_its_transpose() -> None:
    A = random_matrix(7, 5, 0.4, random_state=3)
    ours = Sparse.of(A)
    assert torch.equal(ours.dense(), torch.from_numpy(A.toarray()))
    transposed, order = ours.transpose
    assert torch.equal(transposed.dense(), torch.from_numpy(A.toarray().T))
    assert torch.equal(transposed.values, ours.values[order])
    square = random_matrix(6, 6, 0.5, random_state=4)
    assert torch.equal(Sparse.of(square).diagonal, torch.from_numpy(square.diagonal()))


# ---- The file ---------------------------------------------------------------------------------------------


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a problem, in order."""
    if isinstance(value, Tensor):
        return [value]
    parts = list(value.values()) if isinstance(value, dict) else list(getattr(value, "__dict__", {}).values())
    return [tensor for part in parts for tensor in tensors(part)]


@pytest.mark.parametrize("consistent", [False, True])
def test_a_file_gives_back_the_problem(consistent: bool, tmp_path: Path) -> None:
    saved = problem(consistent)
    saved.save(tmp_path / "a")
    found = SemiDiscrete.load(tmp_path / "a")
    assert len(tensors(saved)) == len(tensors(found)) == (17 if consistent else 14)
    for ours, theirs in zip(tensors(saved), tensors(found), strict=True):
        assert ours.dtype.is_floating_point == theirs.dtype.is_floating_point
        assert torch.equal(ours.double(), theirs.double())
    assert (found.units, found.provenance) == (saved.units, saved.provenance)
    assert found.conductances is not None and found.conductances.vertex_rule
    assert found.grid is not None and found.grid.shape == (2, 1, 1)
    torch.testing.assert_close(found.grid.points[-1], torch.tensor([2.0, 4.0, 6.0], dtype=F64))
    found.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_problem_in_single_precision_is_saved_in_double(tmp_path: Path) -> None:
    single = problem().to(dtype=torch.float32)
    assert isinstance(single.mass, Tensor) and single.mass.dtype == torch.float32
    assert single.conductances is not None and single.conductances.first.dtype == torch.int64
    single.save(tmp_path / "a")
    found = SemiDiscrete.load(tmp_path / "a").mass
    assert isinstance(found, Tensor) and torch.equal(found, single.mass.double())


Change = Callable[[dict[str, Tensor], dict[str, Any]], Any]


def altered(path: Path, change: Change) -> None:
    """Write a file whose tensors and record were changed."""
    problem().save(path)
    with safe_open(str(path), framework="pt") as file:
        record = json.loads(file.metadata()[KEY])
        parts = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(parts, record)
    save_file(parts, path, {KEY: json.dumps(record)})


WRONG: dict[str, tuple[Change, str]] = {
    "version": (lambda t, r: r.update(version=2), "version 2 of the format, this Gliode reads 1"),
    "no version": (lambda t, r: r.pop("version"), "record is damaged"),
    "record": (lambda t, r: r.update(operators=3), "operators: missing in its record, or no list"),
    "names": (lambda t, r: r.update(loads=[3]), "loads: its record has other things than names"),
    "units": (lambda t, r: r.update(units={"t": 1}), "units: its record"),
    "missing": (lambda t, r: t.pop("mass"), "mass: missing"),
    "single": (lambda t, r: t.update(mass=t["mass"].float()), "mass: holds torch.float32"),
    "long": (lambda t, r: t.update({"grid.voxel": t["grid.voxel"].long()}), "grid.voxel: holds torch.int64"),
    "size": (lambda t, r: t.update(mass=t["mass"][:11]), r"mass: shape \(11,\), expected \(12,\)"),
    "number": (lambda t, r: t.update(mass=t["mass"][0].clone()), r"mass: holds .* shape \(\)"),
    "finite": (lambda t, r: t["loads.values"].fill_(torch.nan), "loads.values: .* not finite"),
    "infinite": (lambda t, r: t["conductances.table"].fill_(torch.inf), "table: .* not finite"),
    "mass": (lambda t, r: t["mass"].neg_(), "mass: .* positive"),
    "vertex": (lambda t, r: t["conductances.second"].add_(1), "second: runs from"),
    "order": (lambda t, r: t["conductances.first"].fill_(11), "first, second: .* smaller"),
    "edge": (lambda t, r: t["conductances.edge"].neg_(), "edge: runs from"),
    "voxel": (lambda t, r: t["grid.voxel"].add_(1), "grid.voxel: "),
    "corner": (lambda t, r: t["grid.corner"][:, 1].add_(1), "grid.corner: lies outside"),
    "grid": (lambda t, r: r.update(grid=[2, 1]), "grid: its shape"),
    "column": (lambda t, r: t["operators.first.columns"].add_(7), "operators.first.columns: runs from"),
    "pointer": (lambda t, r: t["operators.first.pointers"].sub_(1), "operators.first.pointers: "),
    "cells": (lambda t, r: t.update({"fractions.grey": torch.ones(3, dtype=F64)}), "cells: their numbers"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_by_name(case: str, tmp_path: Path) -> None:
    change, message = WRONG[case]
    path = tmp_path / "case.safetensors"
    altered(path, change)
    with pytest.raises(GliodeError, match=f"case.safetensors: .*({message})"):
        SemiDiscrete.load(path)


def test_an_unchanged_file_is_read(tmp_path: Path) -> None:
    """So the test above tests something."""
    altered(tmp_path / "a", lambda t, r: None)
    assert SemiDiscrete.load(tmp_path / "a").n == 12


@pytest.mark.parametrize("kind", ["none", "folder", "empty", "truncated", "header", "pickle", "another"])
def test_no_file_at_all_is_told(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "case.safetensors"
    problem().save(path)
    content = path.read_bytes()
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "another":
        save_file({"mass": torch.ones(2)}, path)
    elif kind != "none":
        contents = {"empty": b"", "truncated": content[:-9], "header": content[:50]}
        path.write_bytes(contents.get(kind, pickle.dumps({"mass": 1})))
    with pytest.raises(GliodeError, match=r"case.safetensors: (missing or damaged|no semi-discrete problem)"):
        SemiDiscrete.load(path)


def test_a_record_nested_too_deeply_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "case.safetensors"
    save_file({"mass": torch.ones(2, dtype=F64)}, path, {KEY: "[" * 20_000})
    with pytest.raises(GliodeError, match=r"case.safetensors: its record is damaged"):
        SemiDiscrete.load(path)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"loads": {3: torch.ones(3, dtype=F64)}}, "loads: the name 3 is no text; give '3'"),
        ({"fractions": {None: torch.ones(3, dtype=F64)}}, "fractions: the name None is no text"),
        ({"operators": {1: Sparse.of(_eye(3))}}, "operators: the name 1 is no text"),
        ({"units": {1: "mm"}}, "units: the name 1 is no text"),
        ({"units": {"x": 1.0}}, "units.x: 1.0 is no text"),
        ({"provenance": {"seed": 3}}, "provenance.seed: 3 is no text; give '3'"),
    ],
)
def test_what_a_file_could_not_give_back_is_refused_when_made(parts: dict[str, Any], message: str) -> None:
    with pytest.raises(GliodeError, match=message):
        SemiDiscrete(torch.ones(3, dtype=F64), **parts)


def test_parts_that_do_not_fit_are_refused_when_made() -> None:
    mass = torch.ones(3, dtype=F64)
    with pytest.raises(GliodeError, match=r"operators.A: shape \(2, 2\), expected \(3, 3\)"):
        SemiDiscrete(mass, {"A": Sparse.of(_eye(2))})
    with pytest.raises(GliodeError, match=r"loads.b: shape \(2,\)"):
        SemiDiscrete(mass, loads={"b": torch.ones(2, dtype=F64)})
    with pytest.raises(GliodeError, match="no points"):
        _ = SemiDiscrete(mass).points
