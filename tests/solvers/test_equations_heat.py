"""Heat in closed form against finite-element steps; what noise leaves of it against least squares."""

from __future__ import annotations

import math

import pytest
import torch

from solvers.errors import GliodeError
from solvers.evolution import Evolution
from solvers.fem.diffusion import DiffusionStep
from solvers.fem.equations.heat import Cosines
from solvers.fem.mesh import interval
from solvers.fem.operators import DiffusionOperator

AMPLITUDES = torch.tensor([1.0, 0.5, -0.4, 0.3], dtype=torch.float64)


def test_finite_elements_approach_the_cosines_by_order_two() -> None:
    errors = []
    for n in (20, 40):
        domain, exact = interval(10.0, n), Cosines(10.0, 0.2)
        x = torch.from_numpy(domain.points[:, 0])
        operator = DiffusionOperator(domain, rtol=1e-12)
        w = operator.conductances(torch.full((domain.n_cells,), 0.2, dtype=torch.float64))
        u = Evolution(DiffusionStep(operator, "sdirk2"))(exact.state(x, AMPLITUDES, 0.0), 5.0, n // 4, w)
        errors.append(float((u - exact.state(x, AMPLITUDES, 5.0)).abs().max()))
    assert math.log2(errors[0] / errors[1]) > 1.8 and errors[1] < 1e-3


def test_the_amplitudes_of_a_state_are_found_again() -> None:
    domain, exact = interval(10.0, 50), Cosines(10.0, 0.2)
    x = torch.from_numpy(domain.points[:, 0])
    found = exact.amplitudes(x, exact.state(x, AMPLITUDES, 0.0), domain.mass, 6)
    assert torch.allclose(found[:4], AMPLITUDES, atol=1e-12) and float(found[4:].abs().max()) < 1e-12


def test_the_errors_are_those_of_dense_least_squares() -> None:
    """The diagonal of sd^2 (A^T A)^-1, A from amplitudes at 0 to values at t, at evenly spread points."""
    exact, n, sd, t = Cosines(10.0, 0.2), 40, 0.02, 6.0
    x = (torch.arange(n, dtype=torch.float64) + 0.5) * (10.0 / n)
    A = (exact.decay(6, t)[:, None] * exact.modes(x, 6)).T
    covariance = sd**2 * torch.linalg.inv(A.T @ A)
    assert torch.allclose(exact.errors(6, t, sd, n), covariance.diagonal().sqrt(), rtol=1e-9)


def test_wrong_input_is_refused() -> None:
    for length, D in ((0.0, 1.0), (1.0, -1.0), (math.nan, 1.0)):
        with pytest.raises(GliodeError, match="must be positive"):
            Cosines(length, D)
