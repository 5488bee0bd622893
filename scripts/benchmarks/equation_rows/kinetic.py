"""Kinetic equations at one step for all mean free paths: the telegraph equation, ordinates, BGK in a tube."""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from scripts.benchmarks.equation_rows import Row
from scripts.benchmarks.equation_rows._fits import Found, fits
from solvers.evolution import Evolution
from solvers.fem.equations.conservation import ring
from solvers.fem.equations.kinetic import OrdinatesStep
from solvers.node.science import riemann
from solvers.node.science.kinetic import (
    BGK,
    GOLDSTEIN_TAYLOR,
    MicroMacro,
    Velocities,
    fourier_mode,
    ordinates,
    time_steps,
)

F64, WAVE = torch.float64, 2 * math.pi
SCALES = (1.0, 0.3, 0.1, 1e-2, 1e-3, 1e-4)  # eps: mean free path over the length


def rows(full: bool) -> list[Row]:
    """The rows of this module."""
    torch.set_num_threads(1)
    cells = 80 if full else 40
    return [
        goldstein_taylor(cells),
        diffusion_limit(cells),
        slab(cells),
        slab_on_dolfinx(cells),
        tube(400 if full else 200),
    ]


def telegraph(eps: float, sigma: float, t: float) -> float:
    """What is left at t of a wave cos(2 pi x): eps^2 rho'' + sigma rho' + (2 pi)^2 rho = 0 from rest."""
    root = cmath.sqrt(sigma**2 - 4 * eps**2 * WAVE**2)
    a, b = ((-sigma + s * root) / (2 * eps**2) for s in (1, -1))
    return float(((b * cmath.exp(a * t) - a * cmath.exp(b * t)) / (b - a)).real)


def left(model: MicroMacro, duration: float, sigma: float, wave: Tensor) -> Tensor:
    """What is left of the wave by steps of half of what is stable in the diffusive limit."""
    dt = 0.5 * sigma * model.h**2 / (2 * float(model.w @ model.v**2))
    u = model.start(1 + 0.5 * wave)
    u = Evolution(model)(u, duration, time_steps(duration, dt), torch.tensor(sigma, dtype=F64))
    return 2 * (model.density(u) - 1)


def uniformly(error: Callable[[float, int], float], cells: int) -> tuple[float, float]:
    """The largest error over eps at a number of cells, and the order of that from half as many."""
    coarse, fine = (max(error(eps, n) for eps in SCALES) for n in (cells // 2, cells))
    return fine, math.log2(coarse / fine)


def goldstein_taylor(cells: int) -> Row:
    """Two velocities: the telegraph equation for every eps; scattering from snapshots at two of them."""
    end, truth = 0.05, 1.3

    def error(eps: float, n: int) -> float:
        model = MicroMacro(GOLDSTEIN_TAYLOR, 1.0, n, eps)
        wave = torch.cos(WAVE * model.centres)
        return float((left(model, end, truth, wave) - telegraph(eps, truth, end) * wave).abs().max())

    found: Found = {}
    times = [0.02 * k for k in range(1, 11)]
    for eps in (0.3, 1e-3):
        model = MicroMacro(GOLDSTEIN_TAYLOR, 1.0, 32, eps)
        wave = torch.cos(WAVE * model.centres)

        def forward(m: Tensor, model: MicroMacro = model, wave: Tensor = wave) -> Tensor:
            u, found, steps = model.start(1 + 0.5 * wave), [], time_steps(0.02, 0.4 * model.h**2)
            for _ in times:
                u = Evolution(model)(u, 0.02, steps, m[0])
                found.append(model.density(u))
            return torch.stack(found)

        clean = torch.stack([1 + 0.5 * telegraph(eps, truth, t) * wave for t in times])
        name = f"sigma at eps = {eps:g}"
        found |= fits(forward, clean, {name: truth}, {name: 1.0})
    fine, order = uniformly(error, cells)
    note = f"the worst of eps = 1 to 1e-4, {cells} cells, dt = sigma h^2/4; data: closed form at ten times"
    return Row("Goldstein-Taylor", "the telegraph equation", fine, 0.005, order, 2.0, found, note)


def diffusion_limit(cells: int) -> Row:
    """Two velocities at eps = 1e-4 against the heat equation."""

    def error(n: int) -> float:
        model = MicroMacro(GOLDSTEIN_TAYLOR, 1.0, n, 1e-4)
        wave = torch.cos(WAVE * model.centres)
        exact = math.exp(-(WAVE**2) * 0.05) * wave
        return float((left(model, 0.05, 1.0, wave) - exact).abs().max() / exact.abs().max())

    fine = error(cells)
    order = math.log2(error(cells // 2) / fine)
    note = f"eps = 1e-4, {cells} cells, relative to what is left of the wave"
    return Row("diffusive limit", "the heat equation", fine, 0.01, order, 2.0, note=note)


def mode(velocities: Velocities, eps: float, sigma: float, t: float) -> complex:
    """What is left of the density of exp(2 pi i x)."""
    v, w = velocities
    return complex(w @ fourier_mode(velocities, eps, sigma, WAVE, t, np.ones(len(v))))


def slab(cells: int) -> Row:
    """Eight ordinates; scattering as a function of the place from four experiments in a batch."""
    velocities, end = ordinates(8), 0.05

    def error(eps: float, n: int) -> float:
        model = MicroMacro(velocities, 1.0, n, eps)
        exact = np.real(mode(velocities, eps, 1.3, end) * np.exp(1j * WAVE * model.centres.numpy()))
        found = left(model, end, 1.3, torch.cos(WAVE * model.centres))
        return float((found - torch.from_numpy(exact)).abs().max())

    truth = {"sigma(0)": 1.0, "sigma(1/4)": 1.5, "sigma(1/2)": 0.7, "sigma(3/4)": 1.2}

    def scattering(values: Tensor, at: Tensor) -> Tensor:
        """Periodic and linear between its values at 0, 1/4, 1/2, 3/4."""
        first, part = (4 * at).floor().long() % 4, (4 * at) % 1
        return (1 - part) * values[first] + part * values[(first + 1) % 4]

    def densities(model: MicroMacro, values: Tensor) -> Tensor:
        """Of four waves shifted against each other, at ten times."""
        x = WAVE * model.centres
        sigma = scattering(values, model.faces)
        u = model.start(1 + 0.9 * torch.stack([torch.sin(x + k * math.pi / 4) for k in range(4)]))
        steps, found = time_steps(0.012, 0.3 * model.h**2 * 3 / 2), []
        for _ in range(10):
            u = Evolution(model)(u, 0.012, steps, sigma)
            found.append(model.density(u))
        return torch.stack(found)

    coarse, fine = (MicroMacro(ordinates(4), 1.0, n, 0.1) for n in (24, 48))
    exact = torch.tensor(list(truth.values()), dtype=F64)
    clean = densities(fine, exact).view(10, 4, 24, 2).mean(-1)
    found = fits(lambda m: densities(coarse, m), clean, truth, dict.fromkeys(truth, 1.0))
    worst, order = uniformly(error, cells)
    note = f"S8, worst of eps = 1 to 1e-4, {cells} cells; data: S4, eps = 0.1, from a grid twice as fine"
    return Row("slab transport", "a matrix exponential", worst, 0.005, order, 2.0, found, note)


def slab_on_dolfinx(cells: int) -> Row:
    """Four ordinates by implicit upwind discontinuous Galerkin; scattering from one snapshot."""
    velocities, end, truth = ordinates(4), 0.1, 1.3

    def place(step: OrdinatesStep) -> Tensor:
        x = step.scalar.tabulate_dof_coordinates()
        return torch.from_numpy(np.arctan2(x[:, 1], x[:, 0]))

    def density(step: OrdinatesStep, sigma: Tensor, steps: int) -> Tensor:
        u = step.isotropic(1 + 0.5 * torch.cos(place(step)))
        return step.density(Evolution(step)(u, end, steps, sigma))

    def closed(step: OrdinatesStep, eps: float) -> Tensor:
        wave = np.real(mode(velocities, eps, truth, end) * np.exp(1j * place(step).numpy()))
        return torch.from_numpy(1 + 0.5 * wave)

    def error(eps: float, n: int) -> float:
        step = OrdinatesStep(ring(1.0, n, MPI.COMM_SELF), velocities, eps)
        gap = density(step, torch.tensor(truth, dtype=F64), n // 2) - closed(step, eps)
        return float(gap.abs().max())

    fitted = OrdinatesStep(ring(1.0, 24, MPI.COMM_SELF), velocities, 0.1)
    found = fits(lambda m: density(fitted, m[0], 12), closed(fitted, 0.1), {"sigma": truth}, {"sigma": 1.0})
    worst, order = uniformly(error, cells)
    note = f"P1, {cells} cells, dt = h/5 for all eps = 1 to 1e-4; data: closed form at eps = 0.1"
    return Row("slab transport on DOLFINx", "a matrix exponential", worst, 0.005, order, 2.0, found, note)


def tube(cells: int) -> Row:
    """BGK in Sod's tube towards Euler's equations; the relaxation time of a rarer gas."""
    end, truth = 0.15, {"tau": 0.03}
    (a, u, p), (b, v, q) = riemann.SOD

    def start(model: BGK, high: Tensor) -> Tensor:
        return model.equilibrium(*(low + (up - low) * high for up, low in ((a, b), (u, v), (p, q))))

    def error(n: int) -> float:
        model = BGK(-0.5, 0.5, n)
        state = start(model, (model.centres < 0).to(F64))
        tau = torch.tensor(1e-8, dtype=F64)
        state = Evolution(model)(state, end, time_steps(end, model.largest_step), tau)
        exact = riemann.euler(model.centres.numpy(), end)[0]
        return float(np.abs(model.macroscopic(state)[0].numpy() - exact).mean() / np.abs(exact).mean())

    def seen(n: int, tau: Tensor) -> Tensor:
        """Density, velocity, pressure at eight times, from a smooth layer."""
        model, found = BGK(-0.5, 0.5, n, count=18), []
        state = start(model, (1 - torch.tanh(20 * model.centres)) / 2)
        for _ in range(8):
            state = Evolution(model)(state, 0.025, time_steps(0.025, model.largest_step), tau)
            found.append(torch.stack(model.macroscopic(state), -1))
        return torch.stack(found)

    clean = seen(140, torch.tensor(truth["tau"], dtype=F64)).view(8, 70, 2, 3).mean(2)
    found = fits(lambda m: seen(70, m[0]), clean, truth, {"tau": 0.02})
    fine = error(cells)
    order = math.log2(error(cells // 2) / fine)
    note = (
        f"tau = 1e-8, {cells} cells, L1 of the density (order 2/3 at its contact), dt = h/14 for every tau; "
        "data: tau = 0.03 from a smooth layer, on a grid twice as fine as the fitted one (70 cells)"
    )
    return Row("BGK in Sod's tube", "the exact Riemann solution", fine, 0.02, order, 2 / 3, found, note)
