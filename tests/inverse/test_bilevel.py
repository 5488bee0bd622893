"""Hypergradients against differences of the upper loss and against dense linear algebra."""

from typing import Any

import pytest
import torch
from torch import Tensor

from inverse.losses import SquaredError
from inverse.methods import Adam
from inverse.problem import InverseProblem, LeastSquares
from inverse.regularizers.learned.energy import Energy, Guarantee
from inverse.trainers.bilevel import Bilevel, Term, lower_solver
from inverse.training import train
from solvers.errors import GliodeError
from solvers.spaces import Diagonal, Euclidean


class Smooth(Energy):
    """sum log cosh(a (K x)) / a^2 + |x|^2 / 4, K and a trained."""

    def __init__(self, n: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.K = torch.nn.Parameter(torch.randn(n, n, generator=generator, dtype=torch.float64) / n**0.5)
        self.a = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (torch.cosh(self.a * x @ self.K.mT)).log().sum(1) / self.a**2 + x.square().sum(1) / 4

    def guarantee(self) -> Guarantee:
        return Guarantee(0.0, 0.5 + float(torch.linalg.matrix_norm(self.K, 2)) ** 2, True)

    def settings(self) -> dict[str, Any]:
        return {"n": len(self.K)}


A = torch.randn(4, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def nonlinear(m: Tensor) -> Tensor:
    return torch.tanh(m.view(-1, 6) @ A.mT)


def make(y: Tensor, R: Term) -> InverseProblem:
    return LeastSquares(Euclidean(6 * len(y)), nonlinear, y, 0.3, R)


def start(y: Tensor) -> Tensor:
    return torch.zeros(6 * len(y), dtype=torch.float64)


def data(n: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(n, 6, generator=generator, dtype=torch.float64)
    return nonlinear(truth) + 0.05 * torch.randn(n, 4, generator=generator, dtype=torch.float64), truth


def model(**options: Any) -> Bilevel:
    solve = lower_solver(1e-11, 2000)
    return Bilevel(Smooth(6), make, start, (6,), 0.7, solve=solve, rtol=1e-12, **options)


def test_hypergradients_are_those_of_differences() -> None:
    bilevel = model()
    y, truth = data()
    loss = SquaredError()
    found = loss(bilevel(y), truth)
    parameters = [p.data for p in bilevel.parameters()]
    gradients = torch.autograd.grad(found, list(bilevel.parameters()))
    for parameter, gradient in zip(parameters, gradients, strict=True):
        d = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        values = []
        for h in (1e-4, -1e-4):
            parameter.add_(d, alpha=h)
            with torch.no_grad():
                values.append(float(loss(bilevel(y), truth)))
            parameter.sub_(d, alpha=h)
        assert float((gradient * d).sum()) == pytest.approx((values[0] - values[1]) / 2e-4, rel=5e-5)


def test_the_metric_of_the_space_changes_minres_but_not_its_answer() -> None:
    weights = torch.linspace(0.1, 3.0, 18, dtype=torch.float64)
    bilevel = model()
    y, truth = data()
    plain = torch.autograd.grad(SquaredError()(bilevel(y), truth), list(bilevel.parameters()))
    bilevel.make = lambda y, R: LeastSquares(Diagonal(weights), nonlinear, y, 0.3, R)
    other = torch.autograd.grad(SquaredError()(bilevel(y), truth), list(bilevel.parameters()))
    for a, b in zip(plain, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_the_jacobian_free_direction_is_exact_where_the_hessian_is_a_number() -> None:
    def denoising(y: Tensor, R: Term) -> InverseProblem:
        return LeastSquares(Euclidean(y.numel()), lambda m: m, y.reshape(-1), 1.0, R)

    class Quadratic(Smooth):
        def forward(self, x: Tensor) -> Tensor:
            return self.a * x.square().sum(1) / 2

    y = torch.randn(3, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    energy = Quadratic(6)
    bilevel = Bilevel(energy, denoising, lambda y: y.reshape(-1), (6,), hypergradient="jacobian_free")
    truth = torch.zeros_like(y)
    (gradient,) = torch.autograd.grad(SquaredError()(bilevel(y), truth), [energy.a])
    # m = y / (1 + a), a = 2: d/da |m|^2/2 = -|y|^2 / (1 + a)^3
    assert float(gradient) == pytest.approx(-float(y.square().sum()) / 27 / 3, rel=1e-6)


def test_training_learns_the_subspace_in_which_all_truths_lie() -> None:
    generator = torch.Generator().manual_seed(7)
    basis = torch.randn(2, 6, generator=generator, dtype=torch.float64)
    truth = torch.randn(40, 2, generator=generator, dtype=torch.float64) @ basis
    y = nonlinear(truth) + 0.05 * torch.randn(40, 4, generator=generator, dtype=torch.float64)
    bilevel = Bilevel(Smooth(6), make, start, (6,), 0.7)
    unseen = y[24:], truth[24:]
    with torch.no_grad():
        before = SquaredError().measure(bilevel(unseen[0]), unseen[1])
    data = y[:24], truth[:24]
    found = train(bilevel, SquaredError(), data, Adam(0.05), epochs=25, validation=unseen)
    assert found.history[-1]["validation_relative_error"] < 0.75 * before


def test_what_is_fixed_stays_and_margins_are_left_out() -> None:
    y, _ = data()
    free, cut = model(), model(fixed=True, margin=2)
    assert not cut.log_strength.requires_grad and free.log_strength.requires_grad
    torch.testing.assert_close(cut(y), free(y)[:, 2:-2])
    gradients = [
        torch.autograd.grad(m(y)[:, k].sum(), [m.energy.get_parameter("a")]) for m, k in ((free, 2), (cut, 0))
    ]
    torch.testing.assert_close(*gradients)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(GliodeError, match="leaves nothing"):
        model(margin=3)
    with pytest.raises(GliodeError, match="neither minres nor"):
        model(hypergradient="newton")
    with pytest.raises(GliodeError, match="strength must be positive"):
        Bilevel(Smooth(6), make, start, (6,), 0.0)
