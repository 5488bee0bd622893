"""Butcher tableaux: what is rejected, the order conditions, symplectic partners, contractivity, stability."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from solvers.errors import GliodeError
from solvers.ode.integrate import integrate
from solvers.ode.tableau import Tableau
from solvers.ode.tableaux import TABLEAUX, chebyshev, real_interval, tableau

ORDERS = {
    "euler": 1,
    "heun": 2,
    "kutta3": 3,
    "kutta4": 4,
    "ssp3": 3,
    "dormand_prince": 5,
    "midpoint": 2,
    "gauss2": 4,
    "radau5": 5,
    "lobatto_iiia": 4,
    "lobatto_iiib": 4,
    "lobatto": 4,
    "stoermer_verlet": 2,
    "chebyshev3": 2,
    "chebyshev7": 2,
}
WITH_PARTNER = [name for name, t in TABLEAUX.items() if not t.partitioned and (t.b != 0).all()]


def test_every_named_scheme_is_in_the_table_of_orders() -> None:
    assert set(TABLEAUX) == {name for name in ORDERS if not name.startswith("chebyshev")}


@pytest.mark.parametrize("name", ORDERS)
def test_the_order_conditions_give_the_known_order(name: str) -> None:
    scheme = tableau(name)
    assert scheme.order == min(ORDERS[name], 4)
    fails = [p for p, residual in scheme.conditions.items() if residual > 1e-10]
    assert fails == list(range(ORDERS[name] + 1, 5))
    assert f"order {scheme.order}: holds" in scheme.report()
    if fails:
        assert f"order {fails[0]}: fails" in scheme.report()


def test_the_conditions_are_those_of_the_textbook() -> None:
    """The eight conditions up to order 4 (Hairer, Norsett, Wanner 1993, table II.2.1), random numbers."""
    rng = np.random.default_rng(3)
    A, b = rng.normal(size=(4, 4)), rng.normal(size=4)
    b /= b.sum()
    c = A.sum(1)
    written_out = {
        1: [b.sum() - 1],
        2: [b @ c - 1 / 2],
        3: [b @ c**2 - 1 / 3, b @ A @ c - 1 / 6],
        4: [b @ c**3 - 1 / 4, (b * c) @ A @ c - 1 / 8, b @ A @ c**2 - 1 / 12, b @ A @ A @ c - 1 / 24],
    }
    for order, residual in Tableau("random", A, b).conditions.items():
        np.testing.assert_allclose(residual, np.abs(written_out[order]).max(), atol=1e-13)


def test_the_embedded_weights_are_of_a_lower_order() -> None:
    for name, order in (("dormand_prince", 4), ("heun", 1), ("radau5", 2)):
        scheme = TABLEAUX[name]
        assert scheme.b_embedded is not None
        assert Tableau("embedded", scheme.A, scheme.b_embedded, scheme.c).order == order


def exp_sin(t: Any, x: Tensor) -> Tensor:
    """y_1 = exp(sin t^2), y_2 = exp(cos t^2): nonlinear, coupled, and t enters."""
    y, z = x.unbind(-1)
    return torch.stack([2 * t * y * torch.log(z), -2 * t * z * torch.log(y)], -1)


def kepler(t: Any, x: Tensor) -> Tensor:
    q, p = x.chunk(2, -1)
    return torch.cat([p, -q / q.norm(dim=-1, keepdim=True) ** 3], -1)


@pytest.mark.parametrize("name", ORDERS)
def test_the_error_falls_with_the_order(name: str) -> None:
    if name == "stoermer_verlet":  # for q' = f(p), p' = g(q): an orbit of eccentricity 0.2 closes after 2 pi
        f, x0, T = kepler, torch.tensor([0.8, 0.0, 0.0, math.sqrt(1.5)], dtype=torch.float64), 2 * math.pi
        exact, counts = x0, [200, 400]
    else:
        f, x0, T = (
            exp_sin,
            torch.tensor([1.0, math.e], dtype=torch.float64),
            1.5 if ORDERS[name] == 5 else 1.0,
        )
        exact = torch.tensor([math.exp(math.sin(T**2)), math.exp(math.cos(T**2))], dtype=torch.float64)
        first = {1: 256, 2: 64, 3: 32, 4: 16, 5: 64}[ORDERS[name]]
        counts = [first, 2 * first]
    with torch.no_grad():
        errors = [
            float((integrate(f, x0, torch.linspace(0, T, n + 1, dtype=torch.float64), name) - exact).norm())
            for n in counts
        ]
    assert 1e-12 < errors[1] < errors[0]
    assert abs(math.log2(errors[0] / errors[1]) - ORDERS[name]) < 0.2


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("A", {"A": [[0, 0], [1]]}),
        ("A", {"A": [[0, 0, 0], [1, 0, 0]]}),
        ("A", {"A": [[0, 0], [math.nan, 0]]}),
        ("b ", {"b": []}),
        ("b sums", {"b": [1 / 2, 1 / 3]}),
        ("b must", {"b": [1, math.inf]}),
        ("c is", {"c": [0, 1 / 2]}),
        ("c must", {"c": [0, 1, 1]}),
        ("b_embedded", {"b_embedded": [1, 1]}),
        ("b_embedded", {"b_embedded": [1]}),
        ("A_p and b_p", {"A_p": [[0, 0], [1, 0]]}),
        ("A_p and b_p", {"b_p": [1 / 2, 1 / 2]}),
        ("b_p", {"A_p": [[0, 0], [1, 0]], "b_p": [1, 1]}),
        ("A_p", {"A_p": [[0, 0]], "b_p": [0, 1]}),
    ],
)
def test_a_bad_tableau_is_rejected_by_the_name_of_its_key(key: str, change: dict[str, Any]) -> None:
    good: dict[str, Any] = {"A": [[0, 0], [1, 0]], "b": [1 / 2, 1 / 2]}
    Tableau("good", **good)
    with pytest.raises(GliodeError, match=f"tableau mine: .*{key}"):
        Tableau("mine", **good | change)


def test_unknown_schemes_are_refused_with_those_there_are() -> None:
    with pytest.raises(GliodeError, match=r"'rk4' is not one of euler, .*chebyshevN"):
        tableau("rk4")
    with pytest.raises(GliodeError, match="2 stages or more"):
        tableau("chebyshev1")
    with pytest.raises(GliodeError, match="damping"):
        chebyshev(3, -1.0)
    assert tableau("chebyshev4").stages == 4 and tableau(TABLEAUX["heun"]) is TABLEAUX["heun"]


def test_coefficients_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        TABLEAUX["heun"].A[0, 0] = 1.0


@pytest.mark.parametrize("name", WITH_PARTNER)
def test_the_partner_condition_holds_for_every_pair_of_stages(name: str) -> None:
    scheme = TABLEAUX[name]
    partner = scheme.partner()
    b, A, A_partner = scheme.b, scheme.A, partner.A
    np.testing.assert_array_equal(partner.b, b)
    for i, j in itertools.product(range(scheme.stages), repeat=2):
        assert abs(b[i] * A_partner[i, j] + b[j] * A[j, i] - b[i] * b[j]) < 1e-15
    np.testing.assert_allclose(partner.partner().A, A, atol=1e-15)
    assert partner.order >= min(scheme.order, 2)


def test_known_partners() -> None:
    """Lobatto IIIB is that of IIIA; Gauss schemes are their own: symplectic."""
    lobatto = TABLEAUX["lobatto_iiia"].partner()
    np.testing.assert_allclose(lobatto.A, TABLEAUX["lobatto_iiib"].A, atol=1e-15)
    for name in ("midpoint", "gauss2"):
        np.testing.assert_allclose(TABLEAUX[name].partner().A, TABLEAUX[name].A, atol=1e-15)
    # Explicit Euler's is implicit Euler's "backwards" form: p_n = p_(n+1) + h J^T p_(n+1), so a~ = 1.
    np.testing.assert_array_equal(TABLEAUX["euler"].partner().A, [[1.0]])


def test_no_partner_where_a_weight_vanishes_or_the_scheme_is_a_pair() -> None:
    with pytest.raises(GliodeError, match="b has a zero"):
        TABLEAUX["dormand_prince"].partner()
    with pytest.raises(GliodeError, match="one pair"):
        TABLEAUX["lobatto"].partner()


RADII = {
    "euler": 1.0,
    "heun": 1.0,
    "ssp3": 1.0,
    "kutta4": 1.0,
    "kutta3": 0.5,
    "midpoint": math.inf,
    "gauss2": math.inf,
    "radau5": math.inf,
}


@pytest.mark.parametrize("name", TABLEAUX)
def test_the_contractivity_radius(name: str) -> None:
    """The table of Dahlquist and Jeltsch; 0 where a weight is not positive; infinite for Gauss."""
    scheme = TABLEAUX[name]
    if name in RADII:
        assert scheme.contractivity_radius == pytest.approx(RADII[name], rel=1e-9)
        assert "no circle" not in scheme.report()
    elif scheme.partitioned or (scheme.b <= 0).any():
        assert scheme.contractivity_radius == 0.0 and "no circle contractivity" in scheme.report()
    else:
        assert name in ("lobatto_iiia", "lobatto_iiib") and scheme.contractivity_radius < math.inf


def growth(scheme: Tableau, z: Any) -> Any:
    """R(z) = 1 + z b^T (I - z A)^-1 1 of x' = lambda x, z = h lambda."""
    one, eye = np.ones(scheme.stages), np.eye(scheme.stages)
    return np.array([1 + w * scheme.b @ np.linalg.solve(eye - w * scheme.A, one) for w in np.atleast_1d(z)])


@pytest.mark.parametrize("name", ["euler", "heun", "ssp3", "kutta4", "kutta3"])
def test_the_disc_of_the_radius_is_stable(name: str) -> None:
    """x' = lambda x with h lambda on the circle through 0 and -2 r; for Euler it is the whole region."""
    scheme = TABLEAUX[name]
    circle = np.exp(1j * np.linspace(0, 2 * np.pi, 101)) - 1
    assert np.abs(growth(scheme, scheme.contractivity_radius * circle)).max() <= 1 + 1e-12
    if name == "euler":
        assert np.abs(growth(scheme, 1.01 * circle)).max() > 1.01


@pytest.mark.parametrize("name", ["euler", "heun", "ssp3", "kutta4", "kutta3", "midpoint"])
def test_a_contraction_stays_one_within_the_radius(name: str) -> None:
    """x' = -K^T relu(K x + b) has nu = 1 / ||K||^2: no pair of states moves apart for h <= 2 nu r."""
    K, b = torch.randn(12, 6, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    nu = 1 / float(torch.linalg.matrix_norm(K, 2)) ** 2
    x, y = (
        torch.randn(2, 2000, 6, dtype=torch.float64)
        * torch.logspace(-3, 1, 2000, dtype=torch.float64)[:, None]
    )

    def ratio(h: float) -> float:
        times = torch.tensor([0.0, h], dtype=torch.float64)
        with torch.no_grad():
            a, b_ = (integrate(lambda t, x: -torch.relu(x @ K.T + b) @ K, z, times, name) for z in (x, y))
        return float(((a - b_).norm(dim=-1) / (x - y).norm(dim=-1)).max())

    radius = TABLEAUX[name].contractivity_radius
    assert 0.5 < ratio(2 * nu * min(radius, 20.0)) <= 1 + 1e-12
    if radius < math.inf:
        assert ratio(10 * nu * radius) > 1.2


@pytest.mark.parametrize("stages", [2, 3, 5, 10, 20])
def test_chebyshev_is_stable_up_to_its_real_interval(stages: int) -> None:
    """One step of x' = lambda x, all lambda at once, against the interval's formula."""
    end = real_interval(stages)
    z = torch.linspace(0, -1.1 * end, 2001, dtype=torch.float64)
    with torch.no_grad():
        R = integrate(
            lambda t, x: z * x, torch.ones_like(z), torch.tensor([0.0, 1.0]).double(), chebyshev(stages)
        )
    assert R[z >= -end].abs().max() <= 1 + 1e-9
    assert abs(growth(chebyshev(stages), -1.5 * end)[0]) > 1.05  # and not far beyond
    assert R[z < -0.2 * end][:-400].abs().max() < 0.99  # damped within
    np.testing.assert_allclose(R.numpy(), growth(chebyshev(stages), z.numpy()), atol=1e-8)


def test_the_stability_interval_is_the_known_one() -> None:
    """Euler and Heun 2, Kutta 3 2.5127, Kutta 4 2.7853 (Hairer and Wanner II, table IV.2), Chebyshev's."""
    known = {"euler": 2.0, "heun": 2.0, "kutta3": 2.5127, "ssp3": 2.5127, "kutta4": 2.7853}
    for name, length in known.items():
        assert TABLEAUX[name].real_interval == pytest.approx(length, rel=2e-3)
    assert chebyshev(3).real_interval > real_interval(3)  # an estimate for many stages
    for stages in (10, 40):
        assert chebyshev(stages).real_interval == pytest.approx(real_interval(stages), rel=0.02)
