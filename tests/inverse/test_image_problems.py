"""Image problems: operators against dense algebra, the noise and the inversions against what they claim."""

import math

import pytest
import torch
from torch import Tensor

from inverse import image_problems
from inverse.datasets.procedural import ellipses
from inverse.image_problems import (
    TEST_NAMES,
    VALIDATION_NAMES,
    ImageProblem,
    image_problem,
    restored,
    validation_truths,
)
from inverse.regularizers.tikhonov import Tikhonov
from solvers.errors import GliodeError
from solvers.spaces import Euclidean

NAMES = ("tomography", "sparse_tomography", "deconvolution", "motion")


def dense(problem: ImageProblem) -> Tensor:
    """A column for each pixel."""
    units = torch.eye(problem.size**2, dtype=torch.float64)
    return problem.A(units.view(-1, problem.size, problem.size)).flatten(1).mT


@pytest.mark.parametrize("name", NAMES)
def test_the_norm_is_the_largest_singular_value(name: str) -> None:
    problem = image_problem(name, 12)
    assert problem.norm == pytest.approx(float(torch.linalg.matrix_norm(dense(problem), 2)), rel=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_tape_knows_batches_their_adjoint_and_the_hessian(name: str) -> None:
    """Of 1/2 ||A x - y||^2 for a batch: gradient A^T (A x - y), Hessian A^T A, by the dense matrix."""
    problem, matrix = image_problem(name, 10), dense(image_problem(name, 10))
    generator = torch.Generator().manual_seed(0)
    x, d = torch.randn(2, 3, 10, 10, generator=generator, dtype=torch.float64)
    y = torch.randn(3, *problem.A.data_shape, generator=generator, dtype=torch.float64)
    leaf = x.requires_grad_()
    value = (problem.A(leaf) - y).square().sum() / 2
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True)
    expected = (x.flatten(1) @ matrix.mT - y.flatten(1)) @ matrix
    torch.testing.assert_close(gradient.flatten(1), expected)
    (action,) = torch.autograd.grad(gradient, leaf, d)
    torch.testing.assert_close(action.flatten(1), d.flatten(1) @ matrix.mT @ matrix)


@pytest.mark.parametrize("name", NAMES)
def test_noise_has_its_level_and_its_seed(name: str) -> None:
    problem, truths = image_problem(name, 48), ellipses(3, 48, 1)
    noise = problem.measured(truths, 5) - problem.A(truths)
    count = noise.numel()
    assert float(noise.std()) == pytest.approx(problem.sd, rel=4 / math.sqrt(2 * count))
    assert torch.equal(problem.measured(truths, 5), problem.measured(truths, 5))
    assert not torch.equal(problem.measured(truths, 6), problem.measured(truths, 5))
    half = problem.measured(truths, 5, 0.5) - problem.A(truths)
    torch.testing.assert_close(2 * half, noise)
    assert problem.measured(truths.float(), 5).dtype == torch.float32


def test_two_per_cent_of_the_ray_integrals() -> None:
    """Of the pictures that the constant was taken from; one per cent of white for the blur."""
    problem = image_problem("tomography")
    rms = float(problem.A(validation_truths()).square().mean().sqrt())
    assert problem.sd / rms == pytest.approx(0.02, rel=0.01)
    assert image_problem("deconvolution", 16).sd == 0.01


@pytest.mark.parametrize(("name", "most"), [("tomography", 0.05), ("sparse_tomography", 0.07)])
def test_back_projection_inverts_smooth_images(name: str, most: float) -> None:
    """A Gaussian of width 0.25 on the square: what is left are streaks of few angles, its mass is right."""
    problem = image_problem(name, 64)
    line = (torch.arange(64, dtype=torch.float64) + 0.5) / 32 - 1
    x = torch.exp(-((line[:, None] - 0.1) ** 2 + (line + 0.2) ** 2) / (2 * 0.25**2))
    found = problem.naive(problem.A(x))
    assert float((found - x).norm() / x.norm()) < most
    assert float(found.sum() / x.sum()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["deconvolution", "motion"])
def test_wiener_filters_invert_what_the_blur_leaves(name: str) -> None:
    """A picture that is black near the edge: the filter without noise comes near, as the blur does not."""
    problem = image_problem(name, 64)
    line = (torch.arange(64, dtype=torch.float64) + 0.5) / 32 - 1
    x = torch.exp(-(line[:, None] ** 2 + line**2) / (2 * 0.1**2))
    left = (problem.naive(problem.A(x)) - x).norm() / x.norm()
    assert float(left) < 0.12 and float(left) < float((problem.A(x) - x).norm() / x.norm()) / 1.3


@pytest.mark.parametrize("name", NAMES)
def test_the_naive_inversion_is_linear_on_the_tape_and_batched(name: str) -> None:
    problem = image_problem(name, 12)
    y = torch.rand(2, *problem.A.data_shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    one_by_one = torch.stack([problem.naive(part) for part in y])
    torch.testing.assert_close(problem.naive(y), one_by_one)
    assert torch.autograd.gradcheck(problem.naive, y[:1].requires_grad_())


@pytest.mark.parametrize("name", ["tomography", "deconvolution"])
def test_restored_solves_the_normal_equations(name: str) -> None:
    """With R = 1/2 alpha |x|^2: (A^T A / sd^2 + alpha) x = A^T y / sd^2."""
    problem, alpha = image_problem(name, 12), 30.0
    y = problem.measured(ellipses(1, 12, 3), 4)[0]
    found = restored(problem, y, Tikhonov(Euclidean(144), alpha), tolerance=1e-9, iterations=500)
    matrix = dense(problem)
    normal = matrix.mT @ matrix / problem.sd**2 + alpha * torch.eye(144, dtype=torch.float64)
    exact = torch.linalg.solve(normal, matrix.mT @ y.reshape(-1) / problem.sd**2)
    torch.testing.assert_close(found.m, exact, rtol=1e-5, atol=1e-7)
    half = problem.least_squares(y, level=0.5)
    assert half.value(exact) == pytest.approx(4 * problem.least_squares(y).value(exact))


def test_the_truths_have_names_and_no_seed_in_common() -> None:
    validation, test = validation_truths(), image_problems.test_truths()
    assert len(validation) == len(VALIDATION_NAMES) and len(test) == len(TEST_NAMES)
    both = torch.cat([validation, test]).flatten(1)
    distances = torch.cdist(both, both) + 1e9 * torch.eye(len(both), dtype=torch.float64)
    assert float(distances.min()) > 1
    assert not set(VALIDATION_NAMES[:3]) & set(TEST_NAMES)


def test_bad_input_is_named() -> None:
    with pytest.raises(GliodeError, match="'radon'; there are tomography"):
        image_problem("radon")
    problem = image_problem("deconvolution", 16)
    with pytest.raises(GliodeError, match=r"deconvolution: data of shape \(2, 16, 16\)"):
        problem.least_squares(torch.zeros(2, 16, 16))
