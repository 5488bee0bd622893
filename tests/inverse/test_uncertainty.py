"""The Laplace posterior against exact Bayesian formulas of linear problems; identifiability of ratios."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inverse.optimizers import gauss_newton
from inverse.problem import LeastSquares
from inverse.regularizers.tikhonov import Tikhonov
from inverse.uncertainty import Laplace, ModelError
from solvers.errors import GliodeError
from solvers.spaces import Euclidean

A = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0], [2.0, 0.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
PRIOR = torch.tensor([[1.0, 0.3, 0.0], [0.3, 2.0, 0.1], [0.0, 0.1, 0.5]], dtype=torch.float64)
MEAN = torch.tensor([0.2, -1.0, 3.0], dtype=torch.float64)
NAMES = ("a", "b", "c")


def test_covariance_is_the_exact_one_of_a_linear_problem() -> None:
    posterior = Laplace(MEAN, A / 0.3, PRIOR, NAMES)
    gain = PRIOR @ A.mT @ torch.linalg.inv(A @ PRIOR @ A.mT + 0.09 * torch.eye(4).double())
    exact = PRIOR - gain @ A @ PRIOR  # the Kalman form
    torch.testing.assert_close(posterior.covariance, exact)
    torch.testing.assert_close(posterior.sd, exact.diagonal().sqrt())


def test_model_error_widens_it_as_the_dense_covariance_does() -> None:
    factor = torch.tensor([[1.0, 0.0], [2.0, 1.0], [0.0, -1.0], [0.5, 0.5]], dtype=torch.float64)
    dense = torch.eye(4).double() + factor @ factor.mT
    exact = torch.linalg.inv(A.mT @ torch.linalg.inv(dense) @ A + torch.linalg.inv(PRIOR))
    torch.testing.assert_close(Laplace(MEAN, A, PRIOR, NAMES, model_error=factor).covariance, exact)
    problem = LeastSquares(Euclidean(3), lambda m: A @ m, torch.zeros(4).double(), 1.0, model_error=factor)
    torch.testing.assert_close(Laplace(MEAN, problem.jacobian(MEAN), PRIOR, NAMES).covariance, exact)


def test_the_root_of_the_low_rank_covariance_is_a_symmetric_root() -> None:
    for factor in (torch.randn(9, 3).double(), torch.randn(2, 5).double(), torch.zeros(4, 2).double()):
        n = len(factor)
        root = ModelError(factor).whiten(torch.eye(n).double())
        torch.testing.assert_close(root, root.mT)
        covariance = torch.eye(n).double() + factor @ factor.mT
        torch.testing.assert_close(root @ covariance @ root, torch.eye(n).double(), rtol=1e-9, atol=1e-12)


def test_combinations_have_the_stated_variances_and_are_independent() -> None:
    posterior = Laplace(MEAN, A / 0.3, PRIOR, NAMES)
    found = posterior.identifiability()
    c = torch.from_numpy(
        np.array([[combination.coefficients[name] for name in NAMES] for combination in found])
    )
    for covariance in (PRIOR, posterior.covariance):
        pairs = c @ covariance @ c.mT
        torch.testing.assert_close(pairs, torch.diag(pairs.diagonal()), rtol=0, atol=1e-10)
    before, after = (c @ PRIOR @ c.mT).diagonal(), (c @ posterior.covariance @ c.mT).diagonal()
    for combination, prior, variance in zip(found, before.tolist(), after.tolist(), strict=True):
        assert combination.variance_ratio == pytest.approx(variance / prior)
        assert combination.information == pytest.approx(prior / variance - 1)
        assert combination.sd == pytest.approx(math.sqrt(variance))
        assert combination.fixed == (variance <= 0.1 * prior)
        assert max(map(abs, combination.coefficients.values())) >= 1
    ratios = [combination.variance_ratio for combination in found]
    assert ratios == sorted(ratios)


def test_data_that_see_a_ratio_only_fix_its_logarithm_only() -> None:
    """y = D / rho seen, D and rho in logarithms with equal priors, and a third parameter not seen at all."""
    jacobian = torch.tensor([[50.0, -49.0, 0.0], [20.0, -19.6, 0.0]], dtype=torch.float64)
    posterior = Laplace(
        torch.tensor([math.log(0.13), math.log(0.025), 40.0]).double(),
        jacobian,
        torch.tensor([0.8, 0.8, 15.0]).double(),
        ("D_white", "rho", "age"),
        log=("D_white", "rho"),
    )
    first, second, third = posterior.identifiability()
    assert first.text == "log D_white - 0.98 log rho" and first.fixed
    assert not second.fixed and not third.fixed and third.variance_ratio == pytest.approx(1.0)
    assert {second.text, third.text} == {"log rho + 0.98 log D_white", "age"}
    report = posterior.report()
    assert "log D_white - 0.98 log rho: fixed by the data" in report
    assert "age: not fixed by the data" in report and "90 % interval" in report


def test_intervals_are_gaussian_and_mapped_back() -> None:
    posterior = Laplace(MEAN, A, PRIOR, NAMES, log=["c"])
    intervals, sd = posterior.intervals(0.95), posterior.sd
    assert posterior.estimates() == pytest.approx({"a": 0.2, "b": -1.0, "c": math.exp(3.0)})
    assert intervals["a"] == pytest.approx((0.2 - 1.959964 * float(sd[0]), 0.2 + 1.959964 * float(sd[0])))
    half = 1.959964 * float(sd[2])
    assert intervals["c"] == pytest.approx((math.exp(3 - half), math.exp(3 + half)))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """200 draws from prior and noise of a nonlinear fit in its nearly linear regime."""
    rng = np.random.default_rng(0)
    t = torch.linspace(0, 2, 12, dtype=torch.float64)
    mean, sd = torch.tensor([0.0, -0.5]).double(), torch.tensor([0.3, 0.3]).double()
    space = Euclidean(2, sd)
    covered = np.zeros(2)
    for _ in range(200):
        truth = mean + sd * torch.from_numpy(rng.standard_normal(2))

        def forward(m: Tensor) -> Tensor:
            return torch.exp(m[0] - torch.exp(m[1]) * t)

        data = forward(truth) + 0.05 * torch.from_numpy(rng.standard_normal(12))
        problem = LeastSquares(space, forward, data, 0.05, regularizer=Tikhonov(space, 1.0, mean))
        m = gauss_newton.minimise(problem, mean).m
        posterior = Laplace(m, problem.jacobian(m), sd, ("amplitude", "rate"), log=("amplitude", "rate"))
        for k, (low, high) in enumerate(posterior.intervals(0.9).values()):
            covered[k] += low <= math.exp(float(truth[k])) <= high
    assert np.all(np.abs(covered / 200 - 0.9) < 0.06)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prior": -PRIOR}, "positive definite"),
        ({"prior": torch.ones(2)}, "prior"),
        ({"jacobian": A[:, :2]}, "jacobian"),
        ({"jacobian": A * math.nan}, "finite"),
        ({"log": ("d",)}, "'d'"),
    ],
)
def test_bad_input_is_named(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"mean": MEAN, "jacobian": A, "prior": PRIOR, "names": NAMES}
    with pytest.raises(GliodeError, match=message):
        Laplace(**(arguments | changed))
    with pytest.raises(GliodeError, match="level"):
        Laplace(MEAN, A, PRIOR, NAMES).intervals(90)
