"""Values, derivatives and counts of inverse problems against closed forms and dense linear algebra."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize_scalar
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from inverse.optimizers import conjugate_gradients, gauss_newton
from inverse.optimizers.iteration import Iterate
from inverse.optimizers.line_search import sensitivity
from inverse.problem import Composite, InverseProblem, LeastSquares
from inverse.regularizers.tikhonov import Tikhonov
from inverse.roots import increasing_root
from inverse.stopping import GradientTolerance, MaxIterations
from solvers.errors import GliodeError
from solvers.spaces import Communicator, Euclidean, GramSpace, replicate


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


M, D = vector(0.4, -1.3, 0.8), vector(1.0, 0.5, -2.0)
TIMES = torch.linspace(0, 2, 8, dtype=torch.float64)


def curve(m: Tensor) -> Tensor:
    """A nonlinear forward map R^3 -> R^(4 x 2)."""
    return (m[0] * torch.exp(m[1] * TIMES) + torch.sin(m[2] * TIMES)).view(4, 2)


def fit(**options: Any) -> LeastSquares:
    data = curve(vector(0.5, -1.0, 1.0)) + 0.1 * torch.cos(7 * TIMES).view(4, 2)
    return LeastSquares(
        Euclidean(3), curve, data, 0.1 + 0.01 * torch.arange(8.0).double().view(4, 2), **options
    )


def dense_jacobian(m: Tensor, noise: Tensor) -> np.ndarray:
    a, b, c = m.tolist()
    t = TIMES.numpy()
    columns = np.stack([np.exp(b * t), a * t * np.exp(b * t), t * np.cos(c * t)], 1)
    return columns / noise.numpy().reshape(-1, 1)


def quartic(m: Tensor) -> Tensor:
    return (m**4).sum() + m[0] * m[1] * m[2]


def test_gradient_and_hessian_of_a_polynomial_and_what_they_cost() -> None:
    problem = InverseProblem(Euclidean(3), quartic)
    a, b, c = M.tolist()
    value, gradient = problem.value_and_gradient(M)
    assert value == pytest.approx(a**4 + b**4 + c**4 + a * b * c) == problem.value(M)
    assert gradient.tolist() == pytest.approx([4 * a**3 + b * c, 4 * b**3 + a * c, 4 * c**3 + a * b])
    assert problem.counts == {"forward": 2, "adjoint": 1, "tangent": 0}
    hessian = vector(12 * a**2, c, b, c, 12 * b**2, a, b, a, 12 * c**2).view(3, 3)
    torch.testing.assert_close(problem.hessian_action(M, D), hessian @ D)
    assert problem.counts == {"forward": 3, "adjoint": 3, "tangent": 1}
    assert problem.curvature(M, D) == pytest.approx(float(D @ hessian @ D))


def test_one_evaluation_serves_many_hessian_actions() -> None:
    problem = InverseProblem(Euclidean(3), quartic)
    here = problem.evaluate(M)
    for unit in torch.eye(3, dtype=torch.float64):
        here.hessian_action(unit)
    assert problem.counts == {"forward": 1, "adjoint": 4, "tangent": 3}
    here.gradient()
    assert problem.counts["adjoint"] == 4  # known already


def test_least_squares_products_match_the_dense_jacobian_and_are_counted() -> None:
    problem = fit(regularizer=Tikhonov(Euclidean(3), 0.7))
    jacobian = dense_jacobian(M, problem.noise)
    residual = ((curve(M) - problem.data) / problem.noise).reshape(-1)
    torch.testing.assert_close(problem.residual(M), residual)
    value, gradient = problem.value_and_gradient(M)
    assert value == pytest.approx(0.5 * float(residual @ residual) + 0.35 * float(M @ M))
    np.testing.assert_allclose(gradient, jacobian.T @ residual.numpy() + 0.7 * M.numpy())
    assert problem.counts == {"forward": 2, "adjoint": 1, "tangent": 0}
    np.testing.assert_allclose(problem.jacobian(M), jacobian)
    assert problem.counts == {"forward": 5, "adjoint": 1, "tangent": 3}
    w = torch.cos(torch.arange(8.0)).double()
    np.testing.assert_allclose(problem.jvp(M, D), jacobian @ D.numpy())
    np.testing.assert_allclose(problem.vjp(M, w), jacobian.T @ w.numpy())
    assert problem.counts == {"forward": 7, "adjoint": 2, "tangent": 4}
    here = problem.evaluate(M)
    np.testing.assert_allclose(
        here.gauss_newton_action(D), jacobian.T @ jacobian @ D.numpy() + 0.7 * D.numpy()
    )
    assert problem.counts == {"forward": 9, "adjoint": 3, "tangent": 5}
    expected = float(np.sum((jacobian @ D.numpy()) ** 2)) + 0.7 * float(D @ D)
    assert problem.curvature(M, D) == pytest.approx(expected)
    assert problem.data_size == 8


def test_the_full_hessian_of_least_squares_matches_differences_of_gradients() -> None:
    problem, h = fit(), 1e-5
    difference = (problem.value_and_gradient(M + h * D)[1] - problem.value_and_gradient(M - h * D)[1]) / (
        2 * h
    )
    torch.testing.assert_close(problem.hessian_action(M, D), difference, rtol=1e-6, atol=1e-6)


def test_model_error_is_the_dense_covariance() -> None:
    factor = torch.stack([torch.sin(TIMES), 3 * torch.cos(TIMES), torch.zeros(8).double()], 1)
    plain, problem = fit(), fit(model_error=factor)
    inverse = np.linalg.inv(np.eye(8) + (factor @ factor.T).numpy())
    r, jacobian = plain.residual(M).numpy(), dense_jacobian(M, plain.noise)
    value, gradient = problem.value_and_gradient(M)
    assert value == pytest.approx(0.5 * r @ inverse @ r)
    np.testing.assert_allclose(gradient, jacobian.T @ inverse @ r)
    full = problem.jacobian(M).numpy()
    np.testing.assert_allclose(full.T @ full, jacobian.T @ inverse @ jacobian)


class Cube(Function):
    """m^3 whose backward runs once only, as a hand-written numpy one would."""

    @staticmethod
    def forward(ctx: Any, m: Tensor) -> Tensor:
        ctx.save_for_backward(m)
        return m**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return 3 * ctx.saved_tensors[0] ** 2 * grads[0]


class Wrapped(Function):
    """A Function whose backward differentiates something once-differentiable inside it."""

    @staticmethod
    def forward(ctx: Any, m: Tensor) -> Tensor:
        ctx.save_for_backward(m)
        return m**3

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (m,) = ctx.saved_tensors
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            m = m if again else m.detach().requires_grad_()
            return torch.autograd.grad(Cube.apply(m), m, grads[0], create_graph=again)


@pytest.mark.parametrize(
    "misfit",
    [
        lambda m: (Cube.apply(m) ** 2).sum() + (m**4).sum(),
        lambda m: Cube.apply(m).sum() + (m**4).sum(),
        lambda m: (Wrapped.apply(m) ** 2).sum() + (m**4).sum(),
    ],
    ids=["quadratic outside", "linear outside", "nested"],
)
def test_a_hessian_through_a_once_differentiable_function_is_refused_not_wrong(
    misfit: Callable[[Tensor], Tensor],
) -> None:
    problem = InverseProblem(Euclidean(3), misfit)
    problem.value_and_gradient(M)
    with pytest.raises(GliodeError, match="once_differentiable"):
        problem.hessian_action(M, D)


def test_missing_derivatives_and_wrong_shapes_are_named() -> None:
    with pytest.raises(GliodeError, match="jvp"):
        LeastSquares(Euclidean(3), Cube.apply, torch.ones(3).double(), 1.0).jvp(M, D)
    with pytest.raises(GliodeError, match="tape"):
        InverseProblem(Euclidean(3), lambda m: torch.tensor(float(m.sum()))).value_and_gradient(M)
    with pytest.raises(GliodeError, match="constant"):
        InverseProblem(Euclidean(3), lambda m: m.sum()).hessian_action(M, D)
    with pytest.raises(GliodeError, match="one number"):
        InverseProblem(Euclidean(3), lambda m: m).evaluate(M)
    with pytest.raises(GliodeError, match="forward: returned shape"):
        LeastSquares(Euclidean(3), lambda m: m[:2], torch.ones(3).double(), 1.0).residual(M)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"noise": 0.0}, "noise"),
        ({"noise": float("nan")}, "noise"),
        ({"noise": torch.ones(2)}, "noise: shape"),
        ({"data": vector(1.0, float("nan"), 0.0)}, "NaN"),
        ({"model_error": torch.ones(4, 1)}, "rows"),
        ({"bounds": (torch.zeros(2), None)}, "lower one has shape"),
        ({"bounds": (1.0, 0.0)}, "below"),
        ({"bounds": (float("nan"), None)}, "NaN"),
    ],
)
def test_bad_problems_are_named(changed: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"data": torch.ones(3).double(), "noise": 1.0} | changed
    with pytest.raises(GliodeError, match=message):
        LeastSquares(Euclidean(3), lambda m: m, **arguments)


def test_a_start_is_checked() -> None:
    problem = InverseProblem(Euclidean(3), quartic, bounds=(0.0, vector(1.0, 2.0, 3.0)))
    with pytest.raises(GliodeError, match=r"entries \[1\] lie outside"):
        problem.start(M)
    with pytest.raises(GliodeError, match="start has shape"):
        problem.start(M[:2])
    with pytest.raises(GliodeError, match="NaN"):
        problem.start(vector(0.5, float("nan"), 0.5))


@pytest.mark.mpi
def test_distributed_data_give_the_serial_fit() -> None:
    """Levenberg-Marquardt and conjugate gradients on data spread over the ranks, with model error."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    times = torch.linspace(0, 3, 13, dtype=torch.float64)
    data = 2 * torch.exp(-0.8 * times) + 0.05 * torch.cos(9 * times)
    factor = torch.stack([times, torch.ones(13).double()], 1)
    own = slice(comm.rank, None, comm.size)

    def problem(rows: slice, comm: Communicator | None) -> LeastSquares:
        def forward(m: Tensor) -> Tensor:
            p = replicate(m, comm)
            return p[0] * torch.exp(p[1] * times[rows])

        space = Euclidean(2)
        return LeastSquares(
            space,
            forward,
            data[rows],
            0.05,
            regularizer=Tikhonov(space, 0.3),
            model_error=factor[rows],
            comm=comm,
        )

    start = vector(1.0, -0.1)
    assert problem(own, comm).data_size == 13
    for minimise in (gauss_newton.minimise, conjugate_gradients.minimise):
        parallel, serial = minimise(problem(own, comm), start), minimise(problem(slice(None), None), start)
        torch.testing.assert_close(parallel.m, serial.m, rtol=1e-9, atol=1e-9)
        assert parallel.counts == serial.counts
        assert comm.allgather(parallel.m.tolist()) == [parallel.m.tolist()] * comm.size


@pytest.mark.mpi
def test_a_distributed_field_is_recovered_as_in_serial() -> None:
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    x = torch.linspace(0, 1, 24, dtype=torch.float64)
    own = slice(comm.rank, None, comm.size)

    def problem(rows: slice, comm: Communicator | None) -> LeastSquares:
        weight, xs = 1 + x[rows], x[rows]
        space = GramSpace(len(xs), lambda a: weight * a, lambda d: d / weight, comm)
        return LeastSquares(
            space,
            lambda m: m + 0.2 * m**3 * xs,
            torch.sin(5 * xs),
            0.1,
            regularizer=Tikhonov(space, 2.0),
            comm=comm,
        )

    parallel = conjugate_gradients.minimise(problem(own, comm), torch.zeros_like(x[own]))
    serial = conjugate_gradients.minimise(problem(slice(None), None), torch.zeros_like(x))
    torch.testing.assert_close(parallel.m, serial.m[own], rtol=1e-9, atol=1e-9)
    assert parallel.iterations == serial.iterations


SIGNS = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0, -1.0], dtype=torch.float64).view(4, 2)


def logistic(scores: Tensor) -> Tensor:
    return torch.nn.functional.softplus(-4 * SIGNS * scores).mean()


def likely(regularizer: Tikhonov | None = None) -> Composite:
    return Composite(Euclidean(3), curve, logistic, regularizer)


def test_composite_gradient_by_differences_and_what_it_costs() -> None:
    problem = likely(Tikhonov(Euclidean(3), 0.3))
    value, gradient = problem.value_and_gradient(M)
    margins = (-4 * SIGNS * curve(M)).numpy()
    assert value == pytest.approx(np.log1p(np.exp(margins)).mean() + 0.15 * float(M @ M))
    assert problem.counts == {"forward": 1, "adjoint": 1, "tangent": 0}
    h = 1e-6
    for unit, slope in zip(torch.eye(3).double(), gradient, strict=True):
        difference = (problem.value(M + h * unit) - problem.value(M - h * unit)) / (2 * h)
        assert float(slope) == pytest.approx(difference, rel=1e-7)


@pytest.mark.parametrize("weight", [None, 0.3])
def test_composite_steps_to_the_lowest_point_of_the_linearised_objective(weight: float | None) -> None:
    """Against SciPy's search on phi(eta) = loss(F + eta J d) + R(m + eta d) with a dense J."""
    problem = likely(None if weight is None else Tikhonov(Euclidean(3), weight))
    d = -problem.value_and_gradient(M)[1]
    s, xi = curve(M).numpy(), (dense_jacobian(M, torch.ones(8)) @ d.numpy()).reshape(4, 2)

    def phi(eta: float) -> float:
        scores, m = s + eta * xi, (M + eta * d).numpy()
        return float(np.log1p(np.exp(-4 * SIGNS.numpy() * scores)).mean() + (weight or 0) / 2 * (m @ m))

    lowest = minimize_scalar(phi, bracket=(0, 1), options={"xtol": 1e-12}).x
    before = dict(problem.counts)
    assert problem.step(M, d, -float(d @ d)) == pytest.approx(lowest, rel=1e-6)
    assert {k: v - before[k] for k, v in problem.counts.items()} == {"forward": 1, "adjoint": 0, "tangent": 1}
    h = 1e-4
    bend = (phi(h) - 2 * phi(0) + phi(-h)) / h**2
    assert problem.curvature(M, d) == pytest.approx(bend, rel=1e-5)


def test_a_quadratic_loss_makes_composite_least_squares() -> None:
    prior = Tikhonov(Euclidean(3), 0.7)
    squares = fit(regularizer=prior)
    same = Composite(
        Euclidean(3), curve, lambda s: ((s - squares.data) / squares.noise).square().sum() / 2, prior
    )
    value, gradient = squares.value_and_gradient(M)
    assert same.value(M) == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(same.value_and_gradient(M)[1], gradient)
    slope = -float(gradient @ gradient)
    expected = squares.step(M, -gradient, slope)
    assert expected is not None
    assert same.step(M, -gradient, slope) == pytest.approx(expected, rel=1e-10)


def test_conjugate_gradients_on_a_composite_cost_one_tangent_an_iteration() -> None:
    """Logistic regression to its optimum, where the gradient written out vanishes."""
    x = torch.randn(30, 3, dtype=torch.float64)
    y = (torch.rand(30) < torch.sigmoid(x[:, 0] - 2 * x[:, 2])).double()
    loss = torch.nn.functional.binary_cross_entropy_with_logits
    problem = Composite(Euclidean(3), lambda m: x @ m, lambda s: loss(s, y), Tikhonov(Euclidean(3), 0.01))
    stopping = (GradientTolerance(1e-8), MaxIterations(60))
    result = conjugate_gradients.minimise(problem, torch.zeros(3).double(), stopping=stopping)
    assert result.stopped_by == "GradientTolerance"
    p = 1 / (1 + np.exp(-(x @ result.m).numpy()))
    residual = x.numpy().T @ (p - y.numpy()) / 30 + 0.01 * result.m.numpy()
    assert np.abs(residual).max() < 1e-8
    k = result.iterations
    assert result.counts == {"forward": 1 + 2 * k, "adjoint": 1 + k, "tangent": k}


def test_an_objective_that_falls_for_ever_still_gets_a_step() -> None:
    """Separable classes: no root, so a step after which the slope has all but vanished."""
    problem = Composite(Euclidean(1), lambda m: m * vector(1.0, 2.0), lambda s: torch.exp(-s).sum())
    eta = problem.step(vector(0.0), vector(1.0), -3.0)
    assert eta is not None and 0 < math.exp(-eta) + 2 * math.exp(-2 * eta) < 1e-7


def test_without_curvature_a_composite_goes_downhill_by_the_wolfe_search() -> None:
    """loss = s^2/(1 + s^2) is concave at s = 2, and has its lowest value at 0."""
    problem = Composite(Euclidean(1), lambda m: m, lambda s: (s * s / (1 + s * s)).sum())
    start = vector(2.0)
    here = Iterate.of(problem.evaluate(start))
    slope = -float(here.gradient @ here.gradient)
    assert problem.curvature(start, -here.riesz) < 0
    assert problem.step(start, -here.riesz, slope) is None
    taken = sensitivity(problem, here, -here.riesz, slope)
    assert taken is not None and taken[0].value < here.value
    result = conjugate_gradients.minimise(
        problem, start, stopping=(GradientTolerance(1e-8), MaxIterations(50))
    )
    assert abs(float(result.m)) < 1e-7


def test_the_root_is_found_where_newtons_method_alone_runs_away() -> None:
    def g(x: float) -> float:
        return math.atan(5 * (x - 3)) + 0.01 * (x - 1)

    def derivatives(x: float) -> tuple[float, float]:
        return g(x), 5 / (1 + 25 * (x - 3) ** 2) + 0.01

    assert increasing_root(derivatives, g(0.0), 1e-12) == pytest.approx(brentq(g, 0, 10), rel=1e-10)


def test_values_that_are_not_finite_are_too_far_and_no_rise_is_no_root() -> None:
    def derivatives(x: float) -> tuple[float, float]:
        if x >= 1.5:
            return math.nan, math.nan
        return math.log(x + 0.1), 1 / (x + 0.1) if x else 0.5

    assert increasing_root(derivatives, math.log(0.1), 1e-10) == pytest.approx(0.9, rel=1e-9)
    assert increasing_root(lambda x: (-1.0, 0.0), -1.0, 1e-8) is None
    assert increasing_root(lambda x: (-1.0, math.nan), -1.0, 1e-8) is None
