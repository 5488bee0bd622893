"""What the ODE rows and the study `science` compute with, against closed forms and other ways."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from inverse.problem import LeastSquares
from scripts.benchmarks import _science_rivals as rivals
from scripts.benchmarks import science
from scripts.benchmarks.equation_rows import odes
from solvers.node.science.activated import ScienceActivated, Unknown
from solvers.node.science.systems import SYSTEMS


def test_the_jacobian_of_copies_is_that_of_one_tangent_after_the_other() -> None:
    case = odes.uniform(SYSTEMS["kuznetsov"], 12, 4, (0, 1))
    unknowns = {
        "rho": Unknown(1.0, positive=True),
        "alpha": Unknown(1.6, "linear", 3, SYSTEMS["kuznetsov"].duration),
    }
    field = ScienceActivated(SYSTEMS["kuznetsov"].field, unknowns)
    data = torch.rand(3, 2, dtype=torch.float64)
    problem, own = case.problem(field, data, 0.1 + torch.rand_like(data))
    m = own.pack() + 0.05 * torch.randn(4, dtype=torch.float64)
    J = problem.jacobian(m)
    torch.testing.assert_close(J, LeastSquares.jacobian(problem, m), rtol=1e-10, atol=1e-12)
    step = 1e-6 * torch.eye(4, dtype=torch.float64)
    with torch.no_grad():
        moved = [(problem.on_tape(m + s) - problem.on_tape(m - s)) / 2e-6 for s in step]
    torch.testing.assert_close(J, torch.stack(moved, 1), rtol=1e-6, atol=1e-6)


def test_the_closed_form_of_two_compartments_is_the_matrix_exponential() -> None:
    a, e, o, b = SYSTEMS["pharmacokinetics"].parameters.values()
    A = np.array([[-a, 0, 0], [a, -e - o, b], [0, o, -b]])
    times = torch.tensor([0.0, 0.3, 2.0, 20.0], dtype=torch.float64)
    exact = [expm(A * float(t)) @ [100, 0, 0] for t in times]
    found = odes.bateman(SYSTEMS["pharmacokinetics"], times)
    np.testing.assert_allclose(found.numpy(), exact, rtol=1e-11, atol=1e-11)


def test_solutions_of_the_contests_solve_their_equations() -> None:
    t = torch.linspace(0.1, 7, 9, dtype=torch.float64, requires_grad=True)
    (rate,) = torch.autograd.grad(rivals.grown(t).sum(), t)
    torch.testing.assert_close(rate, rivals.logistic(0.0, rivals.grown(t)), rtol=1e-12, atol=0)
    z = torch.rand(20, 2, dtype=torch.float64)

    def poisson(z: torch.Tensor) -> torch.Tensor:
        return rivals.poisson_exact(z[None])[0]

    laplace = torch.stack([torch.func.hessian(poisson)(row).trace() for row in z])
    torch.testing.assert_close(-laplace, rivals.poisson_load(z), rtol=1e-10, atol=1e-10)

    def heat(z: torch.Tensor) -> torch.Tensor:
        return rivals.heat_exact(z[0], z[1])

    for row in z:
        slope, bend = torch.func.jacrev(heat)(row), torch.func.hessian(heat)(row)
        assert float(slope[0]) == pytest.approx(rivals.CONDUCTIVITY * float(bend[1, 1]), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(rivals.heat_exact(0.0, z[:, 1]), rivals.heat_start(z[:, 1]))


def test_our_solvers_of_the_contests_converge() -> None:
    assert rivals.logistic_ours(160)["error"] < 1e-6
    errors = [rivals.heat_ours(cells, cells)["error"] for cells in (16, 32)]
    assert errors[1] < 1e-3 and math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)
    errors = [rivals.poisson_ours(cells)["error"] for cells in (16, 32)]
    assert errors[1] < 5e-3 and math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.2)


def test_a_control_is_recovered_within_its_prediction() -> None:
    depth = science.Depth(5)
    bias = depth.found(0.0, 0)
    noisy = depth.found(0.01, 1)
    assert depth.error(bias) < depth.predicted(bias, 0.01) < 1.2 * depth.error(bias)
    assert depth.error(noisy) < 2 * depth.predicted(bias, 0.01)
    at_knots = science.control(torch.linspace(0, science.DURATION, 5, dtype=torch.float64))
    assert depth.error(bias) < 1.05 * depth.error(at_knots)  # a best fit, not worse than interpolation
