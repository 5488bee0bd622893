"""PINN and deep Ritz fits against closed forms; batches; budgets; what a diverging run leaves."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inverse.collocation import Fit, Term, fit
from inverse.methods import Adam
from inverse.optimizers.iteration import NonFiniteError
from solvers.errors import GliodeError
from solvers.node.collocation import Field, Flow, scattered


class Decay(nn.Module):
    """u_t = -k u on [0, 2], u(0) = 1 built in, k unknown."""

    def __init__(self) -> None:
        super().__init__()
        self.u = Field("t", (0,), (2,), lift=torch.ones_like, start=True, width=8, layers=1, seed=0)
        self.k = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))


def equation(model: Decay, z: Tensor) -> Tensor:
    u = model.u.jets(z, ("t",))
    return u["t"] + model.k * u[""]


def misfit(model: Decay, z: Tensor) -> Tensor:
    return model.u(z[:, :1]) - z[:, 1:]


def terms(k: float = 0.7) -> list[Term]:
    t = torch.linspace(0.2, 2, 10, dtype=torch.float64)[:, None]
    seen = torch.cat([t, torch.exp(-k * t)], 1)
    return [Term(equation, scattered((0,), (2,), 40)), Term(misfit, seen, 10.0)]


def test_a_parameter_and_the_solution_are_found() -> None:
    model = Decay()
    found = fit(model, terms(), epochs=50, polish=200)
    assert float(model.k) == pytest.approx(0.7, rel=2e-3)
    t = torch.linspace(0, 2, 33, dtype=torch.float64)[:, None]
    torch.testing.assert_close(model.u(t), torch.exp(-0.7 * t), rtol=0, atol=1e-3)
    assert found.objective[0] > 100 * found.objective[-1]
    assert len(found.adam.history) == 50


def test_the_objective_is_the_weighted_sum_of_means() -> None:
    model, parts = Decay(), terms()
    with torch.no_grad():
        expected = sum(term.weight * term.of(model, term.points).square().mean() / 2 for term in parts)
    found = fit(model, parts, epochs=1, polish=1)
    assert found.objective[0] == pytest.approx(float(expected), rel=1e-12)


def test_batches_are_unbiased_and_fixed_by_the_seed() -> None:
    """The mean over the batches of an epoch at a fixed model is the objective of all points."""
    start: list[float] = []
    for batch in (None, 10):
        model = Decay()
        found = fit(model, terms(), adam=Adam(1e-12), epochs=1, polish=1, batch=batch)
        start.append(found.objective[0])
    assert start[1] == pytest.approx(start[0], rel=1e-9)
    ends = []
    for seed in (1, 1, 2):
        model = Decay()
        fit(model, terms(), epochs=2, polish=1, batch=10, seed=seed)
        ends.append(float(model.k))
    assert ends[0] == ends[1] != ends[2]


def test_deep_ritz_solves_poisson() -> None:
    """min int 1/2 u'^2 - f u on (0, 1), u = 0 at the ends: -u'' = f = pi^2 sin(pi x), u = sin(pi x)."""

    def zero_ends(z: Tensor) -> Tensor:
        return z * (1 - z)

    model = Field("x", (0,), (1,), factor=zero_ends, width=10, layers=1, seed=0)

    def density(model: Field, z: Tensor) -> Tensor:
        u = model.jets(z, ("x",))
        return u["x"] ** 2 / 2 - math.pi**2 * torch.sin(math.pi * z) * u[""]

    points = (torch.arange(100, dtype=torch.float64)[:, None] + 0.5) / 100
    found = fit(model, [Term(density, points, energy=True)], epochs=50, polish=150)
    torch.testing.assert_close(model(points), torch.sin(math.pi * points), rtol=0, atol=5e-3)
    assert found.objective[-1] == pytest.approx(-(math.pi**2) / 4, rel=1e-3)  # the energy of the solution


def test_the_flow_of_an_oscillator() -> None:
    """x' = (x_2, -x_1) as a flow N(t, x) of all states of a box, against the rotation."""
    model = Flow(1.0, (-1, -1), (1, 1), width=16, layers=1, seed=0)

    def residual(model: Flow, z: Tensor) -> Tensor:
        x, rate = model.rate(z[:, :1], z[:, 1:])
        return rate - torch.stack([x[:, 1], -x[:, 0]], 1)

    fit(model, [Term(residual, scattered((0, -1, -1), (1, 1, 1), 128))], epochs=50, polish=250)
    z = scattered((0, -1, -1), (1, 1, 1), 50, 9)
    t, (a, b) = z[:, 0], z[:, 1:].unbind(1)
    exact = torch.stack([a * t.cos() + b * t.sin(), b * t.cos() - a * t.sin()], 1)
    torch.testing.assert_close(model(z[:, :1], z[:, 1:]), exact, rtol=0, atol=2e-2)


def test_the_time_ends_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that ticks at each look, two of them in an epoch: Adam has 30 % of it, L-BFGS what is left."""
    import time

    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "process_time", lambda: float(next(ticks)))
    model = Decay()
    found: Fit = fit(model, terms(), epochs=10**6, polish=10**6, seconds=60, share=0.3)
    assert found.stopped_by == found.adam.stopped_by == "max_seconds"
    assert found.adam.history[-1]["seconds"] == len(found.adam.history) == pytest.approx(18, abs=1)
    assert found.polish.history[-1]["seconds"] == pytest.approx(60 - 2 * 18, abs=2)


def test_a_diverging_run_is_named_and_leaves_good_parameters() -> None:
    model = Decay()

    def explodes(model: Decay, z: Tensor) -> Tensor:
        return torch.where(model.k > 0.25, math.inf, 1.0) * equation(model, z)

    parts = [Term(explodes, scattered((0,), (2,), 10)), terms()[1]]
    with pytest.raises(NonFiniteError, match="fit"):
        fit(model, parts, adam=Adam(0.02), epochs=200, polish=1)
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())

    model, start = Decay(), float(Decay().k)
    with pytest.raises(GliodeError, match="rose"):
        fit(model, terms(), adam=Adam(50.0), epochs=3, polish=1)
    assert float(model.k) == start


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"seconds": -1.0}, "seconds"),
        ({"terms": []}, "no terms"),
        ({"terms": [Term(equation, torch.zeros(3, 1))]}, "dtype"),
        ({"terms": [Term(lambda model, z: model.k, torch.zeros(3, 1).double())]}, "a row for each"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    given = {"terms": terms(), **options}
    with pytest.raises(GliodeError, match=message):
        fit(Decay(), given.pop("terms"), **given)


def test_terms_check_their_points() -> None:
    with pytest.raises(GliodeError, match="rows"):
        Term(equation, torch.zeros(0, 1))
    with pytest.raises(GliodeError, match="finite"):
        Term(equation, torch.full((2, 1), math.nan))
    with pytest.raises(GliodeError, match="weight"):
        Term(equation, torch.zeros(2, 1), 0.0)
