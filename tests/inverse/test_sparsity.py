"""The L1 norm of a space: its value, and its prox against a search of each entry."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar

from inverse.regularizers.sparsity import Sparsity
from solvers.errors import GliodeError
from solvers.fem import mesh
from solvers.fem.spaces import lumped
from solvers.spaces import DepthSobolev, Diagonal, Euclidean, Product, Space

WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)
SPACES: list[Space] = [
    Euclidean(4, 2.0),
    Diagonal(WEIGHTS),
    Product({"a": Diagonal(WEIGHTS[:3]), "b": Euclidean(1, 0.5)}),
]


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("space", SPACES)
def test_the_prox_minimises_each_entry(space: Space, positive: bool) -> None:
    r, m, step = Sparsity(space, 0.6, positive), torch.tensor([-1.5, 0.2, 0.9, 2.0]).double(), 0.7
    mass = space.gram(torch.ones(4).double())
    found = r.prox(m, step)
    for k in range(4):
        lowest = minimize_scalar(
            lambda z, k=k: float(mass[k]) * (0.6 * abs(z) + (z - float(m[k])) ** 2 / (2 * step)),
            bounds=(0.0 if positive else -3.0, 3.0),
            method="bounded",
            options={"xatol": 1e-10},
        )
        assert float(found[k]) == pytest.approx(lowest.x, abs=1e-5)
    assert found[1] == 0.0


@pytest.mark.mpi
def test_the_value_is_the_integral() -> None:
    """int |x - 1/2| over the unit cube is 1/4; the mesh has its kink on a face."""
    where = mesh.box((1.0, 1.0, 1.0), (4, 2, 3))
    m = where.interpolate(lambda x: x[:, 0] - 0.5)
    assert float(Sparsity(lumped(where), 3.0)(m)) == pytest.approx(0.75)
    positive = Sparsity(lumped(where), 3.0, positive=True)
    assert math.isinf(float(positive(m)))  # on every rank, though not all hold a negative entry
    assert float(positive(m.abs())) == pytest.approx(0.75)


def test_with_positivity_it_is_linear_on_the_tape() -> None:
    leaf = torch.ones(4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(Sparsity(Diagonal(WEIGHTS), 0.3, positive=True)(leaf), leaf)
    torch.testing.assert_close(gradient, 0.3 * WEIGHTS)
    with pytest.raises(GliodeError, match="no derivative"):
        Sparsity(Diagonal(WEIGHTS))(leaf)


def test_bad_input_is_refused() -> None:
    with pytest.raises(GliodeError, match="weight"):
        Sparsity(Euclidean(2), 0.0)
    with pytest.raises(GliodeError, match="diagonal"):
        Sparsity(DepthSobolev(torch.tensor([0.0, 1.0]), (2,), 0.5))
    with pytest.raises(GliodeError, match="step"):
        Sparsity(Euclidean(2)).prox(torch.ones(2).double(), 0.0)
