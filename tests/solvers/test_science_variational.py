"""The network x' = w(t) with an energy for its cost: closed forms, the run network, ends and lengths held."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from inverse.optimizers import conjugate_gradients, newton_cg, quasi_newton
from inverse.problem import InverseProblem
from inverse.stopping import GradientTolerance, MaxIterations
from inverse.verification import check_gradient, check_hessian
from solvers.errors import GliodeError
from solvers.node.models import Node
from solvers.node.science.activated import ScienceActivated, Unknown
from solvers.node.science.variational import Elements, Path, area, carried, membrane
from solvers.spaces import Euclidean

F64 = torch.float64


def hyperbolic(t: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return w.square().sum(-1) / x[..., 1].square()


def half_circle(s: Tensor) -> Tensor:
    """The geodesic of the half-plane through (0, 1), s its length."""
    return torch.stack([s.tanh(), 1 / s.cosh()], -1)


def geodesic(knots: int) -> Path:
    ends = half_circle(torch.tensor([-1.0, 1.5], dtype=F64))
    return Path(hyperbolic, ends[0], ends[1], knots=knots)


def solve(path: Path, length: float = 0.0) -> tuple[Tensor, int]:
    problem = InverseProblem(path.space(length), path.cost)
    result = conjugate_gradients.minimise(problem, path.straight(), stopping=GradientTolerance(1e-8))
    return result.m, result.iterations


def bent(path: Path) -> Tensor:
    """Weights of no particular kind."""
    generator = torch.Generator().manual_seed(3)
    return path.straight() + 0.3 * torch.randn(path.straight().shape, generator=generator, dtype=F64)


def test_a_geodesic_of_the_half_plane_at_order_four_and_in_iterations_that_knots_do_not_change() -> None:
    errors, costs, counts = [], [], []
    for knots in (9, 17, 33):
        path = geodesic(knots)
        m, iterations = solve(path)
        exact = half_circle(-1 + 2.5 * path.knots)
        errors.append(float((path.at(m, path.knots)[0] - exact).abs().max()))
        costs.append(abs(float(path.cost(m)) / 2.5**2 - 1))
        counts.append(iterations)
    assert errors[-1] < 2e-6 and errors[0] / errors[1] > 12 and errors[1] / errors[2] > 12
    assert costs[-1] < 1e-6 and costs[0] / costs[1] > 12 and costs[1] / costs[2] > 12
    assert max(counts) <= min(counts) + 3


def test_newton_finds_the_same_path() -> None:
    path = geodesic(17)
    problem = InverseProblem(path.space(), path.cost)
    found = newton_cg.minimise(problem, path.straight(), "full", stopping=GradientTolerance(1e-9))
    torch.testing.assert_close(found.m, solve(path)[0], rtol=0, atol=1e-6)
    assert found.iterations < 12


def test_the_cost_is_that_of_the_network_when_it_is_run() -> None:
    """x' = w, z' = L by the integrator, its gradient by the discrete adjoint: Simpson's rule, h^4 apart."""
    path, errors = geodesic(9), []
    m = path.straight() + 0.5 * torch.linspace(-1, 1, 9, dtype=F64)[:, None]
    weights = torch.full((9,), 1 / 8, dtype=F64)
    weights[[0, -1]] /= 2
    slopes = m - weights @ m + (path.end - path.start)  # the projection that meets the end
    for steps in (8, 16, 32):
        w = Unknown(torch.zeros(2, dtype=F64), "linear", 9)
        with torch.no_grad():
            w.weights.values.copy_(slopes)
        network = Node(ScienceActivated(carried(hyperbolic, 2), {"w": w}), 1.0, steps)
        end = network(torch.cat([path.start, torch.zeros(1, dtype=F64)]))
        torch.testing.assert_close(end[:2], path.end, rtol=1e-12, atol=1e-12)
        leaf = m.clone().requires_grad_()
        cost = path.cost(leaf)
        (whole,) = torch.autograd.grad(cost, leaf)
        (run,) = torch.autograd.grad(end[2], w.weights.values)
        run = run - weights[:, None] * run.sum(0)  # of a projection, the transposed projection
        errors.append((float((cost - end[2]).abs()), float((whole - run).abs().max())))
    assert errors[-1][0] < 1e-4 * float(cost) and errors[-1][1] < 1e-3 * float(whole.abs().max())
    for k in range(2):
        assert errors[0][k] / errors[1][k] > 10 and errors[1][k] / errors[2][k] > 10


def test_given_ends_are_met_by_any_weights_and_free_ones_are_not() -> None:
    path = Path(hyperbolic, [0.0, 1.0], [2.0, math.nan], knots=7, duration=3.0)
    m = bent(path)
    x, w = path.at(m, torch.tensor([0.0, 1.7, 3.0], dtype=F64))
    torch.testing.assert_close(x[0], path.start)
    assert float(x[2, 0]) == pytest.approx(2.0, abs=1e-8)  # sampled weights know times to 1e-9
    assert float(x[2, 1]) == pytest.approx(1.0 + float(torch.trapezoid(m[:, 1], path.knots)), rel=1e-8)
    there = path.at(m, torch.tensor([1.7 - 1e-4, 1.7 + 1e-4], dtype=F64))[0]
    torch.testing.assert_close((there[1] - there[0]) / 2e-4, w[1], rtol=1e-6, atol=1e-6)
    _, dual = InverseProblem(path.space(), path.cost).value_and_gradient(m)
    assert abs(float(dual[:, 0].sum())) < 1e-10 < abs(float(dual[:, 1].sum()))


def test_a_free_end_is_met_at_a_right_angle() -> None:
    """The shortest way to a line: of int x'^2 + y'^2 with y(T) free, y' = 0 (transversality)."""
    path = Path(
        lambda t, x, w: w.square().sum(-1) + x[..., 1].square(), [0.0, 1.0], [1.0, math.nan], knots=33
    )
    m, _ = solve(path)
    exact = (1 - path.knots).cosh() / math.cosh(1.0)  # y'' = y, y(0) = 1, y'(1) = 0
    torch.testing.assert_close(path.at(m, path.knots)[0][:, 1], exact, rtol=0, atol=1e-6)


def arc(t: Tensor, x: Tensor, w: Tensor) -> Tensor:
    return (1 + w[..., 0].square()).sqrt()


def chain(length: float) -> Path:
    return Path(lambda t, x, w: x[..., 0] * arc(t, x, w), [0.0], [0.5], 33, 2.0, hold=(arc, length))


def test_a_length_is_held_for_any_weights_with_exact_derivatives() -> None:
    path = chain(3.0)
    m = bent(path)
    x, w = path.sampled(m)
    assert float(path.quadrature @ arc(path.times, x, w)) == pytest.approx(3.0, rel=1e-12)
    problem = InverseProblem(path.space(), path.cost)
    assert check_gradient(problem, m, show=False).passed
    assert check_hessian(problem, m, show=False).passed


def test_a_hanging_chain_is_a_catenary() -> None:
    """Of the lowest point b and the scale c, found from the ends and the length by two equations."""
    path = chain(3.0)
    problem = InverseProblem(path.space(), path.cost)
    start = torch.linspace(-1, 1, 33, dtype=F64)[:, None]
    m = conjugate_gradients.minimise(problem, start, stopping=GradientTolerance(1e-8)).m
    y = path.at(m, path.knots)[0][:, 0].numpy()
    t = path.knots.numpy()
    half = math.sqrt(3.0**2 - 0.5**2) / 2  # = c sinh(T / 2c)
    c = next(c for c in np.linspace(0.2, 3, 280001) if c * math.sinh(1 / c) <= half)
    b = 1.0 - c * math.atanh(0.5 / 3.0)
    exact = c * (np.cosh((t - b) / c) - np.cosh(b / c))
    np.testing.assert_allclose(y, exact, atol=2e-5)


def test_senseless_paths_are_refused() -> None:
    with pytest.raises(GliodeError, match="finite numbers"):
        Path(hyperbolic, [math.nan, 1.0])
    with pytest.raises(GliodeError, match="the end has 1 components"):
        Path(hyperbolic, [0.0, 1.0], [1.0])
    with pytest.raises(GliodeError, match="give its end"):
        Path(hyperbolic, [0.0, 1.0], hold=(arc, 2.0))
    summed = Path(lambda t, x, w: w.square().sum(), [0.0], [1.0], knots=5)
    with pytest.raises(GliodeError, match="for 16 points"):
        summed.cost(summed.straight())
    short = chain(2.0)
    with pytest.raises(GliodeError, match="not above that of the chord"):
        short.cost(bent(short))
    with pytest.raises(GliodeError, match="not constant"):
        chain(3.0).cost(chain(3.0).straight())


# ---- in space ---------------------------------------------------------------------------------------------


def square(cells: int) -> tuple[Elements, Tensor]:
    """The unit square in two triangles a cell, and its inner vertices."""
    axis = torch.linspace(0, 1, cells + 1, dtype=F64)
    points = torch.cartesian_prod(axis, axis)
    first = (torch.arange(cells)[:, None] * (cells + 1) + torch.arange(cells)).reshape(-1)
    corners = torch.stack([first, first + cells + 1, first + cells + 2, first + 1], 1)
    inner = torch.nonzero(((points > 1e-9) & (points < 1 - 1e-9)).all(1))[:, 0]
    return Elements(points, torch.cat([corners[:, [0, 1, 2]], corners[:, [0, 2, 3]]])), inner


def test_elements_are_exact_on_planes() -> None:
    elements, _ = square(4)
    u = 1 + elements.points @ torch.tensor([2.0, -3.0], dtype=F64)
    torch.testing.assert_close(elements.gradient(u), torch.tensor([[2.0, -3.0]], dtype=F64).expand(32, 2))
    assert float(elements.energy(u, area)) == pytest.approx(math.sqrt(14), rel=1e-12)
    assert float(elements.energy(u, membrane, torch.ones(25, dtype=F64))) == pytest.approx(
        6.5 - 0.5, rel=1e-12
    )
    assert float(elements.mass.sum()) == pytest.approx(1.0, rel=1e-12)


def test_the_space_without_boundary_values_has_the_membrane_for_its_square() -> None:
    elements, inner = square(5)
    space = elements.dirichlet(inner)
    m = torch.randn(len(inner), dtype=F64)
    u = torch.zeros(36, dtype=F64).index_add(0, inner, m)
    assert space.inner(m, m) == pytest.approx(2 * float(elements.energy(u, membrane)), rel=1e-12)
    torch.testing.assert_close(space.riesz(space.gram(m)), m)


@pytest.mark.parametrize("metric", ["H1_0", "none"])
def test_scherks_surface_in_iterations_that_only_its_own_metric_keeps(metric: str) -> None:
    """u = log(cos x / cos y) has mean curvature 0: by conjugate gradients from a bulge."""
    counts, errors = [], []
    for cells in (8, 16):
        elements, inner = square(cells)
        x, y = elements.points.unbind(1)
        exact = (x.cos() / y.cos()).log()
        edge = exact.clone()
        edge[inner] = 0.0

        def cost(m: Tensor, edge: Tensor = edge, inner: Tensor = inner, e: Elements = elements) -> Tensor:
            return e.energy(edge.index_add(0, inner, m), area)

        space = elements.dirichlet(inner) if metric == "H1_0" else Euclidean(len(inner))
        problem = InverseProblem(space, cost)
        bulge = (exact + 0.3 * (math.pi * x).sin() * (math.pi * y).sin())[inner]
        result = conjugate_gradients.minimise(problem, bulge, stopping=GradientTolerance(1e-6))
        counts.append(result.iterations)
        errors.append(float((edge.index_add(0, inner, result.m) - exact).abs().max()))
    assert errors[1] < 1e-3 and errors[0] / errors[1] > 3
    assert (counts[1] <= counts[0] + 3) == (metric == "H1_0")


def test_a_string_over_a_parabola_leaves_it_along_the_tangent() -> None:
    """|x| <= 1 - sqrt(3) / 2 touches, for 1/2 - 2 x^2 and u(-1) = u(1) = 0."""
    x = torch.linspace(-1, 1, 81, dtype=F64)
    elements = Elements(x[:, None], torch.stack([torch.arange(80), torch.arange(1, 81)], 1))
    low, a = 0.5 - 2 * x.square(), 1 - math.sqrt(3) / 2

    def pad(m: Tensor) -> Tensor:
        return torch.nn.functional.pad(m, (1, 1))

    problem = InverseProblem(
        Euclidean(79), lambda m: elements.energy(pad(m), membrane), bounds=(low[1:-1], None)
    )
    stop = (GradientTolerance(1e-8), MaxIterations(500))
    u = pad(quasi_newton.minimise(problem, low[1:-1].clamp(min=0), memory=30, stopping=stop).m)
    exact = torch.where(x.abs() <= a, low, 4 * a * (1 - x.abs()))
    torch.testing.assert_close(u, exact, rtol=0, atol=4e-4)
    assert float(x[u <= low + 1e-9].max()) == pytest.approx(a, abs=2 / 80)


def test_flat_cells_are_refused() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], dtype=F64)
    with pytest.raises(GliodeError, match="no volume"):
        Elements(points, torch.tensor([[0, 1, 3], [0, 1, 2]]))
    with pytest.raises(GliodeError, match="4 vertices a cell in 2 dimensions"):
        Elements(points, torch.tensor([[0, 1, 2, 3]]))
