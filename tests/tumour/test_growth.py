"""Growth laws against SciPy's integrator, and what the laws keep."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp

from solvers.errors import GliodeError
from solvers.evolution import PointwiseStep
from tumour.growth import LAWS, GrowthLaw, allee, exponential, gompertz, logistic

CASES: dict[str, Callable[[], GrowthLaw]] = {
    **LAWS,
    "gompertz, other eps": lambda: gompertz(1e-2),
    "allee, other threshold": lambda: allee(0.3),
}
U = torch.tensor([0.0, 1e-8, 1e-3, 0.04, 0.05, 0.2, 0.5, 0.93, 1.0], dtype=torch.float64)


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


@pytest.fixture(params=CASES)
def law(request: pytest.FixtureRequest) -> GrowthLaw:
    return CASES[request.param]()


def reference(law: GrowthLaw, u: torch.Tensor, dt: float, rho: float) -> np.ndarray:
    def rate(_: float, u: np.ndarray) -> np.ndarray:
        return rho * law.rate(torch.from_numpy(u)).numpy()

    return solve_ivp(rate, (0, dt), u.numpy(), method="DOP853", rtol=1e-12, atol=1e-15).y[:, -1]


@pytest.mark.parametrize(("dt", "rho"), [(5.0, 0.012), (10.0, 0.05), (10.0, 0.1)])
def test_flow_solves_its_equation(law: GrowthLaw, dt: float, rho: float) -> None:
    found = law.flow(U, number(dt), number(rho))
    tolerance = 1e-11 if law.closed_form else 2e-4 * min(1.0, rho * dt)
    np.testing.assert_allclose(found, reference(law, U, dt, rho), rtol=tolerance, atol=1e-14)


def test_rates_are_those_of_the_formulas() -> None:
    u = U.numpy()
    np.testing.assert_allclose(exponential().rate(U), u)
    np.testing.assert_allclose(logistic().rate(U), u * (1 - u))
    np.testing.assert_allclose(gompertz(1e-3).rate(U), u * np.log(1.001 / (u + 1e-3)))
    np.testing.assert_allclose(allee(0.05).rate(U), u * (1 - u) * (u - 0.05))


def test_resolved_flows_are_of_order_four() -> None:
    for law in (gompertz(), allee()):
        u = number(0.1)
        exact = float(reference(law, u[None], 4.0, 0.25)[0])

        def error(steps: int, law: GrowthLaw = law, u: torch.Tensor = u, exact: float = exact) -> float:
            for _ in range(steps):
                u = law.flow(u, number(4.0 / steps), number(0.25))
            return abs(float(u) - exact)

        slopes = [np.log2(error(a) / error(b)) for a, b in itertools.pairwise((4, 8, 16))]
        assert slopes[-1] == pytest.approx(4.0, abs=0.3)


@pytest.mark.parametrize("rho_dt", [0.01, 0.5, 2.0, 10.0])
def test_bounds_fixed_points_and_order_are_kept(law: GrowthLaw, rho_dt: float) -> None:
    """0 stays 0 and 1 stays 1 (but for Malthus); larger densities stay larger; nothing leaves [0, 1]."""
    u = torch.linspace(0, 1, 501, dtype=torch.float64)
    found = law.flow(u, number(1.0), number(rho_dt))
    assert found[0] == 0.0
    assert (found.diff() > 0).all() or (law.name != "exponential" and (found.diff() >= 0).all())
    if law.name != "exponential":
        assert float(found.max()) <= 1.0 + 1e-15
        assert float(found[-1]) == pytest.approx(1.0, abs=1e-15)


def test_below_the_threshold_the_allee_law_dies_out() -> None:
    law = allee(0.05)
    u = torch.tensor([0.049, 0.05, 0.051], dtype=torch.float64)
    later = law.flow(u, number(10.0), number(0.1))
    assert later[0] < u[0] and later[1] == pytest.approx(0.05, abs=1e-15) and later[2] > u[2]


def test_no_time_no_growth(law: GrowthLaw) -> None:
    torch.testing.assert_close(law.flow(U, number(0.0), number(0.1)), U, rtol=0, atol=0)
    torch.testing.assert_close(law.flow(U, number(5.0), number(0.0)), U, rtol=0, atol=0)


def test_derivatives_in_all_modes(law: GrowthLaw) -> None:
    """By u, dt and rho, also at u = 0 and 1, once and twice, alone and as a step of an evolution."""
    u, dt, rho = U.clone(), number(6.0), number(0.07)
    step = PointwiseStep(law.flow, recompute=not law.closed_form)
    for flow in (law.flow, step):
        at = [x.clone().requires_grad_() for x in (u, dt, rho)]
        assert torch.autograd.gradcheck(flow, at, check_forward_ad=True, eps=1e-7, atol=1e-5)
        assert torch.autograd.gradgradcheck(flow, at, check_fwd_over_rev=True, eps=1e-7, atol=1e-4)


def test_parameters_out_of_range_are_refused() -> None:
    for bad in (0.0, 1.0, -1e-3):
        with pytest.raises(GliodeError, match=r"growth.eps: .* is not in \(0, 1\)"):
            gompertz(bad)
        with pytest.raises(GliodeError, match=r"growth.threshold: .* is not in \(0, 1\)"):
            allee(bad)
