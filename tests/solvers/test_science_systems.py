"""ODE systems: against SciPy, closed forms, conserved quantities, equilibria and published values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from scipy.optimize import brentq, root
from torch import Tensor

from inverse.optimizers import gauss_newton
from inverse.problem import LeastSquares
from solvers.errors import GliodeError
from solvers.node.models import Node
from solvers.node.science.activated import ScienceActivated, Unknown
from solvers.node.science.systems import SYSTEMS
from solvers.node.weights import Parameters
from solvers.ode.adaptive import adaptive_grid
from solvers.ode.integrate import integrate

# The equations once more, as their sources number and name them.
BY_HAND: dict[str, Callable[..., list[float]]] = {
    "lotka_volterra": lambda u, v, a, b, c, d: [u * (a - b * v), v * (d * u - c)],
    "sir": lambda s, i, r, b, g: [-b * s * i, (b * s - g) * i, g * i],
    "lorenz": lambda x, y, z, s, r, b: [s * (y - x), r * x - y - x * z, x * y - b * z],
    "kuznetsov": lambda e, t, s, p, g, m, d, a, b: [
        s + e * (p * t / (g + t) - m * t - d),
        t * (a - a * b * t - e),
    ],
    "robertson": lambda a, b, c, k, l, m: [-k * a + m * b * c, k * a - m * b * c - l * b * b, l * b * b],
    "van_der_pol": lambda q, p, mu: [p, mu * mu * (1 - q * q) * p - mu * mu * q],
}
GENTLE = ("lotka_volterra", "sir", "lorenz", "kuznetsov")


def solved(name: str, count: int = 2, **parameters: Tensor | float) -> Tensor:
    """At `count` equal times of the system's duration, by kutta4 at steps that leave about 1e-9."""
    system = SYSTEMS[name]
    times = torch.linspace(0, system.duration, 2000 + 1, dtype=torch.float64)
    with torch.no_grad():
        states = integrate(
            lambda t, x: system.field(t, x, **parameters), system.x0, times, "kutta4", trajectory=True
        )
    return states[:: 2000 // (count - 1)]


@pytest.mark.parametrize("name", BY_HAND)
def test_the_right_hand_side_is_the_equation(name: str) -> None:
    system = SYSTEMS[name]
    x = system.x0 + torch.rand(5, len(system.start), dtype=torch.float64)
    found = system.field(0.0, x)
    expected = [BY_HAND[name](*row, *system.parameters.values()) for row in x.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", GENTLE)
def test_solutions_are_scipys(name: str) -> None:
    system = SYSTEMS[name]
    exact = solve_ivp(
        lambda t, x: BY_HAND[name](*x, *system.parameters.values()),
        (0, system.duration),
        system.start,
        "DOP853",
        rtol=1e-12,
        atol=1e-13,
    ).y[:, -1]
    np.testing.assert_allclose(solved(name)[-1].numpy(), exact, rtol=1e-7)


@pytest.mark.parametrize("name", [*BY_HAND, "pharmacokinetics"])
def test_a_batch_with_parameters_of_its_own_is_each_alone(name: str) -> None:
    system = SYSTEMS[name]
    x = system.x0 + torch.rand(3, len(system.start), dtype=torch.float64)
    values = {
        key: value * (0.5 + torch.rand(3, 1, dtype=torch.float64)) for key, value in system.parameters.items()
    }
    together = system.field(0.0, x, **values)
    assert together.shape == x.shape
    for k in range(3):
        alone = system.field(0.0, x[k], **{key: value[k, 0] for key, value in values.items()})
        torch.testing.assert_close(together[k], alone, rtol=1e-15, atol=0)
    assert float((together - system.field(0.0, x)).abs().max()) > 1e-3  # the defaults are others


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_component_and_parameter_has_its_unit(name: str) -> None:
    system = SYSTEMS[name]
    assert list(system.units) == list(system.parameters) and len(system.states) == len(system.start)
    with pytest.raises(GliodeError, match=f"{name}: a state has {len(system.start)} components"):
        system.field(0.0, torch.zeros(2, 5, dtype=torch.float64))


def test_what_is_conserved() -> None:
    prey, predators = solved("lotka_volterra", 11).unbind(-1)
    orbit = prey - prey.log() + 4 / 3 * predators - 2 / 3 * predators.log()
    assert float(predators.max() - predators.min()) > 0.5
    torch.testing.assert_close(orbit, orbit[:1].expand(11), rtol=1e-9, atol=0)
    states = solved("sir", 11)
    S, infectious, _ = states.unbind(-1)
    torch.testing.assert_close(states.sum(-1), torch.ones(11, dtype=torch.float64), rtol=1e-12, atol=0)
    left = infectious + S - 0.25 * S.log()
    torch.testing.assert_close(left, left[:1].expand(11), rtol=1e-9, atol=0)


def test_an_epidemic_ends_at_its_final_size() -> None:
    """log(S / S_0) = -R_0 (1 - S) where I = 0 at last (Kermack and McKendrick)."""
    times = torch.linspace(0, 600, 1501, dtype=torch.float64)
    end = integrate(SYSTEMS["sir"].field, SYSTEMS["sir"].x0, times)
    final = brentq(lambda S: math.log(S / 0.999) + 4 * (1 - S), 1e-6, 0.9)
    assert float(end[0]) == pytest.approx(final, rel=1e-6)


def test_lorenz_equilibria_and_divergence() -> None:
    field, wing = SYSTEMS["lorenz"].field, math.sqrt(8 / 3 * 27)
    for centre in ([wing, wing, 27.0], [-wing, -wing, 27.0], [0.0, 0.0, 0.0]):
        assert float(field(0.0, torch.tensor(centre, dtype=torch.float64)).abs().max()) < 1e-13
    jacobian = torch.func.jacrev(lambda x: field(0.0, x))(SYSTEMS["lorenz"].x0)
    assert float(jacobian.trace()) == pytest.approx(-(10 + 1 + 8 / 3), rel=1e-14)


@pytest.mark.parametrize(
    ("published", "stable"),
    [((0.3155, 0.0), False), ((1.609, 8.19), True), ((0.760, 267.8), False), ((0.173, 447.1), True)],
)
def test_equilibria_of_the_tumour_and_the_immune_system(published: tuple[float, float], stable: bool) -> None:
    """Kuznetsov et al. 1994: no tumour, a dormant one, a saddle, a large one; stable by eigenvalues."""
    field = SYSTEMS["kuznetsov"].field

    def f(x: Any) -> Any:
        return field(0.0, torch.from_numpy(np.asarray(x, dtype=float))).numpy()

    found = root(f, published, tol=1e-12).x
    np.testing.assert_allclose(found, published, rtol=2e-3, atol=1e-9)
    jacobian = torch.func.jacrev(lambda x: field(0.0, x))(torch.from_numpy(found))
    assert bool((torch.linalg.eigvals(jacobian).real < 0).all()) == stable


def test_pharmacokinetics_is_the_exponential_of_its_matrix() -> None:
    a, e, o, b = SYSTEMS["pharmacokinetics"].parameters.values()
    A = np.array([[-a, 0, 0], [a, -e - o, b], [0, o, -b]])
    exact = [expm(A * t) @ [100, 0, 0] for t in np.linspace(0, 24, 9)]
    np.testing.assert_allclose(solved("pharmacokinetics", 9).numpy(), exact, rtol=1e-8, atol=1e-12)


def graded(first: float, last: float, count: int) -> Tensor:
    """0, then times that grow by a constant factor."""
    return torch.cat([torch.zeros(1), torch.logspace(math.log10(first), math.log10(last), count)]).double()


def test_robertson_after_40_seconds_and_after_3000_years() -> None:
    """SciPy's Radau; the test set of Mazzia and Magherini (2008) at t = 1e11 s, where two nearly vanish."""
    system = SYSTEMS["robertson"]
    k = system.parameters.values()
    exact = solve_ivp(
        lambda t, x: BY_HAND["robertson"](*x, *k), (0, 40), system.start, "Radau", rtol=1e-10, atol=1e-14
    )
    x = integrate(system.field, system.x0, graded(1e-5, 40.0, 25), "radau5")
    np.testing.assert_allclose(x.numpy(), exact.y[:, -1], rtol=2e-5)
    x = integrate(system.field, system.x0, graded(1e-5, 1e11, 60), "radau5")
    published = [0.2083340149701255e-07, 0.8333360770334713e-13, 0.9999999791665050]
    np.testing.assert_allclose(x.numpy(), published, rtol=1e-4)
    assert float(x.sum()) == pytest.approx(1, abs=1e-12)


def test_van_der_pol_with_adaptive_implicit_steps() -> None:
    """mu = 1000 through its first jump, in less than a hundred steps; explicit ones would be 10^6."""
    system = SYSTEMS["van_der_pol"]
    times = adaptive_grid(system.field, system.x0, 0.0, 0.9, "radau5", rtol=5e-2, atol=5e-4)
    assert len(times) < 100
    x = integrate(system.field, system.x0, times, "radau5")
    exact = solve_ivp(
        lambda t, x: BY_HAND["van_der_pol"](*x, 1000.0), (0, 0.9), system.start, "Radau", rtol=1e-8, atol=1e-9
    )
    assert exact.y[0, -1] < -1.9  # it has jumped
    np.testing.assert_allclose(x.numpy(), exact.y[:, -1], rtol=5e-3)


def test_radau5_forgets_what_is_infinitely_fast() -> None:
    """L-stability: one step of x' = -1e9 x leaves nothing; gauss2, which is not, leaves |x|."""
    x0, times = torch.ones(1, dtype=torch.float64), torch.tensor([0.0, 1.0], dtype=torch.float64)
    left = {name: float(integrate(lambda t, x: -1e9 * x, x0, times, name)) for name in ("radau5", "gauss2")}
    assert abs(left["radau5"]) < 1e-8 and left["gauss2"] == pytest.approx(1, abs=1e-6)


def test_rates_are_recovered_from_the_states_of_a_science_activated_network() -> None:
    system = SYSTEMS["sir"]
    node = Node(
        ScienceActivated(
            system.field, {"beta": Unknown(0.3, positive=True), "gamma": Unknown(0.2, positive=True)}
        ),
        80.0,
        40,
    )
    unknown = Parameters(node)

    def observe(m: Tensor) -> Tensor:
        given = (system.x0,)
        states: Tensor = torch.func.functional_call(
            node, dict(unknown.unpack(m)), given, {"trajectory": True}
        )
        return states[::4]

    truth = torch.tensor([0.4, 0.1], dtype=torch.float64)
    problem = LeastSquares(unknown.space, observe, observe(truth.log()), 0.01)
    found = gauss_newton.minimise(problem, unknown.pack())
    torch.testing.assert_close(found.m.exp(), truth, rtol=1e-5, atol=0)
