"""What the batch benchmark measures on CUDA, run small on the CPU: the same code, and its own check."""

from __future__ import annotations

from functools import cache

import pytest

from scripts.benchmarks import batch
from solvers.fem.export import export
from solvers.node.science.cohort import Cohort
from tumour.anatomy import mni152
from tumour.model import domain_of

once = cache(mni152)


@pytest.fixture(autouse=True)
def one_anatomy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "mni152", once)


def test_the_problem_made_without_dolfinx_is_the_exported_one() -> None:
    bare, whole = batch.voxel_problem(12.0), export(domain_of(once(12.0)), "MNI152")
    assert bare.grid is not None and whole.grid is not None
    assert bare.grid.corner.tolist() == whole.grid.corner.tolist()
    u, m = batch.seeds(whole.points, 2, width=12.0), batch.patients(2)
    found, expected = Cohort(bare, form="voxels")(u, **m, steps=5), Cohort(whole)(u, **m, steps=5)
    assert float((found - expected).norm()) < 1e-12 * float(expected.norm())


def test_the_rows_of_a_device_check_their_numbers() -> None:
    checks = batch.graphics("cpu", 12.0, 12.0, 2, (False,))
    assert len(checks) == 5 and all(check.holds is not False for check in checks)
    (agreement,) = (check for check in checks if "single precision" in check.what)
    assert 0 < float(agreement.value) < 1e-5
