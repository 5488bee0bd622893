"""Landweber-Kaczmarz: by hand, against the known solution, and equations left out once they hold."""

import math

import pytest
import torch
from torch import Tensor

from inverse.optimizers import kaczmarz
from inverse.problem import LeastSquares
from inverse.regularizers.tikhonov import Tikhonov
from inverse.stopping import MaxIterations
from solvers.errors import GliodeError
from solvers.spaces import Diagonal, Euclidean, Space

SPACE = Diagonal(torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64))
START = torch.zeros(3, dtype=torch.float64)


def system(noise: float, space: Space = SPACE) -> tuple[list[LeastSquares], list[Tensor], Tensor]:
    """Three blocks of four equations in three unknowns, two of them with sin in it; the truth fits them."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.tensor([0.4, -0.3, 0.2], dtype=torch.float64)
    blocks = [torch.randn(4, 3, dtype=torch.float64, generator=generator) for _ in range(3)]
    problems = []
    for k, a in enumerate(blocks):

        def forward(m: Tensor, a: Tensor = a, k: int = k) -> Tensor:
            return a @ (torch.sin(m) if k else m)

        data = forward(truth) + noise * torch.randn(4, dtype=torch.float64, generator=generator)
        problems.append(LeastSquares(space, forward, data, noise))
    return problems, blocks, truth


def test_a_sweep_is_a_step_an_equation() -> None:
    problems, blocks, _ = system(0.1)
    result = kaczmarz.minimise(problems, START, 1.01, [1e-6] * 3, 1e-3, MaxIterations(2))
    m = START
    for _ in range(2):
        for k, (a, problem) in enumerate(zip(blocks, problems, strict=True)):
            residual = (a @ (torch.sin(m) if k else m) - problem.data) / 0.1
            jacobian = a * (torch.cos(m) if k else torch.ones(3).double()) / 0.1
            m = m - 1e-3 * (jacobian.mT @ residual) / SPACE.weights
    torch.testing.assert_close(result.m, m, rtol=1e-12, atol=1e-14)
    assert result.stopped_by == "MaxIterations"


def test_it_ends_once_a_sweep_leaves_every_equation_out() -> None:
    problems, _, truth = system(0.01)
    result = kaczmarz.minimise(problems, START, 2.0)
    assert result.stopped_by == "Loping" and result.numbers == {"tau": 2.0, "equations": 3.0}
    for problem in problems:
        assert float(problem.residual(result.m).norm()) <= 2.0 * 2.0  # tau sqrt(4)
    assert SPACE.norm(result.m - truth) < 0.1 * SPACE.norm(truth)
    assert result.history[-1]["gradient_norm"] == 0.0
    last = result.history[-1]
    assert last["value"] == pytest.approx(sum(problem.value(result.m) for problem in problems))
    # An equation left out costs its forward solve, not its adjoint.
    assert result.counts["forward"] - result.counts["adjoint"] >= 3


def test_an_equation_that_holds_is_left_out_while_others_go_on() -> None:
    problems, _, _ = system(0.1)
    result = kaczmarz.minimise(problems, START, 1.1, [1e9, 1e-6, 1e9], 1e-3, MaxIterations(4))
    assert result.counts == {"forward": 15, "adjoint": 5, "tangent": 0}
    assert problems[0].counts["adjoint"] == problems[2].counts["adjoint"] == 0


def test_a_killed_run_resumes_to_the_same_numbers_and_bounds_are_kept() -> None:
    problems, _, _ = system(0.1)
    bounded = [LeastSquares(p.space, p.forward, p.data, 0.1, bounds=(-0.2, 0.2)) for p in problems]
    deltas = [1e-6] * 3
    whole = kaczmarz.minimise(bounded, START, 1.5, deltas, stopping=MaxIterations(7))
    part = kaczmarz.minimise(bounded, START, 1.5, deltas, stopping=MaxIterations(3))
    rest = kaczmarz.minimise(bounded, part.state_dict(), 1.5, deltas, stopping=MaxIterations(7))
    assert rest.m.tolist() == whole.m.tolist()
    assert float(rest.m.abs().max()) == pytest.approx(0.2)


def test_unusable_input_is_refused() -> None:
    problems, _, _ = system(0.1)
    one, two, three = problems
    with pytest.raises(GliodeError, match="at least one"):
        kaczmarz.minimise([], START, 2.0)
    with pytest.raises(GliodeError, match="above 1"):
        kaczmarz.minimise(problems, START, 1.0)
    with pytest.raises(GliodeError, match="3 noise levels"):
        kaczmarz.minimise(problems, START, 2.0, [1.0, math.nan, 1.0])
    with pytest.raises(GliodeError, match="positive number"):
        kaczmarz.minimise(problems, START, 2.0, step=-1.0)
    with pytest.raises(GliodeError, match="one space"):
        kaczmarz.minimise([one, system(0.1, Euclidean(3))[0][1]], START, 2.0)
    with pytest.raises(GliodeError, match="regularizers out"):
        kaczmarz.minimise([LeastSquares(SPACE, two.forward, two.data, 1.0, Tikhonov(SPACE))], START, 2.0)
    with pytest.raises(GliodeError, match="same bounds"):
        bounded = LeastSquares(SPACE, three.forward, three.data, 1.0, bounds=(0.0, 1.0))
        kaczmarz.minimise([one, bounded], START, 2.0)
