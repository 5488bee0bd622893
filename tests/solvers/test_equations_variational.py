"""Minimal surfaces and obstacles on DOLFINx: closed forms, the torch form of the same energy, two ranks."""

from __future__ import annotations

import math
from itertools import pairwise

import dolfinx
import pytest
import torch
import ufl
from dolfinx.fem import Constant, Function
from mpi4py import MPI
from torch import Tensor

from inverse.optimizers import newton_cg, tao
from inverse.problem import InverseProblem
from inverse.stopping import GradientTolerance, MaxIterations
from solvers.errors import GliodeError
from solvers.evolution import Evolution
from solvers.fem.equations.variational import Descent, Energy, sector
from solvers.fem.mesh import Domain, from_mesh
from solvers.fem.spaces import communicator
from solvers.node.science.variational import Elements, area, membrane
from solvers.spaces import reduce, replicate

F64 = torch.float64


def stretched(u: Function) -> ufl.Form:
    return 0.5 * ufl.inner(ufl.grad(u), ufl.grad(u)) * ufl.dx


def bent(u: Function) -> ufl.Form:
    return ufl.sqrt(1 + ufl.inner(ufl.grad(u), ufl.grad(u))) * ufl.dx


def catenoid(cells: int, comm: MPI.Comm = MPI.COMM_WORLD) -> tuple[Domain, Tensor, Tensor]:
    """Its domain, held dofs and heights 0.8 arcosh(r / 0.8)."""
    domain = sector(1.0, 2.0, cells, comm=comm)
    r = torch.from_numpy(domain.points[: domain.n_owned]).norm(dim=1)
    return domain, (r < 1 + 1e-9) | (r > 2 - 1e-9), 0.8 * torch.acosh(r / 0.8)


def solved(cells: int, comm: MPI.Comm = MPI.COMM_WORLD) -> tuple[Domain, Tensor, Tensor]:
    """The domain, the surface found and the exact one."""
    domain, held, exact = catenoid(cells, comm)
    u = torch.zeros_like(exact)
    for energy in (stretched, bent):
        u = Descent(domain, energy, held, exact)(u, math.inf)
    return domain, u, exact


@pytest.mark.mpi
def test_the_catenoid_to_second_order() -> None:
    errors = []
    for cells in (8, 16):
        domain, u, exact = solved(cells)
        errors.append(math.sqrt(domain.integral((u - exact).square()) / domain.integral(exact.square())))
    assert errors[1] < 2e-3 and 3.4 < errors[0] / errors[1] < 4.6


@pytest.mark.mpi
def test_ranks_do_not_change_the_surface() -> None:
    (domain, u, _), (alone, single, _) = solved(8), solved(8, MPI.COMM_SELF)
    assert domain.integral(u.square()) == pytest.approx(alone.integral(single.square()), rel=1e-9)


@pytest.mark.mpi
def test_energies_on_the_tape_have_the_same_minimiser() -> None:
    """By Newton-CG over the free dofs, and by PETSc's Newton on the UFL residual."""
    domain, held, exact = catenoid(8)
    _, u, _ = solved(8)
    energy = Energy(domain, area, held, exact)
    problem = InverseProblem(energy.space, energy)
    stop = (GradientTolerance(1e-9), MaxIterations(30))
    found = newton_cg.minimise(problem, torch.zeros(len(energy.free), dtype=F64), "full", stopping=stop)
    torch.testing.assert_close(energy.state(found.m), u, rtol=0, atol=1e-7)
    exact_area = dolfinx.fem.assemble_scalar(dolfinx.fem.form(bent(domain.function(u))))
    assert found.value == pytest.approx(domain.comm.allreduce(exact_area), rel=1e-9)


def test_the_torch_form_has_the_same_numbers() -> None:
    domain, held, exact = catenoid(4, MPI.COMM_SELF)
    load = torch.linspace(0, 1, len(exact), dtype=F64)
    energy = Energy(domain, area, held, exact, load)
    elements = Elements(torch.from_numpy(domain.points[:, :2]), torch.from_numpy(domain.cell_dofs))
    m = exact[energy.free] + 0.1 * torch.randn(len(energy.free), dtype=F64)
    m.requires_grad_()
    values = [energy(m), elements.energy(energy.state(m), area, load)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, m)[0] for value in values]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.mpi
def test_the_gradient_flow_descends_to_the_surface_and_has_a_gradient() -> None:
    """Area falls from step to step; d u(T) / d (u(0), stiffness) against differences."""
    domain, held, exact = catenoid(6)
    stiffness = Constant(domain.mesh, 1.0)
    flow = Descent(domain, lambda u: stiffness * bent(u), held, exact, [stiffness])
    energy = Energy(domain, area, held, exact)
    u = Descent(domain, stretched, held, exact)(torch.zeros_like(exact), math.inf)
    areas = [float(energy(u[energy.free]))]
    for _ in range(4):
        u = flow(u, 0.2, 1.0)
        areas.append(float(energy(u[energy.free])))
    assert all(later < earlier for earlier, later in pairwise(areas))
    assert float((flow(u, math.inf, 1.0) - solved(6)[1]).abs().max()) < 1e-8

    comm = communicator(domain)
    direction = (~held).double() * domain.interpolate(lambda x: x[:, 0])

    def end(point: Tensor) -> Tensor:
        amount, k = replicate(point, comm)
        last = Evolution(flow)(exact + amount * direction, 0.3, 3, k)
        return reduce((domain.mass * last.square()).sum(), comm)

    point = torch.tensor([0.3, 1.2], dtype=F64, requires_grad=True)
    (found,) = torch.autograd.grad(end(point), point)
    with torch.no_grad():
        for k, unit in enumerate(1e-4 * torch.eye(2, dtype=F64)):
            difference = (end(point + unit) - end(point - unit)) / 2e-4
            assert float(found[k]) == pytest.approx(float(difference), rel=1e-5)


@pytest.mark.mpi
def test_a_membrane_over_a_half_ball_touches_it_where_it_should() -> None:
    """u = A log(2 / r) outside of the contact r <= a, 1 - a^2 = a^2 log(2 / a) (Bueler 2021, chapter 12)."""
    a = 0.697965148223374
    mesh = dolfinx.mesh.create_rectangle(
        MPI.COMM_WORLD, [[0.0, 0.0], [2.0, 2.0]], [24, 24], ghost_mode=dolfinx.mesh.GhostMode.none
    )
    domain = from_mesh(mesh)
    points = torch.from_numpy(domain.points[: domain.n_owned])
    r = points.norm(dim=1)
    ball = (1 - r.clamp(max=0.95).square()).sqrt() - 3.0 * (r - 0.95).clamp(min=0)
    slope = a**2 / math.sqrt(1 - a**2)
    exact = torch.where(r <= a, ball, slope * (2 / r.clamp(min=a)).log())
    energy = Energy(domain, membrane, (points > 2 - 1e-9).any(1), exact)
    low = ball[energy.free]
    problem = InverseProblem(energy.space, energy, bounds=(low, None))
    found = tao.minimise(problem, low.clamp(min=0), "bntr", "full", stopping=MaxIterations(100))
    u = energy.state(found.m)
    assert math.sqrt(domain.integral((u - exact).square()) / domain.integral(exact.square())) < 2e-3
    contact = domain.integral((u <= ball + 1e-9).double())
    assert math.sqrt(4 * contact / math.pi) == pytest.approx(a, abs=2 / 24)
    assert domain.comm.allreduce(float((u - ball).min()), MPI.MIN) > -1e-12


def test_a_load_bends_a_membrane() -> None:
    """-u'' = 1 across a strip, by the energy with a load: x (1 - x) / 2 at the vertices."""
    mesh = dolfinx.mesh.create_rectangle(MPI.COMM_SELF, [[0.0, 0.0], [1.0, 0.5]], [10, 5])
    domain = from_mesh(mesh)
    x = torch.from_numpy(domain.points[:, 0].copy())
    held = (x < 1e-9) | (x > 1 - 1e-9)
    energy = Energy(domain, membrane, held, torch.zeros_like(x), torch.ones_like(x))
    found = newton_cg.minimise(
        InverseProblem(energy.space, energy),
        energy.space.zeros(),
        "full",
        stopping=(GradientTolerance(1e-10), MaxIterations(20)),
    )
    torch.testing.assert_close(energy.state(found.m), x * (1 - x) / 2, rtol=0, atol=1e-8)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(GliodeError, match="0 < inner < outer"):
        sector(2.0, 1.0, 4)
    domain, held, exact = catenoid(2, MPI.COMM_SELF)
    flow = Descent(domain, bent, held, exact)
    with pytest.raises(GliodeError, match="dt must be positive"):
        flow(exact, 0.0)
