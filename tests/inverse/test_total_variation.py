"""Total variation against closed forms, dense solvers, the tape, and a serial run."""

import math
from collections.abc import Callable

import dolfinx
import numpy as np
import pytest
import torch
from mpi4py import MPI
from scipy.optimize import lsq_linear, minimize
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from inverse.optimizers import newton_cg
from inverse.problem import LeastSquares
from inverse.regularizers.total_variation import GradientOperator, ImageGradient, TotalVariation
from inverse.stopping import GradientTolerance, MaxIterations
from solvers.errors import GliodeError
from solvers.fem import mesh
from solvers.fem.gradients import Gradient
from solvers.fem.mesh import Domain

COMM = MPI.COMM_WORLD


def dense(D: GradientOperator) -> Tensor:
    """(points * d, n)."""
    units = torch.eye(D.space.size, dtype=torch.float64)
    return torch.stack([D(unit).reshape(-1) for unit in units], 1)


def triangles(comm: MPI.Comm = COMM, n: int = 24) -> Domain:
    none = dolfinx.mesh.GhostMode.none
    made = dolfinx.mesh.create_rectangle(comm, [[-1.0, -1.0], [1.0, 1.0]], [n, n], ghost_mode=none)
    return mesh.from_mesh(made)


def edge(r: np.ndarray, radius: float, width: float) -> np.ndarray:
    """1 inside, 0 outside, half a sine between: int |grad| is the mean perimeter of its levels (co-area)."""
    return 0.5 - 0.5 * np.sin(np.pi * np.clip((r - radius) / width, -0.5, 0.5))


def test_an_image_of_a_square_has_its_known_variation() -> None:
    """4 n pixel edges, two of which meet in one pixel: 4 n - 2 + sqrt 2."""
    image = torch.zeros(12, 12, dtype=torch.float64)
    image[3:8, 4:9] = 1.0
    assert float(TotalVariation(ImageGradient((12, 12)))(image.reshape(-1))) == pytest.approx(18 + 2**0.5)
    scaled = TotalVariation(ImageGradient((12, 12), 0.5), 3.0)
    assert float(scaled(image.reshape(-1))) == pytest.approx(1.5 * (18 + 2**0.5))


def test_an_image_of_a_cube_has_its_known_variation() -> None:
    """6 faces of n^2, along whose far edges two or three slopes meet."""
    image, n = torch.zeros(8, 8, 8, dtype=torch.float64), 4
    image[2:6, 2:6, 2:6] = 1.0
    expected = 3 * n**2 + 3 * (n - 1) ** 2 + 3 * (n - 1) * 2**0.5 + 3**0.5
    assert float(TotalVariation(ImageGradient((8, 8, 8)))(image.reshape(-1))) == pytest.approx(expected)


def test_a_disc_has_its_perimeter() -> None:
    """On an image and on triangles: 2 pi R, whichever way the pixels lie."""
    n = 200
    x = (np.arange(n) + 0.5) * 2 / n - 1
    r = np.hypot(*np.meshgrid(x, x, indexing="ij"))
    image = TotalVariation(ImageGradient((n, n), 2 / n))
    assert float(image(torch.from_numpy(edge(r, 0.6, 0.3)).reshape(-1))) == pytest.approx(
        1.2 * math.pi, rel=3e-3
    )
    where = triangles(MPI.COMM_SELF, 100)
    field = where.interpolate(lambda x: edge(np.hypot(x[:, 0], x[:, 1]), 0.6, 0.3))
    assert float(TotalVariation(Gradient(where))(field)) == pytest.approx(1.2 * math.pi, rel=3e-3)


@pytest.mark.mpi
def test_a_ball_on_voxel_bricks_has_its_surface() -> None:
    """The mean of 4 pi r^2 over the levels, r having the variance width^2 (1 - 8 / pi^2) / 4."""
    where = mesh.box((4.0, 4.0, 4.0), (28, 28, 28))
    field = where.interpolate(lambda x: edge(np.linalg.norm(x - 2, axis=1), 1.2, 1.2))
    tv = TotalVariation(Gradient(where), 0.5)
    assert float(tv(field)) == pytest.approx(
        2 * math.pi * (1.2**2 + 1.2**2 * (1 - 8 / math.pi**2) / 4), rel=0.01
    )


OPERATORS: dict[str, Callable[[], GradientOperator]] = {
    "image": lambda: ImageGradient((4, 5), (1.0, 0.5)),
    "bricks": lambda: Gradient(mesh.box((2.0, 2.0, 3.0), (2, 2, 2), MPI.COMM_SELF)),
    "triangles": lambda: Gradient(triangles(MPI.COMM_SELF, 3)),
}


@pytest.mark.parametrize("name", list(OPERATORS))
def test_the_smoothed_one_has_exact_derivatives(name: str) -> None:
    D = OPERATORS[name]()
    tv, m, d = (
        TotalVariation(D, 0.7, 0.3),
        torch.randn(D.space.size).double(),
        torch.randn(D.space.size).double(),
    )
    slopes = (dense(D) @ m).view(len(D.weights), -1)
    assert float(tv(m)) == pytest.approx(
        0.7 * float((D.weights * (slopes.square().sum(1) + 0.09).sqrt()).sum())
    )
    leaf = m.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(tv(leaf), leaf, create_graph=True)
    torch.testing.assert_close(tv.gradient(m), gradient.detach())
    torch.testing.assert_close(tv.hessian_action(m, d), torch.autograd.grad(gradient, leaf, d)[0])
    assert gradcheck(tv, (leaf,), check_forward_ad=True)
    assert gradgradcheck(tv, (leaf,))


@pytest.mark.parametrize("name", list(OPERATORS))
def test_the_lagged_hessian_is_the_diffusion_of_the_slopes(name: str) -> None:
    D = OPERATORS[name]()
    tv, m, d = TotalVariation(D, 0.7, 0.3, lagged=True), *torch.randn(2, D.space.size).double()
    G = dense(D)
    slopes = (G @ m).view(len(D.weights), -1)
    diffusivity = 0.7 * D.weights / (slopes.square().sum(1) + 0.09).sqrt()
    expected = G.T @ (diffusivity.repeat_interleave(slopes.shape[1]) * (G @ d))
    torch.testing.assert_close(tv.hessian_action(m, d), expected)
    exact, leaf = TotalVariation(D, 0.7, 0.3), m.clone().requires_grad_()
    assert float(tv(m)) == pytest.approx(float(exact(m)))
    (gradient,) = torch.autograd.grad(tv(leaf), leaf, create_graph=True)
    torch.testing.assert_close(gradient.detach(), exact.gradient(m))
    torch.testing.assert_close(torch.autograd.grad(gradient, leaf, d)[0], expected)
    assert float(d @ (expected - exact.hessian_action(m, d))) >= 0


def test_the_prox_of_two_pixels_moves_them_together() -> None:
    tv = TotalVariation(ImageGradient((2,)), 0.5, tolerance=1e-10)
    m = torch.tensor([0.0, 1.0]).double()
    assert tv.prox(m, 0.4).tolist() == pytest.approx([0.2, 0.8])
    assert tv.prox(m, 3.0).tolist() == pytest.approx([0.5, 0.5])


def test_the_prox_of_a_jump_keeps_it_sharp() -> None:
    """On an interval each side moves by weight step / (its mass)."""
    where = mesh.interval(2.0, 40, MPI.COMM_SELF)
    D = Gradient(where)
    m = where.interpolate(lambda x: 1.0 * (x[:, 0] > 0.7))
    side = float(D.space.weights[m == 0].sum())
    found = TotalVariation(D, 0.1, tolerance=1e-7).prox(m, 2.0)
    expected = torch.where(m == 0, 0.2 / side, 1 - 0.2 / (2.0 - side)).double()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_the_prox_in_one_dimension_is_a_bounded_least_squares_problem() -> None:
    """min 1/2 ||M^(1/2) (m - a M^-1 D^T p)||^2, |p| <= w, by SciPy's active sets."""
    for D in (ImageGradient((30,), 0.5), Gradient(mesh.interval(3.0, 30, MPI.COMM_SELF))):
        m, a, w = torch.randn(D.space.size).double(), 0.2, D.weights.numpy()
        root = D.space.weights.sqrt()
        matrix = (a * dense(D).T / root[:, None]).numpy()
        done = lsq_linear(matrix, (root * m).numpy(), bounds=(-w, w), method="bvls", tol=1e-14)
        expected = m.numpy() - a * (dense(D).T.numpy() @ done.x) / D.space.weights.numpy()
        np.testing.assert_allclose(TotalVariation(D, a, tolerance=1e-7).prox(m, 1.0), expected, atol=1e-6)


def test_the_prox_of_an_image_agrees_with_a_general_solver() -> None:
    """The dual with one disc a pixel, by SciPy's SLSQP."""
    D, a = ImageGradient((4, 4)), 0.3
    m, G = torch.randn(16).double(), dense(ImageGradient((4, 4))).numpy()
    y = m.numpy()
    done = minimize(
        lambda p: 0.5 * np.sum((y - a * G.T @ p) ** 2),
        np.zeros(32),
        jac=lambda p: -a * G @ (y - a * G.T @ p),
        method="SLSQP",
        constraints={
            "type": "ineq",
            "fun": lambda p: 1 - (p.reshape(16, 2) ** 2).sum(1),
            "jac": lambda p: -2 * np.einsum("ij,jk->ijk", np.eye(16), p.reshape(16, 2)).reshape(16, 32),
        },
        options={"ftol": 1e-15, "maxiter": 500},
    )
    found = TotalVariation(D, 0.6, tolerance=1e-8).prox(m, 0.5)
    np.testing.assert_allclose(found, y - a * G.T @ done.x, atol=1e-6)


@pytest.mark.parametrize("name", list(OPERATORS))
def test_the_gap_certifies_the_tolerance(name: str) -> None:
    """Primal minus dual value, both from dense matrices; the next call starts from that dual."""
    D = OPERATORS[name]()
    tv, m, a = TotalVariation(D, 0.4, tolerance=1e-6), torch.randn(D.space.size).double(), 0.2
    z, G, M = tv.prox(m, 0.5), dense(D), D.space.weights
    assert tv.dual is not None
    p = D.weights[:, None] * tv.dual
    assert float(tv.dual.norm(dim=1).max()) <= 1 + 1e-12
    primal = a * float((D.weights * (G @ z).view(p.shape).norm(dim=1)).sum()) + 0.5 * D.space.norm(z - m) ** 2
    shift = G.T @ p.reshape(-1)
    dual = a * float(shift @ m) - 0.5 * a**2 * float(shift @ (shift / M))
    assert -1e-14 <= primal - dual <= 0.5 * (1e-6 * D.space.norm(m)) ** 2 * 1.01
    torch.testing.assert_close(tv.prox(m, 0.5), z, rtol=0, atol=1e-5)


def micrometres(points: np.ndarray) -> list[list[int]]:
    return [[round(1e3 * float(x)) for x in point] for point in points]


@pytest.mark.mpi
def test_ranks_agree_with_a_serial_run() -> None:
    def field(where: Domain) -> Tensor:
        return where.interpolate(lambda x: np.sin(3 * x[:, 0]) + (x[:, 1] > 0.4) + 0.3 * np.cos(40 * x[:, 2]))

    def brick(comm: MPI.Comm) -> Domain:
        return mesh.box((1.0, 1.2, 0.8), (6, 5, 4), comm)

    whole, where = brick(MPI.COMM_SELF), brick(COMM)
    places = {tuple(point): k for k, point in enumerate(micrometres(whole.points))}
    mine = [places[tuple(point)] for point in micrometres(where.points[: where.n_owned])]
    serial, spread = (TotalVariation(Gradient(d), 0.3, tolerance=1e-7) for d in (whole, where))
    m, part = field(whole), field(where)
    assert float(spread(part)) == pytest.approx(float(serial(m)), rel=1e-12)
    torch.testing.assert_close(spread.prox(part, 0.1), serial.prox(m, 0.1)[mine], rtol=0, atol=1e-6)
    serial, spread = (TotalVariation(Gradient(d), 0.3, 0.1) for d in (whole, where))
    leaf = part.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(spread(leaf), leaf, create_graph=True)
    torch.testing.assert_close(gradient.detach(), serial.gradient(m)[mine])
    (action,) = torch.autograd.grad(gradient, leaf, part)
    torch.testing.assert_close(action, serial.hessian_action(m, m)[mine])


def test_lagged_diffusivity_brings_newton_near_in_few_steps() -> None:
    """Deblurring from a rough start: both Hessians have one minimiser, from afar the exact one crawls."""
    k = torch.arange(12, dtype=torch.float64)
    blur = torch.exp(-(((k[:, None] - k) / 1.5) ** 2))
    a = torch.kron(*[blur / blur.sum(1, keepdim=True)] * 2)
    image = ((k > 2) & (k < 8)).double()[:, None] * (k > 4)
    D, y = ImageGradient((12, 12)), a @ image.reshape(-1) + 0.02 * torch.randn(144, dtype=torch.float64)
    start, runs = torch.randn(144, dtype=torch.float64), {}
    for lagged in (True, False):
        problem = LeastSquares(D.space, lambda m: a @ m, y, 0.02, TotalVariation(D, 5.0, 1e-2, lagged))
        rules = (GradientTolerance(1e-6), MaxIterations(60))
        runs[lagged] = newton_cg.minimise(problem, start, stopping=rules)
    assert runs[True].value == pytest.approx(runs[False].value, rel=1e-6)
    near, far = (runs[lagged].history[10]["value"] / runs[True].value - 1 for lagged in (True, False))
    assert near < 0.02 and far > 10 * near


def test_what_it_cannot_do_is_said() -> None:
    D, m = ImageGradient((6,)), torch.randn(6).double()
    with pytest.raises(GliodeError, match="no derivative"):
        TotalVariation(D)(m.clone().requires_grad_())
    with pytest.raises(GliodeError, match="no gradient"):
        TotalVariation(D).gradient(m)
    with pytest.raises(GliodeError, match="smoothing 0"):
        TotalVariation(D, 1.0, 0.1).prox(m, 1.0)
    with pytest.raises(GliodeError, match="primal_dual"):
        TotalVariation(D, tolerance=1e-7, iterations=5).prox(m, 0.4)
    with pytest.raises(GliodeError, match="step"):
        TotalVariation(D).prox(m, -1.0)
    for arguments, key in (
        ((0.0,), "weight"),
        ((1.0, -1.0), "smoothing"),
        ((1.0, 0.0, False, 2.0), "tolerance"),
    ):
        with pytest.raises(GliodeError, match=key):
            TotalVariation(D, *arguments)
    with pytest.raises(GliodeError, match="spacing"):
        ImageGradient((3, 3), (1.0, 0.0))
    with pytest.raises(GliodeError, match="an axis"):
        ImageGradient((3, 3), (1.0,))
