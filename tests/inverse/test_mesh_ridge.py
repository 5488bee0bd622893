"""Learned mesh regularizers on paths and planes (no DOLFINx): closed forms, dense algebra, guarantees."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from scipy import sparse
from torch import Tensor

from inverse.problem import InverseProblem
from inverse.regularizers.learned.energy import Learned
from inverse.regularizers.learned.mesh import MeshRidge
from inverse.regularizers.learned.potentials import POTENTIALS
from inverse.trainers.bilevel import Bilevel, Term, lower_solver
from solvers.errors import GliodeError
from solvers.scales import Scales
from solvers.spaces import Diagonal

LENGTHS = (0.0, 4.0, 8.0)


def line(n: int, h: float, lengths: tuple[float, ...] = LENGTHS) -> Scales:
    """n points h mm apart, each standing for h mm."""
    D = sparse.diags_array([-np.ones(n - 1), np.ones(n - 1)], offsets=[0, 1], shape=(n - 1, n)) / h
    top = 4 / h**2 * math.cos(math.pi / (2 * n)) ** 2  # the largest eigenvalue
    even = torch.ones(n, dtype=torch.float64)
    return Scales(Diagonal(h * even), D, h * even[1:], top, lengths)


def plane(n: int = 7, h: float = 3.0) -> Scales:
    """n x n pixels of h mm with forward differences, zero across the far edges."""
    d = sparse.diags_array([-np.ones(n), np.ones(n - 1)], offsets=[0, 1]).tolil()
    d[n - 1, n - 1] = 0
    D = sparse.vstack([sparse.kron(d, sparse.eye_array(n)), sparse.kron(sparse.eye_array(n), d)]) / h
    area = torch.full((n * n,), h * h, dtype=torch.float64)
    return Scales(Diagonal(area), D, area, 8 / h**2, LENGTHS)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def everything(potential: str = "log_cosh", seed: int = 0) -> MeshRidge:
    """All kinds of channels, away from their start."""
    energy = MeshRidge(
        LENGTHS,
        slopes=[(1.0, 0.0, 0.3), (0.5, 4.0, 0.1)],
        values=[(0.4, 0.0, 0.5), (0.3, 8.0, 0.2)],
        potential=potential,
        uneven=True,
    ).double()
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in energy.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return energy


def test_it_starts_at_total_variation_h1_and_sparsity() -> None:
    """A ramp and a constant: Huber's functions of the slope and of the value, times the length."""
    operators, slope, n, h = line(21, 2.0), 0.05, 21, 2.0
    ramp = slope * h * torch.arange(n, dtype=torch.float64)[None]
    length = h * (n - 1)
    sharp = MeshRidge(LENGTHS, [(3.0, 0.0, 0.01)], potential="smooth_l1").on(operators)
    assert float(sharp(ramp).detach()) == pytest.approx(3 * (slope - 0.005) * length, rel=1e-6)
    blunt = MeshRidge(LENGTHS, [(3.0, 0.0, 5.0)], potential="smooth_l1").on(operators)
    assert float(blunt(ramp).detach()) == pytest.approx(3 * slope**2 / 10 * length, rel=1e-6)
    sparse_ = MeshRidge(LENGTHS, [], [(2.0, 8.0, 0.01)], potential="smooth_l1").on(operators)
    constant = torch.full((1, n), -0.7).double()
    assert float(sparse_(constant).detach()) == pytest.approx(2 * (0.7 - 0.005) * h * n, rel=1e-6)


@pytest.mark.parametrize("name", list(POTENTIALS))
def test_every_potential_starts_near_its_term(name: str) -> None:
    """The slope of psi reaches the weight somewhere and never exceeds it."""
    operators = line(5, 1.0)
    energy = MeshRidge(LENGTHS, [], [(2.0, 0.0, 0.1)], potential=name).on(operators)
    values = torch.linspace(0, 1, 101).double()[:, None].expand(-1, 5)
    steepest = float(energy.gradient(values).detach().max())
    assert steepest == pytest.approx(2.0, rel=0.01)


def test_a_cosine_costs_what_its_symbol_says() -> None:
    n, h, k = 24, 1.5, 3
    operators = line(n, h)
    wave = torch.from_numpy(np.cos(np.pi * k * (np.arange(n) + 0.5) / n))[None]
    t = 4 / h**2 * math.sin(math.pi * k / (2 * n)) ** 2
    f = [1 / (1 + length**2 * t) for length in LENGTHS]
    energy = MeshRidge(LENGTHS, [(1.0, 0.0, 100.0)], [(1.0, 4.0, 100.0)], "smooth_l1").on(operators)
    mix = torch.tensor([[0.3, -0.2, 0.5], [0.7, 0.1, -0.4]])  # of the bands: a value, then a slope
    energy.mix.data.copy_(mix)
    bands = np.array([f[0] - f[1], f[1] - f[2], f[2]])
    p, q = mix.numpy() @ bands
    square = float(h * wave.square().sum())
    expected = (p**2 + t * q**2) * square / 200
    assert float(energy(wave).detach()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", list(POTENTIALS))
def test_it_is_the_formula_in_dense_algebra(name: str) -> None:
    operators, energy = plane(), everything(name)
    m, n = noise(3, 49), operators.space.size
    D = operators._D.toarray()
    w = operators.space.weights.numpy()
    K = D.T @ np.diag(np.tile(operators.weights, 2)) @ D
    smooth = [np.linalg.inv(np.diag(w) + length**2 * K) @ np.diag(w) for length in LENGTHS]
    bands = [smooth[0] - smooth[1], smooth[1] - smooth[2], smooth[2]]
    mix, strength = energy.mix.detach().numpy(), energy.log_weight.detach().exp()
    edges = [0.5, 0.2, 0.3, 0.1]
    maps = [
        sum(a * B for a, B in zip(row, bands, strict=True)) / e for row, e in zip(mix, edges, strict=True)
    ]
    assert energy.shift is not None
    a = torch.stack([m @ torch.from_numpy(maps[c]).T - energy.shift.detach()[c] for c in (0, 1)], 1)
    q = torch.stack([(m @ torch.from_numpy(D @ maps[c]).T).reshape(3, 2, n).norm(dim=1) for c in (2, 3)], 1)
    costs = torch.cat([energy.of_values(a), energy.of_slopes(q)], 1) * strength[:, None] * w[0]
    torch.testing.assert_close(
        energy.on(operators)(m).detach(), costs.sum((1, 2)).detach(), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("name", list(POTENTIALS))
@pytest.mark.parametrize("frozen", [True, False])
def test_the_gradient_is_the_difference_quotient(name: str, frozen: bool) -> None:
    energy = everything(name).on(plane()).requires_grad_(not frozen)
    m, d = noise(2, 49).requires_grad_(), noise(2, 49, seed=1)
    (dual,) = torch.autograd.grad(energy(m).sum(), m, create_graph=True)
    torch.testing.assert_close(energy.gradient(m.detach()).detach(), dual.detach(), rtol=1e-10, atol=1e-12)
    step = 1e-6
    with torch.no_grad():
        change = (energy(m + step * d) - energy(m - step * d)) / (2 * step)
    torch.testing.assert_close(change, (dual * d).sum(1).detach(), rtol=1e-5, atol=1e-6)
    if name in ("log_cosh", "student"):  # smooth everywhere
        (action,) = torch.autograd.grad(dual, m, d)
        with torch.no_grad():
            change = (energy.gradient(m + step * d) - energy.gradient(m - step * d)) / (2 * step)
        torch.testing.assert_close(change, action, rtol=1e-5, atol=1e-6)


def test_the_slope_is_smooth_where_the_field_is_flat() -> None:
    energy = everything().on(plane())
    flat = torch.full((1, 49), 0.4).double().requires_grad_()
    (dual,) = torch.autograd.grad(energy(flat).sum(), flat, create_graph=True)
    (action,) = torch.autograd.grad(dual.sum(), flat)
    assert bool(torch.isfinite(dual).all()) and bool(torch.isfinite(action).all())


@pytest.mark.parametrize("name", ["log_cosh", "spline"])
def test_the_dual_differentiates_by_the_weights(name: str) -> None:
    """What bilevel training needs: d/dtheta <R'(m), v>."""
    energy, m, v = everything(name).on(plane()), noise(2, 49), noise(2, 49, seed=3)
    pairing = (energy.gradient(m) * v).sum()
    for p in energy.parameters():
        (found,) = torch.autograd.grad(pairing, p, retain_graph=True)
        along, step, values = noise(*p.shape, seed=5), 1e-6, []
        with torch.no_grad():
            for sign in (1, -2):
                p.add_(sign * step * along)
                values.append(float((energy.gradient(m) * v).sum()))
            p.add_(step * along)
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(
            float((found * along).sum()), rel=2e-5, abs=1e-7
        )


def hessian(energy: MeshRidge, m: Tensor) -> Tensor:
    """M^-1/2 R'' M^-1/2, dense."""
    leaf = m.clone().requires_grad_()
    dual = energy.gradient(leaf[None])[0]
    rows = [torch.autograd.grad(part, leaf, retain_graph=True)[0] for part in dual]
    root = energy.metric.weights.sqrt()
    return torch.stack(rows) / root / root[:, None]


def test_the_lipschitz_constant_is_sharp_where_r_is_quadratic() -> None:
    operators = line(40, 2.0)
    for seed in range(3):
        terms = [(1.0, 0.0, 1e3), (0.5, 4.0, 1e3)]
        energy = MeshRidge(LENGTHS, terms, terms, "smooth_l1").double().on(operators)
        energy.mix.data.copy_(noise(4, 3, seed=seed))
        top = float(torch.linalg.eigvalsh(hessian(energy, noise(40)))[-1])
        assert top <= energy.guarantee().lipschitz <= 1.02 * top


@pytest.mark.parametrize("name", list(POTENTIALS))
def test_the_guarantee_holds_between_any_two_fields(name: str) -> None:
    energy = everything(name).on(plane())
    said, space = energy.guarantee(), energy.metric
    assert said.convex == (name in ("smooth_l1", "log_cosh", "spline"))
    for seed in range(5):
        for size in (0.1, 1.0, 10.0):
            x, z = size * noise(1, 49, seed=seed), size * noise(1, 49, seed=seed + 50)
            change = (energy.gradient(x) - energy.gradient(z)).detach()[0]
            apart = space.norm((x - z)[0])
            assert space.dual_norm(change) <= said.lipschitz * apart
            assert space.pair(change, (x - z)[0]) >= -said.modulus * apart**2 - 1e-9


def test_the_modulus_is_reached() -> None:
    """A constant value where a saturating potential falls steepest, with curvature -1 / edge^2 times w."""
    operators = line(12, 2.0)
    energy = MeshRidge(LENGTHS, [], [(2.0, 0.0, 0.1)], "saturating").double().on(operators)
    least = float(torch.linalg.eigvalsh(hessian(energy, torch.full((12,), 0.3).double()))[0])
    assert least < 0
    assert -least == pytest.approx(energy.guarantee().modulus, rel=1e-2)
    learned = Learned(energy, operators.space, weight=0.5)
    assert learned.guarantee().modulus == pytest.approx(energy.guarantee().modulus / 2)


def test_before_it_is_on_a_mesh_only_what_no_mesh_changes_is_finite() -> None:
    rough = MeshRidge(LENGTHS, [(1.0, 0.0, 0.1)])
    assert math.isinf(rough.guarantee().lipschitz) and rough.guarantee().modulus == 0
    smooth = MeshRidge(LENGTHS, [(1.0, 4.0, 0.1)], [(1.0, 0.0, 0.1)])
    any_mesh = smooth.guarantee()
    for h in (0.01, 1.0, 5.0):
        said = smooth.on(line(30, h)).guarantee()
        assert said.lipschitz <= any_mesh.lipschitz * (1 + 1e-3)
    # w / edge = 10 each: t f^2 / edge is at most 1/64 / edge, at t = 1/16, where the value's is 1
    assert any_mesh.lipschitz == pytest.approx(10 * (1 + 1 / 64), rel=2e-2)


def test_it_is_coercive_where_no_field_is_free() -> None:
    on = line(15, 3.0)
    assert MeshRidge(LENGTHS, [], [(1.0, 8.0, 0.1)]).on(on).guarantee().coercive
    assert not MeshRidge(LENGTHS, [(1.0, 0.0, 0.1)]).on(on).guarantee().coercive  # constants
    zero = MeshRidge(LENGTHS, [], [(1.0, 0.0, 0.1)]).on(on)
    zero.mix.data.copy_(torch.tensor([[1.0, 1.0, 0.0]]))  # blind to constants
    assert not zero.guarantee().coercive


def test_weights_are_shared_between_meshes_and_operators_between_copies() -> None:
    energy, a, b = MeshRidge(LENGTHS), line(10, 2.0), line(20, 1.0)
    on_a, on_b = energy.on(a), energy.on(b)
    assert on_a.mix is energy.mix is on_b.mix and energy.operators is None
    copied = copy.deepcopy(on_a)
    assert copied.operators is a and copied.mix is not energy.mix
    said = json.loads(json.dumps(energy.settings()))
    again = MeshRidge(**said)
    again.load_state_dict(energy.state_dict())
    assert torch.equal(again.on(a)(noise(2, 10)), on_a(noise(2, 10)))


def test_bilevel_training_has_its_hypergradient() -> None:
    """Denoising on a path: differences of the upper loss by the weights."""
    operators = line(12, 2.0)
    truth = torch.linspace(0, 6, 12).double().sin()[None].repeat(2, 1)
    y, space = truth + 0.2 * noise(2, 12), Diagonal(operators.space.weights.repeat(2))

    def make(data: Tensor, R: Term) -> InverseProblem:
        def misfit(m: Tensor) -> Tensor:
            return space.pairing(space.gram(m - data.reshape(-1)), m - data.reshape(-1)) / 2

        return InverseProblem(space, misfit, R)

    solve = lower_solver(1e-11, 2000)
    energy = everything().on(operators)
    bilevel = Bilevel(energy, make, lambda data: data.reshape(-1), (12,), 0.5, solve=solve, rtol=1e-12)
    loss = (bilevel(y) - truth).square().sum()
    weights = [energy.mix, energy.log_weight, energy.get_parameter("of_slopes.log_a")]
    for p, slope in zip(weights, torch.autograd.grad(loss, weights), strict=True):
        along, step, values = noise(*p.shape, seed=9), 1e-4, []
        with torch.no_grad():
            for sign in (1, -2):
                p.add_(sign * step * along)
                values.append(float((bilevel(y) - truth).square().sum()))
            p.add_(step * along)
        quotient = (values[0] - values[1]) / (2 * step)
        assert quotient == pytest.approx(float((slope * along).sum()), rel=1e-4, abs=1e-8)


def test_bad_input_is_refused() -> None:
    energy = MeshRidge(LENGTHS)
    with pytest.raises(GliodeError, match="Multiscale"):
        energy(noise(1, 10))
    with pytest.raises(GliodeError, match="lengths"):
        energy.on(line(10, 2.0, (0.0, 5.0)))
    with pytest.raises(GliodeError, match="bind"):
        Learned(energy.on(line(10, 2.0)), Diagonal(torch.ones(11)))
    with pytest.raises(GliodeError, match="expected"):
        energy.on(line(10, 2.0))(noise(10))
    with pytest.raises(GliodeError, match="potential"):
        MeshRidge(LENGTHS, potential="cubic")
    for term in ((1.0, 3.0, 0.1), (-1.0, 0.0, 0.1), (1.0, 0.0, 0.0), (1.0, 0.0)):
        with pytest.raises(GliodeError, match="edge"):
            MeshRidge(LENGTHS, [term])
    with pytest.raises(GliodeError, match="at least one"):
        MeshRidge(LENGTHS, [])
