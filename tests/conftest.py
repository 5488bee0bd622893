"""One thread and fixed seeds for every test; tests for hardware or a network that is absent are left out."""

import os

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):  # read when numpy and torch are first imported
    os.environ.setdefault(variable, "1")

import random
import sys

import numpy as np
import pytest
import torch


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002  (for libraries that draw from the global state)
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    absent = set()
    if not torch.cuda.is_available():
        absent.add("gpu")
    if "network" not in config.getoption("markexpr"):
        absent.add("network")
    left_out = [item for item in items if any(item.get_closest_marker(name) for name in absent)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


failed = pytest.StashKey[bool]()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    session.config.stash[failed] = exitstatus != 0


def pytest_unconfigure(config: pytest.Config) -> None:
    """End the other ranks too, which would wait for ever for the one that failed."""
    if config.stash.get(failed, False) and "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        if MPI.COMM_WORLD.size > 1:
            sys.stdout.flush()
            MPI.COMM_WORLD.Abort(1)
