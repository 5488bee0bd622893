"""Discontinuous Galerkin on DOLFINx against arrays, closed forms, differences and, in parallel, one rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import dolfinx
import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor
from torch.autograd import gradgradcheck

from solvers.errors import GliodeError
from solvers.evolution import Evolution
from solvers.fem.equations.conservation import FemDG, line, rectangle, ring
from solvers.node.science import riemann
from solvers.node.science.activated import Stepped, Unknown
from solvers.node.science.conservation import DG, SSPStep
from solvers.node.science.laws import Burgers, Euler, Law, ShallowWater
from solvers.node.weights import Parameters
from solvers.spaces import reduce

F64 = torch.float64
SELF = MPI.COMM_SELF


def gas(x: Tensor) -> list[Any]:
    """A smooth flow in as many dimensions as x has."""
    velocity = [0.3 * torch.cos(4 * x[..., d]) for d in range(x.shape[-1])]
    density = 1 + 0.3 * torch.sin(6 * x[..., 0]) * torch.cos(x[..., -1])
    return Euler(x.shape[-1]).state(density, velocity, 1 + 0.4 * torch.cos(3 * x[..., 0] + x[..., -1]))


def water(x: Tensor) -> list[Any]:
    """Without symmetries: ties of a maximum have two derivatives."""
    a, b = x.unbind(-1)
    return [1 + 0.4 * torch.sin(5 * a + b), 0.2 * torch.cos(4 * b - a), 0.1 * torch.sin(a + 3 * b)]


def steep(x: Tensor) -> list[Any]:
    """Of the angle, so that it is periodic on a ring."""
    return [0.2 + x[..., 1] / (x**2).sum(-1).sqrt()]


CASES: dict[str, tuple[Law, Callable[[Any], Any], int, Any, Any]] = {
    "ring": (Burgers(), lambda comm: ring(1.0, 12, comm), 2, steep, "outflow"),
    "line": (Euler(), lambda comm: line(0.0, 1.0, 12, comm), 1, gas, "wall"),
    "triangles": (Euler(2), lambda comm: rectangle((0, 0), (1, 0.7), (4, 3), True, comm), 1, gas, "wall"),
    "squares": (
        ShallowWater(2),
        lambda comm: rectangle((0, 0), (1, 0.7), (4, 3), False, comm),
        2,
        water,
        [1.1, 0.2, -0.1],
    ),
}


def case(name: str, comm: Any = SELF) -> tuple[FemDG, Tensor, float]:
    """The form, a state, and a stable step."""
    law, mesh, degree, start, boundary = CASES[name]
    fem = FemDG(law, mesh(comm), degree, boundary, tvb=0.0)
    u = fem.project(start)
    return fem, u, 0.5 * fem.largest_step(u)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_the_form_and_the_arrays_agree_in_states_and_gradients(name: str) -> None:
    """Six limited steps; the gradient by the start and by the law's parameter."""
    fem, start, dt = case(name)
    law, boundary = CASES[name][0], CASES[name][4]
    dg = DG(law, fem.elements, boundary, tvb=0.0)
    w = torch.tensor(1.1 * next(iter(law.parameters.values())), dtype=F64, requires_grad=True)
    u, a = start.clone().requires_grad_(), fem.to_arrays(start).requires_grad_()
    v, b = Evolution(SSPStep(fem))(u, 6 * dt, 6, w), Evolution(SSPStep(dg))(a, 6 * dt, 6, w)
    assert relative(fem.to_arrays(v), b) < 1e-12
    direction = torch.randn(v.shape, dtype=F64)
    ours = torch.autograd.grad((v * direction).sum(), (u, w))
    theirs = torch.autograd.grad((b * fem.to_arrays(direction)).sum(), (a, w))
    assert relative(fem.to_arrays(ours[0]), theirs[0]) < 1e-10
    assert relative(ours[1], theirs[1]) < 1e-9


def test_a_ring_is_a_periodic_interval_with_the_closed_form_of_burgers() -> None:
    errors = []
    for cells in (16, 32):
        fem = FemDG(Burgers(), ring(1.0, cells, SELF), 1)
        corners = fem.space.mesh.geometry.x[:, :2]
        assert np.linalg.norm(corners - corners[0], axis=1).max() < 0.33  # a polygon of perimeter 1
        points = fem.elements.points
        angle = torch.atan2(points[..., 1], points[..., 0])
        radius = math.cos(math.pi / cells) / (2 * cells * math.sin(math.pi / cells))
        arc = cells * radius * math.tan(math.pi / cells) * 2  # the perimeter by its inner radius
        assert arc == pytest.approx(1.0)
        # On edge j the arc is the edge's start plus the distance along it, the tangent of the rest angle.
        edge = torch.floor(angle / (2 * math.pi / cells))
        rest = angle - (edge + 0.5) * 2 * math.pi / cells
        s = (edge + 0.5) / cells + radius * torch.tan(rest)

        def exact(t: float, s: Tensor = s) -> Tensor:
            return torch.from_numpy(riemann.burgers_wave(s.numpy(), t, 0.5, 0.3))

        u = Evolution(SSPStep(fem))(fem.project(lambda x: [exact(0.0)]), 0.2, cells)
        gap = fem.elements.evaluate(fem.to_arrays(u))[..., 0] - exact(0.2)
        errors.append(float((gap**2 * fem.elements.weights).sum() ** 0.5))
        assert float((fem.integral(u) - 0.5).abs()) < 1e-13
    assert errors[1] < 2e-3 and math.log2(errors[0] / errors[1]) > 1.8


def test_second_derivatives_and_forward_mode_are_exact() -> None:
    fem, u, _ = case("line")
    gamma = torch.tensor(1.3, dtype=F64)
    some = torch.randn(u.shape, dtype=F64)

    def residual(u: Tensor, gamma: Tensor) -> Tensor:
        return (fem(0.0, u, gamma) * some).sum()

    assert gradgradcheck(residual, (u.requires_grad_(), gamma.requires_grad_()), fast_mode=True, eps=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(gamma.detach(), torch.tensor(1.0, dtype=F64))
        tangent = torch.autograd.forward_ad.unpack_dual(residual(u.detach(), dual)).tangent
    difference = (residual(u, gamma + 1e-5) - residual(u, gamma - 1e-5)) / 2e-5
    assert float(tangent) == pytest.approx(float(difference), rel=1e-7)


@pytest.mark.mpi
@pytest.mark.parametrize("name", CASES)
def test_a_run_and_its_gradient_do_not_depend_on_the_number_of_ranks(name: str) -> None:
    """Moments of the final state, and their derivative by an unknown of the flux."""
    found = []
    for comm in (MPI.COMM_WORLD, SELF):
        fem, u, _ = case(name, comm)
        parameter, value = next(iter(fem.law.parameters.items()))
        network = Stepped(SSPStep(fem), {parameter: Unknown(1.05 * value)}, 0.02, 8, comm=comm)
        trained = Parameters(network)
        m = trained.pack().requires_grad_()
        v = torch.func.functional_call(network, dict(trained.unpack(m)), (u,))
        owned = slice(0, fem.to_arrays(u).shape[0] if comm.size == 1 else fem._cells)
        e = fem.elements
        at = e.evaluate(fem.to_arrays(v))[owned]
        weights = e.weights if len(e.weights) == 1 else e.weights[owned]
        x = e.points[owned]
        moments = [
            (weights[..., None] * at**2 * (1 + x[..., d, None])).sum((0, 1)) for d in (0, 1 % x.shape[-1])
        ]
        total = reduce(torch.stack(moments), comm if comm.size > 1 else None)
        (gradient,) = torch.autograd.grad(total.sum(), m)
        found.append((total.detach(), gradient, fem.integral(v).detach()))
    for parallel, serial in zip(*found, strict=True):
        torch.testing.assert_close(parallel, serial, rtol=1e-10, atol=1e-13)


def test_a_step_beyond_the_cfl_condition_and_bad_input_are_refused() -> None:
    fem, u, dt = case("line")
    with pytest.raises(GliodeError, match=f"largest stable step here is {2 * dt:.4g}"):
        SSPStep(fem)(u, 2.1 * dt)
    with pytest.raises(GliodeError, match="state"):
        fem(0.0, u[:-1])
    with pytest.raises(GliodeError, match="one number"):
        fem(0.0, u, torch.ones(3, dtype=F64))
    with pytest.raises(GliodeError, match="degree"):
        FemDG(Burgers(), line(0, 1, 4, SELF), 5)
    with pytest.raises(GliodeError, match="wall"):
        FemDG(Burgers(), line(0, 1, 4, SELF), 1, "wall")
    with pytest.raises(GliodeError, match="3 or more"):
        ring(1.0, 2, SELF)
    mesh = dolfinx.mesh.create_unit_cube(SELF, 1, 1, 1)
    with pytest.raises(GliodeError, match="tetrahedron"):
        FemDG(Burgers(2), mesh, 1)
