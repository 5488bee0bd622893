"""Files: restart files across numbers of ranks, ParaView's read back, and writing that is never half done."""

from __future__ import annotations

import json
from pathlib import Path

import dolfinx
import h5py
import meshio
import numpy as np
import pytest
import torch
from mpi4py import MPI

from solvers.errors import GliodeError
from solvers.fem import mesh
from solvers.fem.io import Film, fingerprint, on_root, read_restart, write_restart
from solvers.fem.mesh import Domain
from solvers.files import atomic, read_arrays, write_arrays, write_json


def brick(comm: MPI.Comm, cells: tuple[int, int, int] = (4, 3, 5)) -> Domain:
    return mesh.box((8.0, 6.0, 10.0), cells, comm)


def wave(domain: Domain, phase: float = 0.0) -> torch.Tensor:
    """A state that tells its vertices apart."""
    return domain.interpolate(lambda x: np.sin(x[:, 0] + 10 * x[:, 1] + 100 * x[:, 2] + phase))


def shared(tmp_path: Path) -> Path:
    """Rank 0's folder, on every rank."""
    return Path(MPI.COMM_WORLD.bcast(str(tmp_path)))


@pytest.mark.mpi
@pytest.mark.parametrize("writer", [MPI.COMM_WORLD, MPI.COMM_SELF])
def test_states_come_back_on_another_number_of_ranks(tmp_path: Path, writer: MPI.Comm) -> None:
    """Written by all ranks and read by each alone, and the reverse: the wave is at the same points."""
    reader = MPI.COMM_SELF if writer is MPI.COMM_WORLD else MPI.COMM_WORLD
    folder = shared(tmp_path)
    path = folder / (f"rank{MPI.COMM_WORLD.rank}.npz" if writer is MPI.COMM_SELF else "all.npz")
    there = brick(writer)
    write_restart(path, there, "key", {"u": wave(there), "later": wave(there, 1.0)}, {"step": 3})
    MPI.COMM_WORLD.Barrier()
    here = brick(reader)
    found = read_restart(folder / path.name, here, "key")
    assert found is not None and found.record == {"step": 3}
    for name, phase in (("u", 0.0), ("later", 1.0)):
        torch.testing.assert_close(found.states[name], wave(here, phase), rtol=0, atol=1e-11)


@pytest.mark.mpi
def test_the_fingerprint_knows_the_mesh_and_its_data_but_not_the_ranks() -> None:
    alone, together = brick(MPI.COMM_SELF), brick(MPI.COMM_WORLD)
    assert fingerprint(alone) == fingerprint(together)
    assert fingerprint(brick(MPI.COMM_WORLD, (4, 3, 6))) != fingerprint(together)
    mask = np.ones((4, 3, 5), dtype=bool)
    white = np.arange(60.0).reshape(mask.shape)
    prints = [
        fingerprint(mesh.voxels(mask, np.eye(4), {"white": values}, comm))
        for values, comm in [(white, MPI.COMM_SELF), (white, MPI.COMM_WORLD), (white[::-1], MPI.COMM_WORLD)]
    ]
    assert prints[0] == prints[1] != prints[2]


def test_tetrahedra_from_a_file_restart_too(tmp_path: Path) -> None:
    points = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]], dtype=float)
    cells = [("tetra", np.array([[0, 1, 2, 3], [1, 2, 3, 4]]))]
    meshio.Mesh(points, cells).write(tmp_path / "two.vtu")
    domain = mesh.read(tmp_path / "two.vtu")
    write_restart(tmp_path / "r.npz", domain, "k", {"u": wave(domain)}, {})
    stored = read_arrays(tmp_path / "r.npz", "k")
    assert stored is not None  # in the order of the mesh file's points
    np.testing.assert_allclose(stored["u"], np.sin(points @ [1, 10, 100]), rtol=0, atol=1e-14)
    found = read_restart(tmp_path / "r.npz", domain, "k")
    assert found is not None and torch.equal(found.states["u"], wave(domain))


def test_restart_files_of_something_else_and_damaged_ones(tmp_path: Path) -> None:
    domain, path = brick(MPI.COMM_SELF), tmp_path / "restart.npz"
    assert read_restart(path, domain, "key") is None
    write_restart(path, domain, "key", {"u": wave(domain)}, {})
    assert read_restart(path, domain, "another") is None
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(GliodeError, match=r"restart\.npz: damaged"):
        read_restart(path, domain, "key")
    record = np.frombuffer(b"{}", dtype=np.uint8)
    for bad in (np.zeros(3), np.zeros(domain.n_global, dtype=np.float32)):
        write_arrays(path, "key", {"record": record, "u": bad})
        with pytest.raises(GliodeError, match=r"restart\.npz: the states \['u'\] do not fit the mesh"):
            read_restart(path, domain, "key")
    about = np.frombuffer(json.dumps({"key": "key", "names": ["u"]}).encode(), dtype=np.uint8)
    np.savez(path, about=about, array0=np.array([print], dtype=object))
    with pytest.raises(
        GliodeError, match=r"restart\.npz: damaged or no restart file \(Object arrays cannot be"
    ):
        read_arrays(path, "key")


def test_vtx_holds_the_states_and_the_mesh_once(tmp_path: Path) -> None:
    """ADIOS2 stores plain doubles: the arrays' bytes must be in its data file."""
    domain = brick(MPI.COMM_SELF)
    with Film(tmp_path / "paraview" / "density", domain) as film:
        for day in (0.0, 30.0, 60.0):
            film.add(day, wave(domain, day))
    assert film.path == tmp_path / "paraview" / "density.bp"
    stored = (film.path / "data.0").read_bytes()
    for day in (0.0, 30.0, 60.0):
        assert stored.count(wave(domain, day).numpy().tobytes()) == 1
    assert stored.count(np.ascontiguousarray(domain.points).tobytes()) == 1


@pytest.mark.mpi
def test_xdmf_where_adios2_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(dolfinx.io, "VTXWriter")
    domain = brick(MPI.COMM_WORLD)
    with Film(shared(tmp_path) / "density", domain) as film:
        film.add(0.0, wave(domain))
        film.add(60.0, wave(domain, 2.0))
    assert film.path.suffix == ".xdmf"
    if domain.comm.rank == 0:
        with h5py.File(film.path.with_suffix(".h5")) as data:
            points = data["Mesh/mesh/geometry"][:]
            found = [np.ravel(values) for values in data["Function/density"].values()]
        phases = [
            float(np.ptp(u - np.sin(points @ [1, 10, 100] + p))) for u, p in zip(found, (0, 2), strict=True)
        ]
        assert len(found) == 2 and max(phases) < 1e-12


def test_writing_replaces_a_file_only_when_it_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(RuntimeError), atomic(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.mpi
def test_an_error_of_rank_0_is_raised_on_every_rank(tmp_path: Path) -> None:
    def work() -> None:
        raise FileNotFoundError(2, "gone", "file.txt")

    with pytest.raises(GliodeError, match=r"gone: 'file\.txt'"):
        on_root(MPI.COMM_WORLD, work)
    assert on_root(MPI.COMM_WORLD, lambda: MPI.COMM_WORLD.rank) == 0
