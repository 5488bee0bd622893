"""Exact solutions against what defines them: jump conditions, invariants, the equations themselves."""

from __future__ import annotations

import numpy as np
import pytest

from solvers.errors import GliodeError
from solvers.node.science import riemann
from solvers.node.science.laws import Euler, ShallowWater


def test_sods_tube_has_the_published_star_states() -> None:
    """p* = 0.30313, u* = 0.92745, rho* = 0.42632 and 0.26557 (Toro 2009, chapter 4)."""
    rho, u, p = riemann.euler(np.array([0.1, 0.25]), 0.2)
    np.testing.assert_allclose(p, 0.30313, atol=5e-6)
    np.testing.assert_allclose(u, 0.92745, atol=5e-6)
    np.testing.assert_allclose(rho, [0.42632, 0.26557], atol=5e-6)


@pytest.mark.parametrize("left", [(1.0, 0.0, 1000.0), (5.99924, 19.5975, 460.894)])
def test_shocks_of_a_gas_obey_rankine_and_hugoniot(left: tuple[float, float, float]) -> None:
    """f(u+) - f(u-) = s (u+ - u-) at every shock found in the profile."""
    law, gamma, right = Euler(), 1.4, (1.0, -2.0, 0.01)
    x = np.linspace(-4, 4, 400001)
    rho, u, p = riemann.euler(x, 0.1, left, right, gamma)
    jumps = np.flatnonzero(np.abs(np.diff(p)) > 1e-2 * np.ptp(p))
    assert len(jumps) >= 1
    for j in jumps:
        states = [law.state(rho[i], [u[i]], p[i], gamma) for i in (j, j + 1)]
        fluxes = [[row[0] for row in law.flux(state, gamma)] for state in states]
        speed = (x[j] + x[j + 1]) / 2 / 0.1
        change, across = np.diff(states, axis=0)[0], np.diff(fluxes, axis=0)[0]
        np.testing.assert_allclose(across, speed * change, rtol=1e-4, atol=1e-6 * np.abs(across).max())


def test_rarefactions_keep_entropy_and_the_riemann_invariant() -> None:
    gamma = 1.4
    rho, u, p = riemann.euler(np.linspace(-0.23, -0.02, 50), 0.2, gamma=gamma)
    np.testing.assert_allclose(p / rho**gamma, 1.0, rtol=1e-12)
    np.testing.assert_allclose(u + 2 * np.sqrt(gamma * p / rho) / (gamma - 1), 2 * np.sqrt(gamma) / 0.4)


def test_a_dam_break_obeys_its_jump_and_its_invariant() -> None:
    law, g = ShallowWater(), 9.81
    x = np.linspace(-5, 5, 200001)
    h, u = riemann.dam_break(x, 0.5, 3.0, 1.0, g)
    (bore,) = np.flatnonzero(np.abs(np.diff(h)) > 0.1)
    states = [[h[i], h[i] * u[i]] for i in (bore, bore + 1)]
    fluxes = [[row[0] for row in law.flux(state, g)] for state in states]
    across, change = np.diff(fluxes, axis=0)[0], np.diff(states, axis=0)[0]
    np.testing.assert_allclose(across, x[bore] / 0.5 * change, rtol=1e-4)
    fan = (h < 2.999) & (x < x[bore] - 0.01)
    np.testing.assert_allclose(u[fan] + 2 * np.sqrt(g * h[fan]), 2 * np.sqrt(3 * g), rtol=1e-10)


def test_a_wave_of_burgers_is_constant_on_its_characteristics() -> None:
    foot = np.linspace(0, 1, 50)
    start = 0.5 + 0.3 * np.sin(2 * np.pi * foot + 0.4)
    found = riemann.burgers_wave(foot + 1.2 * start * 0.3, 0.3, 0.5, 0.3, 0.4, 1.2)
    np.testing.assert_allclose(found, start, atol=1e-13)


def test_a_vortex_is_a_steady_flow_in_its_frame() -> None:
    """div(rho v) = 0 and the momentum balance by central differences, with no mean flow."""
    h, x, y = 1e-4, np.array([0.3, -0.7]), np.array([0.5, 0.2])

    def momentum_flux(x: np.ndarray, y: np.ndarray) -> list[list[np.ndarray]]:
        law = Euler(2)
        rho, u, v, p = riemann.vortex(x, y, 0.0, mean=(0.0, 0.0))
        return law.flux(law.state(rho, [u, v], p), 1.4)

    along = np.subtract(momentum_flux(x + h, y), momentum_flux(x - h, y))[:, 0]
    across = np.subtract(momentum_flux(x, y + h), momentum_flux(x, y - h))[:, 1]
    np.testing.assert_allclose((along + across) / (2 * h), 0.0, atol=1e-6)


def test_what_has_no_such_solution_is_refused() -> None:
    with pytest.raises(GliodeError, match="vacuum"):
        riemann.euler(0.0, 1.0, (1.0, -20.0, 0.4), (1.0, 20.0, 0.4))
    with pytest.raises(GliodeError, match="depths"):
        riemann.dam_break(0.0, 1.0, 1.0, 2.0)
    with pytest.raises(GliodeError, match="shock"):
        riemann.burgers_wave(0.0, 1.0, 0.5, 0.3)
