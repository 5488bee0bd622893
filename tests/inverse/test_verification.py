"""Checks of derivatives: right ones pass, deliberately wrong ones are caught, however small the error."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import Function

from inverse.problem import InverseProblem, LeastSquares
from inverse.regularizers.tikhonov import Tikhonov
from inverse.verification import check_adjoint, check_gradient, check_hessian
from solvers.errors import GliodeError
from solvers.spaces import Communicator, Diagonal, Euclidean, GramSpace, reduce

M = torch.tensor([0.4, -0.7, 1.1], dtype=torch.float64)


class Cubed(Function):
    """x^3 whose backward, and whose jvp, may be wrong by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, back: float, along: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)
        ctx.back, ctx.along = back, along
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return ctx.back * 3 * x**2 * grads[0], None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        (x,) = ctx.saved_tensors
        return ctx.along * 3 * x**2 * tangents[0]


class OnceWrong(Function):
    """sum x^4 with a right gradient whose own derivative is missing a part (numpy inside a backward)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x**4).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x,) = ctx.saved_tensors
        return 4 * x.detach() ** 2 * x * grads[0]


def cubic(back: float = 1.0, along: float = 1.0) -> LeastSquares:
    gram = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, 0.1], [0.0, 0.1, 0.7]], dtype=torch.float64)
    space = GramSpace(3, lambda a: gram @ a, lambda d: torch.linalg.solve(gram, d))
    a = torch.tensor([[1.0, 2.0, 0.5], [0.3, -1.0, 1.0]], dtype=torch.float64)
    return LeastSquares(
        space, lambda m: a @ Cubed.apply(m, back, along), torch.ones(2).double(), 0.1, Tikhonov(space)
    )


def test_right_derivatives_pass_with_slope_two() -> None:
    for check in (check_gradient, check_adjoint, check_hessian):
        found = check(cubic(), M, show=False)  # type: ignore[operator]
        assert found.passed and found.error < 1e-7
        assert found.slope == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("wrong", [1.3, 1.0001])
def test_a_wrong_gradient_is_caught(wrong: float, capsys: pytest.CaptureFixture[str]) -> None:
    found = check_gradient(cubic(back=wrong), M)
    assert not found.passed and found.error == pytest.approx((wrong - 1) / wrong, rel=0.2)
    assert found.slopes[-1] < 1.3
    printed = capsys.readouterr().out
    assert "FAILED" in printed and len(printed.splitlines()) == 3 + len(found.steps)


def test_a_wrong_adjoint_and_a_wrong_tangent_are_told_apart() -> None:
    adjoint = check_adjoint(cubic(back=1.01), M, show=False)
    assert not adjoint.passed and adjoint.error < 1e-7
    assert adjoint.product_error is not None and adjoint.product_error > 1e-3
    tangent = check_adjoint(cubic(along=1.01), M, show=False)
    assert not tangent.passed and tangent.error == pytest.approx(0.01, rel=0.2)


def test_a_hessian_that_lost_a_part_is_caught() -> None:
    problem = InverseProblem(Euclidean(3), lambda m: OnceWrong.apply(m))
    assert check_gradient(problem, M, show=False).passed
    found = check_hessian(problem, M, show=False)
    assert not found.passed and found.error == pytest.approx(2 / 3, rel=0.05)


def test_linear_maps_and_stationary_points_pass() -> None:
    a = torch.eye(3).double()
    linear = LeastSquares(Euclidean(3), lambda m: a @ m, torch.zeros(3).double(), 1.0)
    assert check_adjoint(linear, M, show=False).passed
    assert check_gradient(linear, torch.zeros(3).double(), show=False).passed
    assert check_hessian(linear, M, show=False).passed


def test_unusable_input_is_named() -> None:
    with pytest.raises(GliodeError, match="LeastSquares"):
        check_adjoint(InverseProblem(Euclidean(3), lambda m: (m**2).sum()), M)  # type: ignore[arg-type]
    with pytest.raises(GliodeError, match="decreasing"):
        check_gradient(cubic(), M, steps=(1e-3, 1e-2, 1e-1))
    with pytest.raises(GliodeError, match="zero"):
        check_gradient(cubic(), M, d=torch.zeros(3).double())
    with pytest.raises(GliodeError, match="point has shape"):
        check_gradient(cubic(), torch.zeros(2).double())


@pytest.mark.mpi
def test_a_distributed_problem_is_checked_as_a_whole() -> None:
    """Right on every rank; a gradient off on one rank only fails on all."""
    from mpi4py import MPI

    comm: Communicator = MPI.COMM_WORLD
    space = Diagonal(torch.linspace(0.5, 2.0, 4).double(), comm)
    m = torch.linspace(-1, 1, 4, dtype=torch.float64) + 0.3 * MPI.COMM_WORLD.rank

    def problem(factor: float) -> InverseProblem:
        return InverseProblem(space, lambda m: reduce(Cubed.apply(m, factor, 1.0).square().sum(), comm))

    right = check_gradient(problem(1.0), m, show=False)
    wrong = check_gradient(problem(1.1 if MPI.COMM_WORLD.rank == 0 else 1.0), m, show=False)
    assert right.passed and not wrong.passed
    assert MPI.COMM_WORLD.bcast(right.error) == right.error
