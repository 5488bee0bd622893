r"""Inverse problems of grey images in [0, 1]: y = A x + noise, for training and for comparing regularizers.

    tomography           60 angles, rays past the corners, a pixel apart       noise 2 % of the data
    sparse_tomography    30 angles, the same rays                              noise 2 %
    deconvolution        Gaussian blur of 1.6 pixels, black beyond the edge    noise 1 % of white
    motion               blur along a diagonal of 7 pixels                     noise 1 %

`image_problem(name, size)` makes one. Its A takes (batch, size, size) to data (batch, ...) and `A.adjoint`
back, on the tape to any order, in float64 and float32: what unrolled methods and trainings need. One image's
`least_squares(y, R)` is for the optimizers of inverse.optimizers. The pictures to tune on and to judge by are
photographs and drawn sections of a body: `validation_truths`, `test_truths`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from inverse.datasets.images import TEST, VALIDATION, test_images, validation_images
from inverse.datasets.procedural import ellipses
from inverse.linear_problems import LinearMap, convolution, gaussian, tomography
from inverse.optimizers import quasi_newton
from inverse.optimizers.iteration import Callback, Result
from inverse.problem import LeastSquares
from inverse.sensitivity import singular_values
from inverse.stopping import GradientTolerance, MaxIterations
from solvers.errors import GliodeError
from solvers.spaces import Euclidean

SIZE = 96
ANGLES = {"tomography": 60, "sparse_tomography": 30}
CORNER = 2**0.5
RAY_INTEGRAL = 0.77
"""Their root mean square in the validation pictures, on a square of side 2."""
VALIDATION_SEED, TEST_SEED = 7001, 8001
"""Seeds of the ellipses to tune on and to judge by: trainings take others."""

Images = Callable[[Tensor], Tensor]


@dataclass
class ImageProblem:
    """y = A x + sd e, e white noise of variance 1, x (size, size); sd in the units of the data.

    naive(y): images (batch, size, size) from data (batch, ...), on the tape: filtered back-projection with
    Hann's window, or Wiener's filter. Noise shows in it: a start, and what adversarial training tells from
    truths.
    """

    name: str
    A: LinearMap
    sd: float
    naive: Images
    size: int = field(init=False)
    norm: float = field(init=False)
    """||A||, the largest singular value."""

    def __post_init__(self) -> None:
        self.size = self.A.shape[-1]
        zero = torch.zeros(self.A.shape, dtype=torch.float64)
        self.norm = float(singular_values(self.A, zero, tol=1e-4).values[0])

    def measured(self, truths: Tensor, seed: int, level: float = 1.0) -> Tensor:
        """Data (batch, ...) of images (batch, size, size) with noise of standard deviation level * sd."""
        clean = self.A(truths)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
        return clean + (level * self.sd * noise).to(clean)

    def least_squares(self, y: Tensor, regularizer: Images | None = None, level: float = 1.0) -> LeastSquares:
        """1/2 ||A x - y||^2 / (level sd)^2 + R(x) of one image, x flat. GliodeError: other data."""
        if tuple(y.shape) != self.A.data_shape:
            raise GliodeError(
                f"{self.name}: data of shape {tuple(y.shape)}; one image of {self.size} pixels has "
                f"{self.A.data_shape}"
            )
        return LeastSquares(Euclidean(self.size**2), self.A, y.double(), level * self.sd, regularizer)


def image_problem(name: str, size: int = SIZE) -> ImageProblem:
    """The problem of that name for images of size x size pixels; GliodeError: an unknown name."""
    if name in ANGLES:
        rays = 2 * math.floor(size * CORNER / 2) + 3  # odd: one runs through the centre
        A = tomography(size, ANGLES[name], rays, rays / size)
        return ImageProblem(name, A, 0.02 * RAY_INTEGRAL, _back_projection(A, 2 / size))
    if name == "deconvolution":
        return _blur(name, size, gaussian(1.6, 2))
    if name == "motion":
        return _blur(name, size, torch.eye(7, dtype=torch.float64) / 7)
    names = (*ANGLES, "deconvolution", "motion")
    raise GliodeError(f"image_problem: none is called {name!r}; there are {', '.join(names)}")


def _blur(name: str, size: int, kernel: Tensor) -> ImageProblem:
    return ImageProblem(name, convolution((size, size), kernel), 0.01, _wiener(size, kernel))


def _back_projection(A: LinearMap, spacing: float) -> Images:
    """Ramachandran and Lakshminarayanan's kernel times Hann's window, then A^T."""
    angles, rays = A.data_shape
    n = 2 * rays  # no ray meets another's image
    j = torch.fft.fftfreq(n, 1 / n, dtype=torch.float64)
    kernel = torch.where(j % 2 == 1, -1 / (math.pi * j * spacing) ** 2, 0.0)
    kernel[0] = 1 / (4 * spacing**2)
    window = (1 + torch.cos(2 * math.pi * torch.fft.rfftfreq(n, dtype=torch.float64))) / 2
    # A^T y sums y over angles, with weights that are the area of a pixel / spacing of the rays
    pixel = (2 / A.shape[0]) ** 2
    gains = torch.fft.rfft(kernel).real * window * (math.pi / angles) * spacing**2 / pixel

    def naive(y: Tensor) -> Tensor:
        filtered = torch.fft.irfft(torch.fft.rfft(y, n) * gains.to(y), n)[..., :rays]
        return A.adjoint(filtered)

    return naive


def _wiener(size: int, kernel: Tensor, noise: float = 0.01) -> Images:
    """conj(k) / (|k|^2 + noise), black beyond the edge."""
    padded = [size + n - 1 for n in kernel.shape]
    k = torch.fft.rfft2(kernel, padded)
    gains = k.conj() / (k.abs().square() + noise)
    low = [n // 2 for n in kernel.shape]
    frame = (low[1], padded[1] - size - low[1], low[0], padded[0] - size - low[0])

    def naive(y: Tensor) -> Tensor:
        transformed = torch.fft.rfft2(torch.nn.functional.pad(y, frame))
        return torch.fft.irfft2(transformed * gains.to(transformed.dtype), padded)[..., :size, :size]

    return naive


def restored(
    problem: ImageProblem,
    y: Tensor,
    regularizer: Images,
    start: Tensor | None = None,
    tolerance: float = 2e-5,
    iterations: int = 300,
    callback: Callback | None = None,
) -> Result:
    """The minimiser of `least_squares(y, regularizer)` for a smooth regularizer, by limited-memory BFGS.

    From `start` (None: the naive inversion), until the gradient is `tolerance` times that at x = 0, which
    does not depend on the start; one of 1e-3 already stops early, as a regularizer of its own. Result.m is
    flat.
    """
    inverse = problem.least_squares(y, regularizer)
    x = problem.naive(inverse.data) if start is None else start
    zero = inverse.evaluate(inverse.space.zeros()).gradient()
    limit = GradientTolerance(0.0, tolerance * inverse.space.dual_norm(zero))
    first = x.detach().double().reshape(-1)
    return quasi_newton.minimise(
        inverse, first, stopping=(limit, MaxIterations(iterations)), callback=callback
    )


def validation_truths(size: int = SIZE, drawn: int = 2) -> Tensor:
    """(3 + drawn, size, size): the VALIDATION photographs, then ellipses."""
    return torch.cat([validation_images(size), ellipses(drawn, size, VALIDATION_SEED)])


def test_truths(size: int = SIZE, drawn: int = 4) -> Tensor:
    """(8 + drawn, size, size): the TEST photographs, then ellipses; never to train or tune on."""
    return torch.cat([test_images(size), ellipses(drawn, size, TEST_SEED)])


test_truths.__test__ = False  # type: ignore[attr-defined]  # no test, where pytest sees it imported

VALIDATION_NAMES = (*VALIDATION, "ellipses 1", "ellipses 2")
TEST_NAMES = (*TEST, *(f"ellipses {k}" for k in range(1, 5)))
