"""Unrolled methods: what they are without their trained parts, their derivatives, and the certified bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from inverse.image_problems import ImageProblem, image_problem, validation_truths
from inverse.linear_problems import LinearMap
from inverse.optimizers import landweber
from inverse.regularizers.learned import files
from inverse.regularizers.learned.unrolled import ContinuousUnrolling, LearnedDescent
from inverse.stopping import MaxIterations
from solvers.errors import GliodeError
from solvers.node.models import Node
from solvers.node.regularisation_flow import RegularisationFlow

SIZE = 10
FOE = {"channels": [4], "sizes": [3], "potential": "student"}


def matrix_problem(naive: bool = True) -> tuple[ImageProblem, Tensor]:
    """A of 30 data from 10 x 10 pixels by a matrix; the naive images A^T y, or none."""
    generator = torch.Generator().manual_seed(8)
    a = torch.randn(30, SIZE**2, dtype=torch.float64, generator=generator) / 4
    shape = SIZE, SIZE

    def forward(x: Tensor) -> Tensor:
        return x.flatten(-2) @ a.T

    def back(y: Tensor) -> Tensor:
        return (y @ a).unflatten(-1, shape)

    A = LinearMap(shape, (30,), forward, back)
    return ImageProblem("matrix", A, 0.1, A.adjoint if naive else lambda y: torch.zeros_like(A.adjoint(y))), a


def continuous(steps: int = 6, problem: ImageProblem | None = None) -> ContinuousUnrolling:
    """With weights that differ from depth to depth and are above the limit."""
    torch.manual_seed(1)
    net = ContinuousUnrolling("deconvolution", SIZE, 3, 3, "tanh", 3, steps, 1.5, 0.7, 0.2).double()
    nn.init.normal_(net.flow.K.values)
    nn.init.normal_(net.flow.b.values)
    return net if problem is None else net.on(problem)


def data(count: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(count, 30, dtype=torch.float64, generator=generator)


def test_descent_without_energies_is_landwebers_iteration() -> None:
    problem, _ = matrix_problem()
    net = LearnedDescent("deconvolution", SIZE, "ridge", FOE, steps=7).double().on(problem)
    nn.init.constant_(net.log_mu, -math.inf)
    y = data()
    for found, one in zip(net(y), y, strict=True):
        step = (problem.sd / problem.norm) ** 2
        start = problem.naive(one).reshape(-1)
        wanted = landweber.minimise(problem.least_squares(one), start, step, stopping=MaxIterations(7))
        np.testing.assert_allclose(found.detach().reshape(-1), wanted.m, rtol=1e-9)


def test_a_step_is_the_gradient_of_misfit_and_energy() -> None:
    problem, a = matrix_problem()
    net = LearnedDescent("deconvolution", SIZE, "ridge", FOE, steps=1, scale=3.0).double().on(problem)
    nn.init.constant_(net.log_tau, math.log(0.4))
    y, mu = data(1), math.exp(float(net.log_mu))
    x = (y @ a).reshape(1, SIZE, SIZE).requires_grad_()
    misfit = (x.reshape(1, -1) @ a.T - y).square().sum() / 2 / float(torch.linalg.matrix_norm(a, 2)) ** 2
    (slope,) = torch.autograd.grad(misfit + mu / 9 * net.energies[0](3 * x).sum(), x)
    np.testing.assert_allclose(net(y).detach(), (x - 0.4 * slope).detach(), rtol=1e-8, atol=1e-10)


def test_continuous_unrolling_is_the_regularisation_flow_of_its_dense_matrices() -> None:
    """With weights that do not change with depth; against RegularisationFlow, by Kutta's method."""
    problem, a = matrix_problem()
    ends = []
    for steps in (40, 80):
        net = continuous(steps, problem)
        with torch.no_grad():
            net.flow.K.values.copy_(net.flow.K.values[:1].expand_as(net.flow.K.values).clone())
            net.flow.b.values.zero_()
        ends.append(net(data()).detach())
    n = SIZE**2
    unit = torch.eye(n, dtype=torch.float64).reshape(n, SIZE, SIZE)
    linear = net.flow  # the columns of K, from its linear part: widths without end
    nn.init.constant_(linear.log_a.values, 30.0)
    rows = [w.table[0] for w in linear.sample(torch.zeros(1, 1, dtype=torch.float64))]
    gram = -linear.rhs(unit, *rows).reshape(n, n).detach()  # K^T K
    values, vectors = torch.linalg.eigh(gram)
    assert float(values[-1]) <= 1 + 1e-9 and float(values[-1]) > 0.5
    time, pull = (float(v) for v in net.constants())
    ends_linear = net(data()).detach()
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    flow = RegularisationFlow(n, a, data(), pull / problem.norm**2, sigma="identity", duration=time).double()
    with torch.no_grad():
        flow.weights("K").values.copy_(root.expand(2, n, n))
    exact = Node(flow, time, 100, "kutta4")(data() @ a).detach()
    error = float((ends_linear.reshape(2, n) - exact).norm() / exact.norm())
    assert 1e-5 < error < 0.02  # Euler's, of 80 steps
    assert float((ends[0] - ends[1]).norm()) < 0.02 * float(ends[1].norm())


def test_gradients_by_time_and_pull_are_those_of_differences() -> None:
    net, y = continuous(problem=matrix_problem()[0]), data()
    target = torch.randn(2, SIZE, SIZE, dtype=torch.float64)
    names = ("log_time", "log_pull")
    slopes = torch.autograd.grad((net(y) * target).sum(), [getattr(net, name) for name in names])
    for name, slope in zip(names, slopes, strict=True):
        values = []
        for e in (1e-5, -1e-5):
            moved = {name: getattr(net, name) + e}
            values.append(float((torch.func.functional_call(net, moved, (y,)) * target).sum()))
        assert float(slope) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)
        assert abs(float(slope)) > 1e-3


@pytest.mark.parametrize("log_time", [0.0, 9.0])
def test_noise_is_amplified_no_further_than_certified(log_time: float) -> None:
    """From zero, so that ||B|| = 0, and however long a time is asked for."""
    problem, a = matrix_problem(naive=False)
    net = continuous(5, problem)
    nn.init.constant_(net.log_time, log_time)
    y, worst = data(50), torch.linalg.svd(a)[0][:, 0]
    for e in (1e-3 * torch.randn_like(y), 5 * torch.randn_like(y), 0.1 * worst.expand_as(y)):
        moved = (net(y + e) - net(y)).detach().flatten(1).norm(dim=1) / e.norm(dim=1)
        assert 0.01 * net.amplification() < float(moved.max()) <= net.amplification() * (1 + 1e-9)
    time, pull = (float(v) for v in net.constants())
    assert time * (1 + pull) <= 10 * (1 + 1e-12)
    assert net.amplification() == pytest.approx(time * pull / float(torch.linalg.matrix_norm(a, 2)))


def test_settings_make_it_again_and_other_problems_are_taken_up() -> None:
    torch.manual_seed(0)
    for net in (
        LearnedDescent("deconvolution", 16, "ridge", FOE, steps=2),
        ContinuousUnrolling("tomography", 16, 2, 3, steps=2),
    ):
        again = type(net)(**net.settings())
        again.load_state_dict(net.state_dict())
        y = net.problem.A(torch.rand(2, 16, 16))
        assert torch.equal(again(y), net(y))
        with pytest.raises(GliodeError, match="call `on`"):
            net(torch.zeros(2, 5, 5))
        other = image_problem("sparse_tomography", 20)
        assert net.on(other)(other.A(torch.rand(1, 20, 20))).shape == (1, 20, 20)


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(GliodeError, match="none is called 'blur'"):
        ContinuousUnrolling("blur", 16)
    with pytest.raises(GliodeError, match="0 steps"):
        LearnedDescent("deconvolution", 16, "ridge", FOE, steps=0)
    with pytest.raises(GliodeError, match="time -1"):
        ContinuousUnrolling("deconvolution", 16, time=-1.0)
    with pytest.raises(GliodeError, match="no energy"):
        LearnedDescent("deconvolution", 16, "non_expansive", {}, steps=1)
    with pytest.raises(GliodeError, match="not one of"):
        LearnedDescent("deconvolution", 16, "wavelets", {}, steps=1)


def test_shipped_weights_restore_better_than_the_naive_inversion() -> None:
    """At another size than that trained on, on validation pictures; less so at four times the noise."""
    net, card = files.load(files.shipped("unrolled_deconvolution"), units="1")
    assert isinstance(net, ContinuousUnrolling) and card.guarantee is None
    problem = image_problem("deconvolution", 64)
    truths, gains = validation_truths(64).float(), []
    for level in (1.0, 4.0):
        y = problem.measured(truths, 5, level)
        errors = [(x - truths).square().mean((1, 2)) for x in (net.on(problem)(y), problem.naive(y))]
        gains.append(float((10 * (errors[1] / errors[0]).log10()).mean()))
    assert gains[0] > 2.0 and gains[1] > 0.0
