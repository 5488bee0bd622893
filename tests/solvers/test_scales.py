"""Smoothing at several lengths on graphs against closed forms and dense inverses."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import sparse
from torch.autograd import gradcheck, gradgradcheck

from solvers.errors import GliodeError
from solvers.scales import Scales, checked_lengths
from solvers.spaces import Diagonal

N, H = 30, 2.0
LENGTHS = (0.0, 3.0, 20.0)


def path(lengths: tuple[float, ...] = LENGTHS, direct: int = 100, uneven: bool = False) -> Scales:
    """N points H mm apart, each standing for H mm; uneven: of other weights."""
    D = sparse.diags_array([-np.ones(N - 1), np.ones(N - 1)], offsets=[0, 1], shape=(N - 1, N)) / H
    generator = torch.Generator().manual_seed(0)
    mass, weights = (
        H * (1 + torch.rand(n, dtype=torch.float64, generator=generator) * uneven) for n in (N, N - 1)
    )
    return Scales(Diagonal(mass), D, weights, 4 * (1 + uneven) / H**2, lengths, direct=direct)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("direct", [0, 100])
def test_cosines_are_damped_by_the_symbol(direct: int) -> None:
    operators, k = path(direct=direct), np.arange(N)
    modes = torch.from_numpy(np.cos(np.pi * np.outer(k, k + 0.5) / N))
    t = 4 / H**2 * np.sin(np.pi * k / (2 * N)) ** 2
    expected = [modes / (1 + length**2 * torch.from_numpy(t))[:, None] for length in LENGTHS]
    torch.testing.assert_close(operators.smooth(modes), torch.stack(expected, 1), rtol=0, atol=1e-8)
    assert torch.equal(operators.smooth(modes)[:, 0], modes)


@pytest.mark.parametrize("direct", [0, 100])
def test_it_is_the_dense_inverse_and_its_transpose(direct: int) -> None:
    operators = path(direct=direct, uneven=True)
    D = np.stack([operators.slopes(e)[0].numpy() for e in torch.eye(N).double()], 1)
    M, K = np.diag(operators.space.weights), D.T @ np.diag(operators.weights) @ D
    dense = torch.from_numpy(np.stack([np.linalg.inv(M + length**2 * K) @ M for length in LENGTHS]))
    m, y, q = noise(4, N), noise(4, len(LENGTHS), N), noise(4, 1, N - 1)
    atol = 1e-7 if direct == 0 else 1e-12
    torch.testing.assert_close(operators.smooth(m), torch.einsum("kij,bj->bki", dense, m), rtol=0, atol=atol)
    duals = torch.einsum("kji,bkj->bi", dense, y)
    torch.testing.assert_close(operators.smooth_adjoint(y), duals, rtol=0, atol=atol)
    torch.testing.assert_close(operators.slopes_adjoint(q)[:, :], q[:, 0] @ torch.from_numpy(D))
    assert float((operators.smooth(m) * y).sum()) == pytest.approx(
        float((m * operators.smooth_adjoint(y)).sum()), rel=1e-12
    )


def test_the_tolerance_is_that_of_the_symbol() -> None:
    coarse, fine = path(direct=0), path()
    worst = {}
    for rtol in (1e-2, 1e-5):
        coarse = Scales(fine.space, fine._D, fine.weights, fine.bound, LENGTHS, rtol, direct=0)
        errors = coarse.smooth(torch.eye(N).double()) - fine.smooth(torch.eye(N).double())
        worst[rtol] = float(torch.linalg.matrix_norm(errors.transpose(0, 1), 2).max())
    assert 1e-4 < worst[1e-2] <= 1e-2 and 1e-8 < worst[1e-5] <= 1e-5


@pytest.mark.parametrize("direct", [0, 100])
def test_they_are_on_the_tape_and_in_single_precision(direct: int) -> None:
    operators = path((0.0, 2.0), direct)
    m, y = noise(1, N).requires_grad_(), noise(1, 2, N).requires_grad_()
    assert gradcheck(lambda v: operators.smooth(v)[:, :, :2], (m,), check_forward_ad=True)
    assert gradcheck(lambda v: operators.smooth_adjoint(v)[:, :2], (y,), check_forward_ad=True)
    assert gradgradcheck(lambda v: operators.slopes_adjoint(operators.slopes(v) ** 3)[:, :2], (m,))
    single = operators.smooth(m.detach().float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), operators.smooth(m.detach()), rtol=0, atol=2e-5)


def test_a_copy_is_itself_and_senseless_input_is_refused() -> None:
    operators = path()
    assert copy.deepcopy(operators) is operators
    for lengths in ((), (4.0, 4.0), (-1.0, 2.0), (0.0, math.nan)):
        with pytest.raises(GliodeError, match="rising"):
            checked_lengths(lengths)
    with pytest.raises(GliodeError, match="bound"):
        Scales(operators.space, operators._D, operators.weights, 0.0, LENGTHS)
    with pytest.raises(GliodeError, match="points"):
        Scales(operators.space, operators._D, operators.weights[1:], 1.0, LENGTHS)
