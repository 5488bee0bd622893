"""Implicit transport on DOLFINx against exact modes, diffusion, the torch form, differences and one rank."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from solvers.errors import GliodeError
from solvers.evolution import Evolution
from solvers.fem.equations.conservation import line, rectangle, ring
from solvers.fem.equations.kinetic import OrdinatesStep
from solvers.node.science.kinetic import (
    GOLDSTEIN_TAYLOR,
    MicroMacro,
    Velocities,
    fourier_mode,
    ordinates,
    time_steps,
)
from solvers.spaces import reduce, replicate

F64, WAVE, SELF = torch.float64, 2 * math.pi, MPI.COMM_SELF


def turn(step: OrdinatesStep) -> Tensor:
    """The angle of the owned dofs of a ring, over 2 pi."""
    x = step.scalar.tabulate_dof_coordinates()[: step.scalar.dofmap.index_map.size_local]
    return torch.from_numpy(np.arctan2(x[:, 1], x[:, 0]) / (2 * math.pi))


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=F64)


def bump(s: Tensor) -> Tensor:
    return 1 + 0.5 * torch.cos(WAVE * s) + 0.3 * torch.sin(2 * WAVE * s)


@pytest.mark.parametrize("velocities", [GOLDSTEIN_TAYLOR, ordinates(4)])
def test_one_step_size_serves_all_eps_with_second_order(velocities: Velocities) -> None:
    """Against the exact mode; dt = h/5 is up to 10^6 times the step of an explicit scheme."""
    for eps, t in ((1.0, 0.6), (1e-2, 0.1), (1e-5, 0.1)):
        errors = []
        for cells in (10, 20):
            step = OrdinatesStep(ring(1.0, cells, SELF), velocities, eps)
            s = turn(step)
            u = step.isotropic(1 + 0.5 * torch.cos(WAVE * s))
            rho = step.density(Evolution(step)(u, t, round(5 * t * cells), number(1.3)))
            shrunk = velocities[1] @ fourier_mode(velocities, eps, 1.3, WAVE, t, np.ones(len(velocities[0])))
            exact = 1 + 0.5 * np.real(shrunk * np.exp(1j * WAVE * s.numpy()))
            errors.append(float((rho - torch.from_numpy(exact)).square().mean().sqrt()))
        assert errors[1] < 6e-3 and math.log2(errors[0] / errors[1]) > 1.5, (eps, errors)


def test_it_tends_to_the_micro_macro_step_where_scattering_varies() -> None:
    """Two discretisations of one problem: their gap falls with the mesh."""
    gaps = []
    for cells in (12, 24):
        model, step = (
            MicroMacro(ordinates(4), 1.0, cells, 0.2),
            OrdinatesStep(ring(1.0, cells, SELF), ordinates(4), 0.2),
        )
        sigma = lambda s: 1 + 0.5 * torch.sin(WAVE * s)  # noqa: E731
        steps = time_steps(0.06, 0.3 * model.h**2)
        ours = model.density(
            Evolution(model)(model.start(bump(model.centres)), 0.06, steps, sigma(model.faces))
        )
        s = turn(step)
        order = np.asarray(step.scalar.dofmap.list)
        middle = torch.from_numpy(np.angle(np.exp(1j * WAVE * s.numpy())[order].sum(1)) / WAVE) % 1.0
        theirs = step.density(Evolution(step)(step.isotropic(bump(s)), 0.06, cells, sigma(middle)))
        at_cells = theirs[torch.from_numpy(order.astype(np.int64))].mean(1)
        gaps.append(float((at_cells - ours[(middle * cells).long()]).abs().max()))
    assert gaps[1] < 0.01 and gaps[0] > 2.5 * gaps[1], gaps


def test_what_leaves_a_slab_does_not_come_back() -> None:
    """Weak scattering: after a crossing time nearly nothing is left, and nothing is negative by much."""
    step = OrdinatesStep(line(0.0, 1.0, 40, SELF), GOLDSTEIN_TAYLOR, 1.0)
    x = torch.from_numpy(step.scalar.tabulate_dof_coordinates()[:, 0])
    start = torch.exp(-100 * (x - 0.5) ** 2)
    u = Evolution(step)(step.isotropic(start), 0.3, 60, number(1e-9))
    moved = (torch.exp(-100 * (x - 0.8) ** 2) + torch.exp(-100 * (x - 0.2) ** 2)) / 2
    assert float((step.density(u) - moved).abs().max()) < 0.02
    u = Evolution(step)(u, 0.7, 100, number(1e-9))
    assert float(step.density(u).abs().max()) < 1e-3


@pytest.mark.mpi
def test_a_run_and_its_gradient_do_not_depend_on_the_number_of_ranks() -> None:
    found: list[tuple[Tensor, Tensor]] = []
    for comm in (MPI.COMM_WORLD, SELF):
        step = OrdinatesStep(ring(1.0, 12, comm), ordinates(4), 0.1)
        s, m = turn(step), torch.tensor(1.2, dtype=F64, requires_grad=True)
        several: Any = comm if comm.size > 1 else None
        rho = step.density(Evolution(step)(step.isotropic(bump(s)), 0.1, 4, replicate(m, several)))
        value = reduce((rho**2 * (2 + torch.cos(WAVE * s))).sum(), several)
        (gradient,) = torch.autograd.grad(value, m)
        found.append((value.detach(), gradient))
        if comm is SELF:
            values = [
                float(
                    (step.density(Evolution(step)(step.isotropic(bump(s)), 0.1, 4, k)) ** 2
                     * (2 + torch.cos(WAVE * s))).sum()
                )
                for k in (number(1.2 + 1e-5), number(1.2 - 1e-5))
            ]  # fmt: skip
            assert float(gradient) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)
    for parallel, serial in zip(*found, strict=True):
        torch.testing.assert_close(parallel, serial, rtol=1e-9, atol=0)


def test_bad_input_is_refused() -> None:
    with pytest.raises(GliodeError, match="degree"):
        OrdinatesStep(line(0, 1, 4, SELF), ordinates(2), 0.1, degree=0)
    with pytest.raises(GliodeError, match="dimension 2"):
        OrdinatesStep(rectangle((0, 0), (1, 1), (2, 2), comm=SELF), ordinates(2), 0.1)
    with pytest.raises(GliodeError, match=r"w \. v"):
        OrdinatesStep(line(0, 1, 4, SELF), (np.array([1.0]), np.array([1.0])), 0.1)
