"""Convolutional flows: against scipy's correlations and dense matrices; the denoiser's certificate by SVD."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.signal import correlate2d
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from solvers.errors import GliodeError
from solvers.node.activations import Activation
from solvers.node.convolution_flow import ConvolutionalFlow, NonExpansiveDenoiser, folded, mirrored
from solvers.node.convolutions import norm_bound
from solvers.ode.integrate import integrate

SHAPE = 7, 6


def random_flow(limit: float = math.inf, sigma: str = "tanh", size: int = 5) -> ConvolutionalFlow:
    torch.manual_seed(2)
    flow = ConvolutionalFlow(2, size, sigma, "steps", 3, 3.0, limit, 0.7).double()
    nn.init.normal_(flow.K.values)
    nn.init.normal_(flow.b.values)
    return flow


def rough(denoiser: NonExpansiveDenoiser, gain: float = 1.0) -> NonExpansiveDenoiser:
    """With weights far from a tight frame, above the limit where the gain is large."""
    torch.manual_seed(5)
    for weights in (denoiser.field.K, denoiser.field.b, denoiser.field.log_a):
        nn.init.normal_(weights.values, std=gain)
    return denoiser.double()


def dense(bank: Tensor, shape: tuple[int, int] = SHAPE) -> NDArray[np.float64]:
    """The matrix of K on images of a shape, column by column, by scipy."""
    columns, edge = [], bank.shape[-1] // 2
    for unit in np.eye(math.prod(shape)):
        image = np.pad(unit.reshape(shape), edge, mode="symmetric")
        columns.append([correlate2d(image, k, mode="valid").ravel() for k in bank.detach()[:, 0].numpy()])
    return np.array(columns).reshape(len(columns), -1).T


# ---- The field --------------------------------------------------------------------------------------------


def test_mirrored_images_are_numpys_and_folding_is_the_adjoint() -> None:
    x, edge = torch.randn(2, *SHAPE, dtype=torch.float64), 3
    whole = mirrored(x, edge)
    np.testing.assert_array_equal(whole, np.pad(x, [(0, 0), (edge, edge), (edge, edge)], mode="symmetric"))
    y = torch.randn_like(whole)
    assert float((whole * y).sum()) == pytest.approx(float((x * folded(y, edge)).sum()))


def test_field_is_minus_the_gradient_of_the_energy_by_dense_matrices() -> None:
    """Of E(x) = sum a^2 log cosh(K x / a + b), K by scipy."""
    flow = random_flow()
    with torch.no_grad():
        flow.log_a.values.normal_()
    x = torch.randn(3, *SHAPE, dtype=torch.float64)
    stages = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    sampled = flow.sample(stages)
    for n in range(3):
        found = flow.rhs(x, *(w.table[w.index[n][0]] for w in sampled))
        K = dense(flow.bank(flow.K.values[n]))
        a, b = (
            np.repeat(np.tile(values[n].detach(), 4), math.prod(SHAPE))
            for values in (flow.log_a.values.exp(), flow.b.values)
        )
        expected = -(a * np.tanh(x.reshape(3, -1).numpy() @ K.T / a + b)) @ K
        np.testing.assert_allclose(found.detach().reshape(3, -1), expected, rtol=1e-10, atol=1e-12)
    flat = torch.full((1, *SHAPE), 0.4, dtype=torch.float64)
    with torch.no_grad():
        flow.b.values.zero_()
    rows = [w.table[0] for w in flow.sample(stages)]
    assert float(flow.rhs(flat, *rows).abs().max()) < 1e-13  # a flat image is left alone


def test_discrete_adjoint_and_tape_agree() -> None:
    flow = random_flow(1.0)
    x, grads = torch.randn(2, *SHAPE, dtype=torch.float64), []
    for gradient in ("adjoint", "autograd"):
        start = x.clone().requires_grad_()
        end = integrate(flow, start, torch.linspace(0, 3, 4).double(), "euler", gradient)
        grads.append(torch.autograd.grad(end.square().sum(), (start, *flow.parameters())))
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


# ---- The norm ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 5])
def test_norm_is_within_the_limit_edges_included(size: int) -> None:
    flow = random_flow(0.8, size=size)
    norms = [np.linalg.norm(dense(flow.bank(k)), 2) for k in flow.K.values]
    assert 0.7 < max(norms) <= 0.8
    tight = ConvolutionalFlow(6, size, limit=0.8).double()
    assert 0.75 < np.linalg.norm(dense(tight.bank(tight.K.values[0])), 2) <= 0.8


def test_without_the_flips_the_edges_break_the_bound() -> None:
    """So that the test above says something: at a mirrored edge one filter alone may see its pixels twice."""
    alone = torch.tensor([[[[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]]], dtype=torch.float64)
    assert np.linalg.norm(dense(alone), 2) > 1.02 * float(norm_bound(alone))


# ---- The denoiser -----------------------------------------------------------------------------------------


def jacobians(denoiser: NonExpansiveDenoiser, count: int = 4) -> Tensor:
    n = math.prod(SHAPE)
    x = torch.randn(count, 1, *SHAPE, dtype=torch.float64)
    return torch.stack([jacobian(denoiser, one).reshape(n, n) for one in x])


@pytest.mark.parametrize("sigma", ["tanh", "relu", "sigmoid"])
@pytest.mark.parametrize(("steps", "each", "gain"), [(1, 0.5, 3.0), (3, 0.5, 1.0), (2, 0.9, 1.0)])
def test_it_is_averaged_by_its_jacobians(sigma: str, steps: int, each: float, gain: float) -> None:
    """||J|| <= 1 and ||J - (1 - alpha) I|| <= alpha; Jacobians by the tape, norms by SVD."""
    denoiser = rough(NonExpansiveDenoiser(2, 3, sigma, steps, each), gain)
    alpha = denoiser.averaged
    assert alpha == pytest.approx(steps / (steps + 1) if each == 0.5 else 18 / 19)
    J = jacobians(denoiser)
    rest = J - (1 - alpha) * torch.eye(J.shape[-1], dtype=torch.float64)
    assert np.linalg.norm(J, 2, axis=(1, 2)).max() <= 1 + 1e-12
    assert np.linalg.norm(rest, 2, axis=(1, 2)).max() <= alpha + 1e-12


def test_constant_of_one_step_is_sharp() -> None:
    """Of a linear step with a tight frame: a constant of less than `each` would not do."""
    torch.manual_seed(0)
    denoiser = NonExpansiveDenoiser(4, 3, "tanh", 1, 0.9, 1.0).double()
    nn.init.constant_(denoiser.field.log_a.values, 20.0)
    J = jacobians(denoiser, 1)[0]
    alpha = 0.88
    assert np.linalg.norm(J - (1 - alpha) * torch.eye(len(J)).double(), 2) > alpha + 0.01
    assert float(torch.linalg.eigvalsh((J + J.T) / 2).min()) == pytest.approx(1 - 2 * 0.9, abs=0.02)


def test_no_pair_breaks_the_inequality_of_averaged_maps() -> None:
    """||Dx - Dz||^2 + (1 - alpha)/alpha ||(x - Dx) - (z - Dz)||^2 <= ||x - z||^2, near and far."""
    for level in (0.1, 3.0):
        denoiser = rough(NonExpansiveDenoiser(3, 5, "tanh", 2, 0.6)).at(level)
        x = torch.randn(200, *SHAPE, dtype=torch.float64)
        z = x + 10 ** (1 - 4 * torch.rand(200, 1, 1, dtype=torch.float64)) * torch.randn_like(x)
        moved, apart = denoiser(x) - denoiser(z), x - z
        weight = (1 - denoiser.averaged) / denoiser.averaged
        left = moved.square().sum((1, 2)) + weight * (apart - moved).square().sum((1, 2))
        assert float((left / apart.square().sum((1, 2))).max()) <= 1 + 1e-12


def test_levels_are_one_map_in_other_units() -> None:
    denoiser = rough(NonExpansiveDenoiser(2, 3, steps=2, level=1.0))
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    assert torch.allclose(denoiser.at(0.3)(x), 0.3 * denoiser(x / 0.3))
    assert denoiser.level == 1.0 and denoiser.at(0.3).averaged == denoiser.averaged
    frozen = denoiser.at(0.3)
    assert not any(p.requires_grad for p in frozen.parameters())
    before = frozen(x)
    frozen.field.K.values.mul_(-0.5)  # what is kept of frozen weights is made anew
    assert not torch.allclose(frozen(x), before)
    assert frozen.float()(x).dtype == torch.float64
    assert torch.allclose(frozen(x), frozen.double()(x), atol=1e-5)


# ---- What is refused --------------------------------------------------------------------------------------


def test_what_makes_no_sense_is_refused() -> None:
    sine = Activation.custom("sine", torch.sin, torch.cos, (-1, 1))
    steep = Activation.custom("steep", lambda z: 2 * z, lambda z: 2 * torch.ones_like(z), (2, 2))
    with pytest.raises(GliodeError, match="odd size"):
        ConvolutionalFlow(4, 4)
    with pytest.raises(GliodeError, match="positive"):
        ConvolutionalFlow(4, 3, width=0.0)
    with pytest.raises(GliodeError, match="sine has slopes down to"):
        ConvolutionalFlow(4, 3, sine)
    with pytest.raises(GliodeError, match=r"steep reach from 2 to 2"):
        NonExpansiveDenoiser(4, 3, steep)
    with pytest.raises(GliodeError, match="between 0 and 1"):
        NonExpansiveDenoiser(each=1.0)
    with pytest.raises(GliodeError, match="0 steps"):
        NonExpansiveDenoiser(steps=0)
    with pytest.raises(GliodeError, match="level"):
        NonExpansiveDenoiser(level=0.0)
    with pytest.raises(GliodeError, match="7 pixels and more"):
        NonExpansiveDenoiser()(torch.zeros(1, 6, 20))
