"""The stepped form on DOLFINx: the torch form of the same problem, and two ranks against one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import ufl
from dolfinx.fem import Constant, Function
from mpi4py import MPI
from torch import Tensor
from torch.func import functional_call

from solvers.fem.implicit import ImplicitStep
from solvers.fem.mesh import Domain, voxels
from solvers.fem.spaces import lumped
from solvers.node.science.activated import Stepped, Unknown
from solvers.node.weights import Parameters
from solvers.spaces import reduce

SELF, WORLD = MPI.COMM_SELF, MPI.COMM_WORLD
F64 = torch.float64


def domain(comm: MPI.Comm) -> Domain:
    return voxels(np.ones((4, 3, 2), dtype=bool), np.diag([1.0, 1.0, 2.0, 1.0]), comm=comm)


def network(on: Domain) -> Stepped:
    """u_t = D u_xx + rho(t) u (1 - u) + s(x): a number, a function of depth and one of space."""
    u1, u0, s = Function(on.V), Function(on.V), Function(on.V)
    v = ufl.TestFunction(on.V)
    dt, D, rho = (Constant(on.mesh, 0.0) for _ in range(3))
    flux = D * ufl.inner(ufl.grad(u1), ufl.grad(v))
    F = ((u1 - u0) * v + dt * (flux - (rho * u1 * (1 - u1) + s) * v)) * ufl.dx
    step = ImplicitStep(F, u1, u0, [dt, D, rho, s])
    unknowns = {
        "D": Unknown(0.3, positive=True),
        "rho": Unknown(0.4, depth="linear", knots=3, duration=1.0),
        "s": Unknown(0.05 * torch.ones(on.n_owned, dtype=F64), space=lumped(on)),
    }

    def advance(u: Tensor, h: float, D: Tensor, rho: Tensor, s: Tensor) -> Tensor:
        return step(u, h, D, rho, s)

    comm = on.comm if on.comm.size > 1 else None
    return Stepped(advance, unknowns, duration=1.0, steps=4, comm=comm, checkpoint=2)


def value_and_gradient(on: Domain) -> tuple[float, dict[str, Tensor], float]:
    """J = int u(1)^2, its gradient by name, and its norm in the product space."""
    net = network(on)
    parameters = Parameters(net, length=0.5)
    u0 = on.interpolate(lambda x: 0.2 + 0.1 * np.cos(x[:, 0]))
    m = parameters.pack().requires_grad_()
    u = functional_call(net, dict(parameters.unpack(m)), (u0,))
    J = reduce((on.mass * u.square()).sum(), on.comm)
    (gradient,) = torch.autograd.grad(J, m)
    by_name = {name.split(".")[2]: part.detach() for name, part in parameters.space.unpack(gradient).items()}
    return float(J.detach()), by_name, parameters.space.dual_norm(gradient)


def test_the_gradient_is_that_of_differences() -> None:
    on = domain(SELF)
    net = network(on)
    parameters = Parameters(net)
    u0 = on.interpolate(lambda x: 0.2 + 0.1 * np.cos(x[:, 0]))

    def J(m: Tensor) -> float:
        with torch.no_grad():
            u = functional_call(net, dict(parameters.unpack(m)), (u0,))
            return float((on.mass * u.square()).sum())

    _, gradient, _ = value_and_gradient(on)
    m = parameters.pack()
    flat = torch.cat([gradient[name].reshape(-1) for name in ("D", "rho", "s")])
    direction = torch.randn(m.shape, dtype=F64, generator=torch.Generator().manual_seed(2))
    eps = 1e-5
    difference = (J(m + eps * direction) - J(m - eps * direction)) / (2 * eps)
    assert float(flat @ direction) == pytest.approx(difference, rel=1e-7)


@pytest.mark.mpi
def test_ranks_agree_with_one_process() -> None:
    one, many = value_and_gradient(domain(SELF)), value_and_gradient(domain(WORLD))
    assert many[0] == pytest.approx(one[0], rel=1e-10)
    assert many[2] == pytest.approx(one[2], rel=1e-8)
    for name in ("D", "rho"):
        torch.testing.assert_close(many[1][name], one[1][name], rtol=1e-8, atol=1e-12)
    total = WORLD.allreduce(float(many[1]["s"].sum()))
    assert total == pytest.approx(float(one[1]["s"].sum()), rel=1e-9)
