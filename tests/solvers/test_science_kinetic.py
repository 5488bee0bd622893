"""Kinetic steps against the telegraph equation, matrix exponentials, limits and conservation laws."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inverse.optimizers import gauss_newton
from inverse.problem import LeastSquares
from inverse.verification import check_adjoint
from solvers.errors import GliodeError
from solvers.evolution import Evolution
from solvers.node.science import riemann
from solvers.node.science.activated import Stepped, Unknown
from solvers.node.science.kinetic import (
    BGK,
    GOLDSTEIN_TAYLOR,
    MicroMacro,
    Velocities,
    check_velocities,
    fourier_mode,
    ordinates,
    time_steps,
)
from solvers.node.weights import Parameters
from solvers.spaces import Euclidean

F64 = torch.float64
WAVE = 2 * math.pi


def telegraph(eps: float, sigma: float, t: float) -> float:
    """rho(t) of eps^2 rho'' + sigma rho' + k^2 rho = 0, rho(0) = 1, rho'(0) = 0."""
    root = cmath.sqrt(sigma**2 - 4 * eps**2 * WAVE**2)
    a, b = ((-sigma + s * root) / (2 * eps**2) for s in (1, -1))
    # Divided by the growing one, so that exp never overflows.
    return float(((b * cmath.exp(a * t) - a * cmath.exp(b * t)) / (b - a)).real)


def ripple(model: MicroMacro, duration: float, steps: int, sigma: float) -> Tensor:
    """The density from rho = 1 + cos(2 pi x)/2, f = rho, as the factor that the wave has shrunk by."""
    rho = 1 + 0.5 * torch.cos(WAVE * model.centres)
    u = Evolution(model)(model.start(rho), duration, steps, torch.tensor(sigma, dtype=F64))
    return 2 * (model.density(u) - 1)


@pytest.mark.parametrize("eps", [1.0, 0.3, 0.1, 1e-2, 1e-4])
def test_goldstein_taylor_is_the_telegraph_equation_at_one_step_for_all_eps(eps: float) -> None:
    """Second order in h with dt = h^2/4, whatever eps; the same mode by a matrix exponential."""
    sigma, t = 1.0, 0.05
    exact = telegraph(eps, sigma, t)
    mode = fourier_mode(GOLDSTEIN_TAYLOR, eps, sigma, WAVE, t, np.ones(2))
    assert np.real(mode.mean()) == pytest.approx(exact, abs=1e-9)
    errors = []
    for cells in (16, 32):
        model = MicroMacro(GOLDSTEIN_TAYLOR, 1.0, cells, eps)
        found = ripple(model, t, round(4 * t * cells**2), sigma)
        errors.append(float((found - exact * torch.cos(WAVE * model.centres)).abs().max()))
    assert errors[1] < 2e-3 * math.exp(-(WAVE**2) * t * 0.5) + 2e-4
    assert math.log2(errors[0] / errors[1]) > 1.6


@pytest.mark.parametrize("eps", [1.0, 0.1, 1e-4])
def test_discrete_ordinates_follow_their_exact_modes(eps: float) -> None:
    errors = []
    for cells in (16, 32):
        model = MicroMacro(ordinates(6), 1.0, cells, eps)
        found = ripple(model, 0.08, round(2 * 0.08 * cells**2), 1.3)
        rho = ordinates(6)[1] @ fourier_mode(ordinates(6), eps, 1.3, WAVE, 0.08, np.ones(6))
        exact = np.real(rho * np.exp(1j * WAVE * model.centres.numpy()))
        errors.append(float((found - torch.from_numpy(exact)).abs().max()))
    assert errors[1] < 3e-3 and math.log2(errors[0] / errors[1]) > 1.7


def test_the_limit_is_diffusion_with_a_coefficient_that_varies() -> None:
    """eps = 1e-6 against a dense exponential of (rho_x / (3 sigma))_x on the same grid; mass to rounding."""
    model = MicroMacro(ordinates(8), 1.0, 24, 1e-6)
    sigma = 1 + 0.6 * torch.sin(WAVE * model.faces)
    rho = torch.exp(-30 * (model.centres - 0.4) ** 2)
    steps = 4 * time_steps(0.02, model.largest_step(0.4))
    u = Evolution(model)(model.start(rho), 0.02, steps, sigma)
    step = torch.roll(torch.eye(24, dtype=F64), 1, 1) - torch.eye(24, dtype=F64)  # rho(i + 1) - rho(i)
    operator = -step.T @ torch.diag(1 / (3 * sigma)) @ step * 24**2
    exact = torch.linalg.matrix_exp(0.02 * operator) @ rho
    assert float((model.density(u) - exact).abs().max()) < 4e-3
    finer = Evolution(model)(model.start(rho), 0.02, 2 * steps, sigma)
    gaps = [float((model.density(v) - exact).abs().max()) for v in (u, finer)]
    assert 1.8 < gaps[0] / gaps[1] < 2.2  # first order in time
    assert float((model.density(u) - rho).sum().abs()) < 1e-12


@pytest.mark.parametrize("velocities", [GOLDSTEIN_TAYLOR, ordinates(4), ordinates(12)])
def test_the_largest_step_is_that_of_the_matrix_and_never_below_diffusion(velocities: Velocities) -> None:
    """Spectral radius of the whole step as a dense matrix, on both sides of the limit."""
    v, w = velocities
    for eps in (1.0, 0.05, 0.01, 1e-3, 1e-5):
        model = MicroMacro(velocities, 1.0, 16, eps)
        largest = model.largest_step(0.7)
        assert largest >= 0.7 * model.h**2 / (2 * float(w @ v**2)) * (1 - 1e-6)
        if len(v) == 2:
            closed = 0.7 + math.sqrt(0.7**2 + 16 * eps**2 / model.h**2)
            assert largest == pytest.approx(closed * model.h**2 / 4, rel=1e-6)
        for factor, stable in ((0.999, True), (1.05, False)):
            model._checked = (factor * largest, 0.7)  # past the check
            units = torch.eye(16 * (1 + len(v)), dtype=F64).view(-1, 16, 1 + len(v))
            matrix = model(units, factor * largest, 0.7).reshape(len(units), -1)
            radius = np.abs(np.linalg.eigvals(matrix.numpy())).max()
            assert (radius < 1 + 1e-7) == stable, (eps, factor, radius)
    with pytest.raises(GliodeError, match=f"largest stable step here is {largest:.4g}"):
        model(model.start(torch.ones(16, dtype=F64)), 1.1 * largest, 0.7)


def test_a_batch_is_its_members_and_gradients_hold() -> None:
    model = MicroMacro(ordinates(4), 1.0, 12, 0.1)
    rho = torch.rand(2, 12, dtype=F64) + 0.5
    sigma = torch.tensor([[0.8], [1.5]], dtype=F64)
    u = Evolution(model)(model.start(rho), 0.01, 5, sigma)
    for k in range(2):
        alone = Evolution(model)(model.start(rho[k]), 0.01, 5, sigma[k, 0])
        torch.testing.assert_close(u[k], alone, rtol=0, atol=1e-14)

    def forward(m: Tensor) -> Tensor:
        return model.density(Evolution(model, checkpoint=2)(model.start(rho[0]), 0.01, 5, m))

    m = 1 + torch.rand(12, dtype=F64)
    checked = check_adjoint(LeastSquares(Euclidean(12), forward, torch.zeros(12, dtype=F64), 1.0), m)
    assert checked.passed, str(checked)


def tube(model: BGK) -> Tensor:
    left = (model.centres < 0).to(F64)
    (a, u, p), (b, v, q) = riemann.SOD
    return model.equilibrium(*(y + (x - y) * left for x, y in ((a, b), (u, v), (p, q))))


def test_bgk_tends_to_eulers_tube_at_one_step_for_all_tau() -> None:
    errors = {}
    for cells, tau in ((50, 1e-8), (100, 1e-8), (100, 1e-2)):
        model = BGK(-0.5, 0.5, cells)
        start = tube(model)
        u = Evolution(model)(start, 0.15, time_steps(0.15, model.largest_step), torch.tensor(tau, dtype=F64))
        exact = riemann.euler(model.centres.numpy(), 0.15)
        pairs = zip(model.macroscopic(u), exact, strict=True)
        errors[cells, tau] = [float((a - torch.from_numpy(b)).abs().mean()) for a, b in pairs]
        # Nothing has reached the ends: mass and energy stay, momentum grows by the pressures' difference.
        change = (model.moments(u) - model.moments(start)).sum(0) * model.h
        near = 1e-13 if cells == 100 and tau < 1e-3 else 1e-6  # but for the fastest molecules
        assert (change - torch.tensor([0.0, 0.15 * 0.9, 0.0], dtype=F64)).abs().max() < near
    assert max(errors[100, 1e-8]) < 0.025 and errors[100, 1e-8][0] < 0.012
    assert all(fine < 0.65 * coarse for fine, coarse in zip(errors[100, 1e-8], errors[50, 1e-8], strict=True))
    assert errors[100, 1e-2][0] > 2 * errors[100, 1e-8][0]  # a viscous gas is another one


def test_free_molecules_fly_straight() -> None:
    """tau = 1e6 against f(x - v t), each velocity by itself."""
    model = BGK(-0.5, 0.5, 200, count=12)
    bump = torch.exp(-200 * model.centres**2)
    one = torch.ones_like(bump)
    start = model.equilibrium(0.2 + bump, 0 * one, 0.2 + bump)
    t = 0.03
    u = Evolution(model)(start, t, time_steps(t, model.largest_step), torch.tensor(1e6, dtype=F64))
    feet = model.centres[:, None] - model.v * t
    g = (0.2 + torch.exp(-200 * feet**2)) / math.sqrt(2 * math.pi) * torch.exp(-(model.v**2) / 2)
    assert float((u[:, :12] - g).abs().max()) < 0.03 * float(g.max())
    assert float((u[:, :12] - g).abs().mean()) < 0.003 * float(g.max())


@pytest.mark.parametrize("gamma", [1.4, 5 / 3])
def test_collisions_keep_mass_momentum_and_energy_and_only_relax(gamma: float) -> None:
    """A uniform gas of two beams: moments stay to rounding, f decays to the Maxwellian as exp(-t/tau)."""
    model = BGK(0, 1, 3, gamma=gamma)
    one = torch.ones(3, dtype=F64)
    u = model.equilibrium(0.6 * one, -0.9 * one, 0.4 * one) + model.equilibrium(
        0.4 * one, 1.1 * one, 0.5 * one
    )
    end = model.equilibrium(*model.macroscopic(u))
    torch.testing.assert_close(model.moments(end), model.moments(u), rtol=1e-13, atol=1e-14)
    rho, velocity, pressure = model.macroscopic(u)
    energy = rho * velocity**2 / 2 + pressure / (gamma - 1)
    torch.testing.assert_close(model.moments(u)[:, 2], energy, rtol=1e-13, atol=0)
    v = Evolution(model)(u, 0.1, 10, torch.tensor(0.2, dtype=F64))
    torch.testing.assert_close(model.moments(v), model.moments(u), rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(v - end, math.exp(-0.5) * (u - end), rtol=1e-9, atol=1e-13)


def test_scattering_is_identified_as_a_function_and_as_a_number() -> None:
    """1 % noise; the function's data come from a grid twice as fine, the number's from the closed form."""
    truth = torch.tensor([1.0, 1.5, 0.7, 1.2], dtype=F64)

    def scattering(values: Tensor, at: Tensor) -> Tensor:
        """Periodic, piecewise linear between the values at 0, 1/4, 1/2, 3/4."""
        first, part = (4 * at).floor().long() % 4, (4 * at) % 1
        return (1 - part) * values[first] + part * values[(first + 1) % 4]

    def densities(model: MicroMacro, sigma: Tensor) -> Tensor:
        """Two experiments in a batch, at three times."""
        x = WAVE * model.centres
        u, found = model.start(1 + 0.9 * torch.stack([x.sin(), x.cos()])), []
        for _ in range(3):
            u = Evolution(model)(u, 0.02, time_steps(0.02, 0.4 * model.h**2), sigma)
            found.append(model.density(u))
        return torch.stack(found)

    coarse, fine = (MicroMacro(ordinates(4), 1.0, n, 0.1) for n in (16, 32))
    clean = densities(fine, scattering(truth, fine.faces)).view(3, 2, 16, 2).mean(-1)
    generator = torch.Generator().manual_seed(7)
    noise = 0.01 * float(clean.abs().max())
    data = clean + noise * torch.randn(clean.shape, dtype=F64, generator=generator)
    problem = LeastSquares(
        Euclidean(4), lambda m: densities(coarse, scattering(m.exp(), coarse.faces)), data, noise
    )
    m = gauss_newton.minimise(problem, torch.zeros(4, dtype=F64)).m
    jacobian = problem.jacobian(m)
    deviation = torch.linalg.inv(jacobian.mT @ jacobian).diagonal().sqrt()
    assert deviation.max() < 0.06
    assert ((m - truth.log()).abs() < 3.5 * deviation).all()

    model = MicroMacro(GOLDSTEIN_TAYLOR, 1.0, 16, 0.1)
    network = Stepped(model, {"sigma": Unknown(1.0, positive=True)}, 0.05, 40)
    trained = Parameters(network)
    start = model.start(1 + 0.5 * torch.cos(WAVE * model.centres))
    exact = 1 + 0.5 * telegraph(0.1, 1.4, 0.05) * torch.cos(WAVE * model.centres)
    data = exact + 0.01 * 1.5 * torch.randn(16, dtype=F64, generator=generator)

    def density(m: Tensor) -> Tensor:
        return model.density(torch.func.functional_call(network, dict(trained.unpack(m)), (start,)))

    number = gauss_newton.minimise(LeastSquares(trained.space, density, data, 0.015), trained.pack()).m.exp()
    assert float(number) == pytest.approx(1.4, rel=0.1)


def test_velocities_are_a_mean_of_zero() -> None:
    third = (np.array([-1.0, 2.0]), np.array([2.0, 1.0]) / 3)
    for good in (GOLDSTEIN_TAYLOR, ordinates(6), third):
        check_velocities(good)
    ones = np.array([0.5, 0.5])
    for v, w, said in (
        ([-1.0, 1.0], [0.4, 0.5], "the weights sum to 0.9 "),
        ([-1.0, 2.0], ones, "w . v is 0.5 "),
        ([-1.0, 1.0], [1.5, -0.5], "positive weights"),
        ([-math.inf, math.inf], ones, "finite velocities"),
        ([-1.0, math.nan], ones, "finite velocities"),
        ([-1.0, 0.0, 1.0], ones, "as many"),
        ([[-1.0, 1.0]], [ones], "velocities"),
    ):
        with pytest.raises(GliodeError, match=said):
            check_velocities((np.array(v), np.array(w)))


def of(model: Any, state: Tensor | None = None, *rest: Any) -> Callable[[], Any]:
    return lambda: model()(state, *rest) if state is not None else model()


MACRO, GAS = lambda: MicroMacro(ordinates(2), 1.0, 8, 0.1), lambda: BGK(0, 1, 8)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (of(lambda: ordinates(3)), "even"),
        (of(lambda: MicroMacro((np.array([1.0, 2.0]), np.array([0.5, 0.5])), 1.0, 8, 0.1)), "w . v"),
        (of(lambda: MicroMacro(ordinates(2), 1.0, 8, 0.0)), "eps"),
        (of(MACRO, torch.zeros(8, 2, dtype=F64), 1e-3), "state"),
        (of(MACRO, torch.zeros(8, 3, dtype=F64), 1e-3, -1.0), "sigma"),
        (of(lambda: BGK(0, 1, 8, gamma=3.5)), "gamma"),
        (of(MACRO, torch.zeros(8, 3, dtype=F64), 1e-3, math.inf), "sigma"),
        (of(MACRO, torch.zeros(8, 3, dtype=F64), -1e-3), "dt = -0.001"),
        (of(MACRO, torch.zeros(8, 3, dtype=F64), math.nan), "dt = nan"),
        (of(GAS, torch.zeros(8, 48, dtype=F64), -1e-3), "dt = -0.001"),
        (of(GAS, torch.zeros(8, 4, dtype=F64), 1e-3), "state"),
        (of(GAS, torch.zeros(8, 48, dtype=F64), 1e-3), "not positive"),
        (of(GAS, torch.zeros(8, 48, dtype=F64), 1e-3, 0.0), "tau"),
        (of(GAS, torch.zeros(8, 48, dtype=F64), 0.01), "largest stable step here is 0.008929"),
        (lambda: time_steps(1.0, 0.0), "positive"),
    ],
)
def test_bad_input_is_refused_with_the_way_out(make: Callable[[], Any], match: str) -> None:
    with pytest.raises(GliodeError, match=match):
        make()
