"""Function spaces of a domain against integrals in closed form and a dense finite-element solve."""

import math

import numpy as np
import pytest
import torch
from mpi4py import MPI

from solvers.errors import GliodeError
from solvers.fem import mesh
from solvers.fem.spaces import lumped, sobolev

pytestmark = pytest.mark.mpi


def test_norms_are_those_of_the_integrals() -> None:
    domain = mesh.box((1.0, 0.1, 0.1), (40, 4, 4))
    u = domain.interpolate(lambda x: np.cos(np.pi * x[:, 0]))
    volume = 0.01
    assert lumped(domain).inner(u, u) == pytest.approx(volume / 2, rel=1e-3)
    slope = volume * math.pi**2 / 2
    assert sobolev(domain, 0.3).inner(u, u) == pytest.approx(volume / 2 + 0.09 * slope, rel=2e-3)


def test_an_h1_gradient_solves_the_elliptic_problem() -> None:
    domain = mesh.box((1.0, 0.1, 0.1), (40, 4, 4))
    space, u = sobolev(domain, 0.3), domain.interpolate(lambda x: np.cos(np.pi * x[:, 0]))
    found = space.riesz(domain.mass * u)
    error = (found - u / (1 + (0.3 * math.pi) ** 2)).abs().max().item()
    assert MPI.COMM_WORLD.allreduce(error, op=MPI.MAX) < 1e-3
    torch.testing.assert_close(space.gram(found), domain.mass * u, rtol=1e-7, atol=1e-12)


def test_a_length_that_is_none_is_refused() -> None:
    with pytest.raises(GliodeError, match="lumped"):
        sobolev(mesh.interval(1.0, 4), 0.0)
