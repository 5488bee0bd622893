"""Boxes: inside or not, and the projection."""

import math

import pytest
import torch
from scipy.optimize import lsq_linear

from inverse.regularizers.constraints import Box, Positivity
from solvers.errors import GliodeError
from solvers.spaces import DepthSobolev, Diagonal, Euclidean

WEIGHTS = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64)


def test_the_prox_is_the_nearest_point() -> None:
    """In the metric, by SciPy's bounded least squares; it is in the box and stays where it is."""
    lower, upper = torch.tensor([-1.0, 0.0, 0.5, -math.inf]).double(), 1.0
    box, m = Box(Diagonal(WEIGHTS), lower, upper), torch.tensor([-3.0, 0.4, 0.1, 9.0]).double()
    root = WEIGHTS.sqrt()
    expected = lsq_linear(
        torch.diag(root).numpy(), (root * m).numpy(), (lower.numpy(), upper), method="bvls"
    ).x
    found = box.prox(m, 0.3)
    assert found.tolist() == pytest.approx(expected.tolist())
    assert math.isinf(float(box(m))) and float(box(found)) == 0.0
    assert torch.equal(box.prox(found, 2.0), found)


def test_positivity_and_one_sided_boxes() -> None:
    m = torch.tensor([-1.0, 2.0]).double()
    assert Positivity(Euclidean(2)).prox(m).tolist() == [0.0, 2.0]
    assert Box(Euclidean(2), None, 1.0).prox(m).tolist() == [-1.0, 1.0]
    assert float(Positivity(Euclidean(2))(m.abs())) == 0.0


def test_bad_bounds_are_refused() -> None:
    with pytest.raises(GliodeError, match="above its upper"):
        Box(Euclidean(2), 1.0, 0.0)
    with pytest.raises(GliodeError, match="a number"):
        Box(Euclidean(2), float("nan"), 0.0)
    with pytest.raises(GliodeError, match="lower has shape"):
        Box(Euclidean(2), torch.zeros(3), 1.0)
    with pytest.raises(GliodeError, match="diagonal"):
        Positivity(DepthSobolev(torch.tensor([0.0, 1.0]), (2,), 0.5))
