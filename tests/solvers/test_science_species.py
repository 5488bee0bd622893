"""Species: reactions against SciPy, balances, bounds, limits, and DOLFINx against torch alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from mpi4py import MPI
from scipy.integrate import solve_ivp
from torch import Tensor

from solvers.errors import GliodeError
from solvers.evolution import Evolution, Strang
from solvers.fem.diffusion import DiffusionStep
from solvers.fem.equations.species import on_domain
from solvers.fem.export import export, gathered, scattered
from solvers.fem.mesh import Domain, box, interval
from solvers.fem.operators import DiffusionOperator
from solvers.node.science.activated import Stepped, Unknown
from solvers.node.science.species import GoOrGrow, Necrosis, Reaction, Species, SpeciesField, on_tensors
from solvers.ode.integrate import integrate
from solvers.spaces import reduce

REACTIONS: dict[str, tuple[Reaction, dict[str, float]]] = {
    "constant rates": (GoOrGrow(), {"growth": 0.2, "invasive_growth": 0.05, "go": 0.15, "grow": 0.1}),
    "crowded": (GoOrGrow(0.4, 0.1), {"growth": 0.2, "invasive_growth": 0.0, "go": 0.3, "grow": 0.1}),
    "necrosis": (Necrosis(), {"growth": 0.4, "death": 0.3, "uptake": 2.0, "supply": 0.3}),
}
D = {2: torch.tensor([0.05, 0.4], dtype=torch.float64), 3: torch.tensor([0.1, 0.0, 2.0], dtype=torch.float64)}


def line(cells: int = 24) -> Domain:
    return interval(12.0, cells)


def start(domain: Domain, reaction: Reaction) -> Tensor:
    """A tumour at the left end."""
    p = domain.interpolate(lambda x: 0.6 * np.exp(-(x[:, 0] ** 2) / 8))
    return torch.stack([p, 0.1 * p, 1 - p][: len(reaction.species)])


def still(reaction: Reaction) -> Species:
    """Without diffusion."""
    return Species(reaction, lambda u, dt, w: u, lambda D: D, cells=1)


def written_out(name: str, u: np.ndarray) -> np.ndarray:
    """The reactions of docs/theory/species.md in NumPy, with the numbers of REACTIONS."""
    if name == "necrosis":
        p, n, c = u
        fed, dies = c / (c + 0.1), 1 / (1 + (c / 0.2) ** 4)
        grown, dead = 0.4 * fed * p * (1 - p - n), 0.3 * dies * p
        return np.stack([grown - dead, dead, 0.3 * (1 - c) * (1 - n) - 2.0 * fed * p])
    p, i = u
    n = p + i
    if name == "constant rates":
        switch = 0.15 * p - 0.1 * i
        return np.stack([0.2 * p * (1 - n) - switch, 0.05 * i * (1 - n) + switch])
    a = 1 / (1 + np.exp(-(n - 0.4) / 0.1))
    switch = 0.3 * a * p - 0.1 * (1 - a) * i
    return np.stack([0.2 * p * (1 - n) - switch, switch])


@pytest.mark.parametrize("name", REACTIONS)
def test_reactions_are_the_formulas(name: str) -> None:
    """On a grid of densities from 0 to beyond the capacity, and at one state worked out by hand."""
    reaction, rates = REACTIONS[name]
    values = [torch.tensor(rates[key], dtype=torch.float64) for key in reaction.parameters]
    levels = np.array([0.0, 0.03, 0.1, 0.2, 0.45, 0.8, 1.2])
    u = np.stack(np.meshgrid(*[levels] * len(reaction.species), indexing="ij")).reshape(
        len(reaction.species), -1
    )
    found = reaction.rates(torch.from_numpy(u), *values).numpy()
    np.testing.assert_allclose(found, written_out(name, u), rtol=1e-13, atol=1e-15)
    by_hand = {  # u, R(u)
        "constant rates": ([0.5, 0.3], [-0.025, 0.048]),
        "crowded": ([0.3, 0.1], [-0.004, 0.04]),  # n at the threshold: a = b = 1/2
        "necrosis": ([0.5, 0.1, 0.2], [-0.0216666666666667, 0.075, -0.450666666666667]),  # d = 1/2, h = 2/3
    }[name]
    one = reaction.rates(torch.tensor(by_hand[0], dtype=torch.float64)[:, None], *values)[:, 0]
    assert one.tolist() == pytest.approx(by_hand[1], rel=1e-12)


@pytest.mark.parametrize("name", REACTIONS)
def test_a_well_mixed_system_is_the_ode(name: str) -> None:
    """Against SciPy, by order 3 (where the rates do not ask for substeps: these are short already)."""
    reaction, rates = REACTIONS[name]
    u0 = torch.tensor([[0.3], [0.05], [0.9]], dtype=torch.float64)[: len(reaction.species)]
    values = [torch.tensor(rates[key], dtype=torch.float64) for key in reaction.parameters]

    def slope(t: float, y: np.ndarray) -> np.ndarray:
        return reaction.rates(torch.from_numpy(y)[:, None], *values)[:, 0].numpy()

    exact = solve_ivp(slope, (0, 20), u0[:, 0].numpy(), "DOP853", rtol=1e-12, atol=1e-14).y[:, -1]
    mobility, errors = torch.zeros(len(u0), dtype=torch.float64), []
    for steps in (40, 80):
        u = still(reaction).evolve(u0, 20.0, steps, mobility, **rates)
        errors.append(np.abs(u[:, 0].numpy() - exact).max())
    assert errors[1] < 1e-5
    assert errors[1] < 1e-6 if name == "necrosis" else math.log2(errors[0] / errors[1]) > 2.7


@dataclass(frozen=True)
class Ledger:
    """Necrosis, and a species that counts what has grown."""

    inner: Necrosis = field(default_factory=Necrosis)

    @property
    def species(self) -> tuple[str, ...]:
        return (*self.inner.species, "grown")

    @property
    def parameters(self) -> tuple[str, ...]:
        return self.inner.parameters

    def rates(self, u: Tensor, *parameters: Tensor) -> Tensor:
        found = self.inner.rates(u[..., :3, :], *parameters)
        return torch.cat([found, found[..., :1, :] + found[..., 1:2, :]], -2)

    def losses(self, *parameters: float) -> float:
        return self.inner.losses(*parameters)


@pytest.mark.parametrize("on", ["dolfinx", "torch"])
def test_balances_are_exact(on: str) -> None:
    """Switching keeps p + i; what dies becomes necrotic; what is there and was not has grown."""
    domain = box((6.0, 4.0, 4.0), (6, 4, 4))
    problem = export(domain, "box")

    def totals(reaction: Reaction, D: Tensor, **rates: float) -> list[float]:
        species = on_domain(domain, reaction) if on == "dolfinx" else on_tensors(problem, reaction)
        u = torch.cat([start(domain, reaction), torch.zeros(1, domain.n_owned, dtype=torch.float64)])
        u = u[: len(reaction.species)]
        if on == "torch":
            u = torch.stack([gathered(domain.V, one) for one in u])
        mass = domain.mass if on == "dolfinx" else problem.mass
        assert isinstance(mass, Tensor)
        before, after = u @ mass, species.evolve(u, 10.0, 10, D, **rates) @ mass
        assert float((after - before).abs().max()) > 0.1
        return (after - before).tolist()

    p, i = totals(GoOrGrow(0.4), D[2], growth=0.0, invasive_growth=0.0, go=0.3, grow=0.2)
    assert p + i == pytest.approx(0, abs=1e-6 * abs(p))
    p, n, _ = totals(Necrosis(), D[3], growth=0.0, death=0.4, uptake=2.0, supply=0.0)
    assert p + n == pytest.approx(0, abs=1e-6 * abs(p))
    mobility = torch.tensor([0.1, 0.0, 2.0, 0.0], dtype=torch.float64)
    p, n, _, grown = totals(Ledger(), mobility, growth=0.5, death=0.3, uptake=2.0, supply=0.3)
    assert p + n == pytest.approx(grown, rel=1e-6)


@pytest.mark.parametrize("name", REACTIONS)
def test_bounds_are_kept_from_an_indicator_by_long_steps_and_fast_rates(name: str) -> None:
    """No density is negative, no nutrient above the blood's (p + n may pass 1: p moves into a full core)."""
    reaction, rates = REACTIONS[name]
    domain = box((8.0, 3.0, 3.0), (8, 3, 3))
    seed = domain.interpolate(lambda x: x[:, 0] < 2.5)
    u = torch.stack([seed, 0 * seed, 1 - seed][: len(reaction.species)])
    species, fast = on_domain(domain, reaction), {key: 10 * value for key, value in rates.items()}
    for _ in range(8):
        u = species.step(u, 4.0, 3 * D[len(u)], **fast)
        assert float(u.min()) >= -1e-7 and float(u[-1].max()) <= 1 + 1e-7


def test_equal_phenotypes_are_fisher_s_equation() -> None:
    """p + i with equal D and growth, however they switch, beside the exact logistic flow."""
    domain, rho = line(), 0.2
    u = on_domain(domain, GoOrGrow(0.3)).evolve(
        start(domain, GoOrGrow()),
        20.0,
        80,
        torch.tensor([0.3, 0.3], dtype=torch.float64),
        growth=rho,
        invasive_growth=rho,
        go=0.5,
        grow=0.2,
    )

    def logistic(u: Tensor, dt: Tensor) -> Tensor:
        return u * torch.exp(rho * dt) / (1 + u * torch.expm1(rho * dt))

    operator = DiffusionOperator(domain)
    w = operator.conductances(torch.full((domain.n_cells,), 0.3, dtype=torch.float64))
    fisher = Evolution(Strang(logistic, DiffusionStep(operator, "sdirk2")))
    n = fisher(start(domain, GoOrGrow()).sum(0), 20.0, 80, w)
    assert float((u.sum(0) - n).abs().max()) < 1e-5
    assert float(u.sum(0).max()) > 0.9 and float(u[1].max()) > 0.3


@pytest.mark.parametrize("name", ["crowded", "necrosis"])
def test_splitting_approaches_the_unsplit_system_by_order_two(name: str) -> None:
    """`SpeciesField` by a stabilised explicit scheme with short steps is another path to the end."""
    reaction, rates = REACTIONS[name]
    domain = line()
    problem, u0, mobility = export(domain, "line"), start(domain, reaction), D[len(reaction.species)]
    slope = SpeciesField(problem, reaction)
    given = {key: torch.tensor(value, dtype=torch.float64) for key, value in rates.items()}
    x0 = torch.stack([gathered(domain.V, one) for one in u0])
    times = torch.linspace(0, 6, 121, dtype=torch.float64)
    end = integrate(lambda t, x: slope(t, x, mobility, **given), x0, times, "chebyshev6")
    exact = torch.stack([scattered(domain.V, one) for one in end])
    species, errors = on_domain(domain, reaction), []
    for steps in (24, 48):
        errors.append(float((species.evolve(u0, 6.0, steps, mobility, **rates) - exact).abs().max()))
    assert errors[1] < 1e-3 and math.log2(errors[0] / errors[1]) > 1.7


@pytest.mark.parametrize("name", REACTIONS)
def test_the_field_of_a_batch_is_that_of_its_members(name: str) -> None:
    """One D or one each, and a rate each."""
    reaction, rates = REACTIONS[name]
    domain, count = line(10), len(reaction.species)
    slope, one = SpeciesField(export(domain, "line"), reaction), start(line(10), reaction)
    u = torch.stack([one, 0.7 * one, one.flip(-1)])
    growth = rates["growth"] * torch.tensor([[1.0], [0.5], [2.0]], dtype=torch.float64)
    given = {key: torch.tensor(value, dtype=torch.float64) for key, value in rates.items()}
    zero = torch.zeros((), dtype=torch.float64)
    for mobility in (D[count], torch.stack([D[count], 2 * D[count], D[count].flip(0)])):
        found = slope(zero, u, mobility, **(given | {"growth": growth}))
        for k in range(3):
            single = mobility if mobility.ndim == 1 else mobility[k]
            alone = slope(zero, u[k], single, **(given | {"growth": growth[k, 0]}))
            torch.testing.assert_close(found[k], alone, rtol=0, atol=1e-14)


@pytest.mark.mpi
def test_what_is_negative_on_one_rank_is_refused_on_all() -> None:
    domain, reaction = box((6.0, 4.0, 4.0), (6, 4, 4)), GoOrGrow()
    species, u, first = on_domain(domain, reaction), start(domain, GoOrGrow()), MPI.COMM_WORLD.rank == 0
    mobility, rates = torch.ones(2, domain.n_cells, dtype=torch.float64), REACTIONS["constant rates"][1]
    wrong = mobility.clone()
    wrong[1, 3] = -1.0
    with pytest.raises(GliodeError, match="densities are not negative"):
        species.step(u - 1.0 if first else u, 1.0, mobility, **rates)
    with pytest.raises(GliodeError, match=r"D: .* must be finite, not negative"):
        species.step(u, 1.0, wrong if first else mobility, **rates)


@pytest.mark.parametrize("name", REACTIONS)
def test_dolfinx_and_torch_agree_for_a_batch(name: str) -> None:
    """Two tumours with different D and growth at once: states to 1e-8, gradients to 1e-6."""
    reaction, rates = REACTIONS[name]
    domain = box((6.0, 4.0, 4.0), (6, 4, 4))
    u0, mobility = start(domain, reaction), D[len(reaction.species)]
    one, many = on_domain(domain, reaction), on_tensors(export(domain, "box"), reaction)
    scales = torch.tensor([1.0, 1.3], dtype=torch.float64)

    def apart(scale: Tensor) -> Tensor:
        return one.evolve(u0, 6.0, 6, scale * mobility, **(rates | {"growth": scale * rates["growth"]}))

    def together(scales: Tensor) -> Tensor:
        x = torch.stack([gathered(domain.V, one) for one in u0]).expand(2, *u0.shape)
        growth = scales[:, None] * rates["growth"]
        return many.evolve(
            x, 6.0, 6, scales[:, None, None] * mobility[:, None], **(rates | {"growth": growth})
        )

    x = together(scales.requires_grad_())
    for k in range(2):
        u = apart(scales[k])
        there = torch.stack([scattered(domain.V, each) for each in x[k].detach()])
        assert float((there - u.detach()).abs().max()) < 1e-8
        by_one = torch.autograd.grad((u**2).sum(), scales)[0][k]
        by_many = torch.autograd.grad((x[k] ** 2).sum(), scales, retain_graph=True)[0][k]
        assert float(by_many) == pytest.approx(float(by_one), rel=1e-6)


def test_gradients_agree_with_differences() -> None:
    """By the rates and the mobilities, through `Stepped`, as it is trained."""
    reaction, rates = REACTIONS["necrosis"]
    domain = line(12)
    species, u0 = on_domain(domain, reaction), start(domain, REACTIONS["necrosis"][0])
    unknowns = {key: Unknown(value, positive=True) for key, value in rates.items()}
    network = Stepped(species.step, {"D": Unknown(D[3] + 0.01, positive=True), **unknowns}, 4.0, 4)
    (network(u0) ** 2).sum().backward()
    for parameter in network.parameters():
        for place in np.ndindex(*parameter.shape):
            h, values = 1e-5, []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter[place] += sign * h
                    values.append(float((network(u0) ** 2).sum()))
                    parameter[place] -= sign * h
            assert parameter.grad is not None
            difference = (values[0] - values[1]) / (2 * h)
            assert difference == pytest.approx(float(parameter.grad[place]), rel=1e-5, abs=1e-7)


@pytest.mark.mpi
def test_ranks_take_the_steps_of_one_process() -> None:
    """Totals, and their derivatives by replicated numbers."""
    reaction, rates = REACTIONS["necrosis"]
    found = []
    for comm in (MPI.COMM_WORLD, MPI.COMM_SELF):
        domain = box((6.0, 4.0, 4.0), (6, 4, 4), comm)
        m = torch.tensor([0.1, 0.4], dtype=torch.float64, requires_grad=True)
        mobility = torch.stack([m[0], 0 * m[0], 2 + 0 * m[0]])
        u = on_domain(domain, reaction).evolve(
            start(domain, reaction), 6.0, 6, mobility, **(rates | {"growth": m[1]})
        )
        total = reduce((u**2 * domain.mass).sum(), domain.comm if domain.comm.size > 1 else None)
        (gradient,) = torch.autograd.grad(total, m)
        found.append([float(total), *gradient.tolist()])
    assert found[0] == pytest.approx(found[1], rel=1e-7)


def test_wrong_input_is_refused() -> None:
    species, u = still(GoOrGrow()), torch.ones(2, 5, dtype=torch.float64) / 4
    rates = REACTIONS["constant rates"][1]
    for state, mobility, given, said in (
        (u[0], D[2], rates, "expected \\(..., 2, n\\) for proliferative, invasive"),
        (-u, D[2], rates, "densities are not negative"),
        (u, D[3], rates, "D: shape"),
        (u, -D[2], rates, "D: .* must be finite, not negative"),
        (u, D[2], rates | {"go": -0.1}, "go: .* must be finite, not negative"),
        (u, D[2], rates | {"go": math.nan}, "go: .* must be finite"),
        (u, D[2], {"growth": 1.0}, "rates: .* expected"),
    ):
        with pytest.raises(GliodeError, match=said):
            species.evolve(state, 1.0, 1, mobility, **given)
    with pytest.raises(GliodeError, match=r"threshold: 1\.5"):
        GoOrGrow(1.5)
    with pytest.raises(GliodeError, match="width: 0"):
        GoOrGrow(0.5, 0.0)
    with pytest.raises(GliodeError, match="levels of the nutrient"):
        Necrosis(half=-0.1)
