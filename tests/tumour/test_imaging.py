"""What scans show: outlines, voxel means of images, noise, derivatives, ranks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch.autograd import forward_ad

from solvers.errors import GliodeError
from solvers.fem.mesh import Domain, box, voxels
from solvers.spaces import reduce
from tumour.imaging import LEVELS, Camera, Modality, add_noise, noise_sd

SELF, WORLD = MPI.COMM_SELF, MPI.COMM_WORLD
DENSITY, CORE, OEDEMA = Modality("density"), Modality("enhancing"), Modality("oedema", width=0.03)


def grid(n: int, h: float) -> tuple[np.ndarray, np.ndarray]:
    """Centres (n^3, 3) and edges of the voxels of a cube from the origin."""
    one = (np.arange(n) + 0.5) * h
    centres = np.stack(np.meshgrid(one, one, one, indexing="ij"), -1).reshape(-1, 3)
    return centres, np.eye(3) * h


def ellipsoid(domain: Domain) -> torch.Tensor:
    x = domain.points[: domain.n_owned] - [7.0, 8.0, 6.0]
    return torch.from_numpy(0.9 * np.exp(-((x / [3.0, 4.0, 2.5]) ** 2).sum(1)))


def test_a_density_scan_shows_voxel_means() -> None:
    """Of a linear density exactly: scan voxels finer or coarser than the mesh's, or shifted."""
    domain = box((12.0, 12.0, 12.0), (6, 6, 6), SELF)
    slope = np.array([0.03, 0.02, -0.01])
    u = domain.interpolate(lambda x: 0.2 + x @ slope)
    for n, h in ((12, 1.0), (4, 3.0), (5, 1.7)):
        centres, edges = grid(n, h)
        (image,) = Camera(domain, centres, edges)(u, [DENSITY])
        np.testing.assert_allclose(image, 0.2 + centres @ slope, atol=1e-13)


def test_the_mean_is_of_the_image_not_the_image_of_the_mean() -> None:
    """A front within a voxel shows the part of the voxel behind it."""
    domain = box((4.0, 2.0, 2.0), (8, 4, 4), SELF)
    u = domain.interpolate(lambda x: x[:, 0] / 4)
    centres, edges = np.array([[1.0, 1.0, 1.0]]), np.eye(3) * 2.0
    sharp = Modality("oedema", width=1e-4, level=0.2)
    (image,) = Camera(domain, centres, edges, sub=10)(u, [sharp])
    assert float(image) == pytest.approx((2.0 - 0.8) / 2.0, abs=1e-3)


def test_outlines_are_smoothed_thresholds_at_their_levels() -> None:
    u = torch.linspace(0, 1, 101, dtype=torch.float64)
    for modality in (CORE, OEDEMA):
        level = LEVELS[modality.kind]
        image = modality.image(u)
        np.testing.assert_allclose(image, 1 / (1 + np.exp(-(u.numpy() - level) / modality.width)))
        assert float(modality.image(torch.tensor(level))) == pytest.approx(0.5)
    assert LEVELS["oedema"] < LEVELS["enhancing"]
    assert Modality("oedema", level=0.3).threshold == 0.3
    assert DENSITY.image(u) is u


def test_several_images_of_one_state() -> None:
    domain = box((16.0, 16.0, 16.0), (8, 8, 8), SELF)
    camera = Camera(domain, *grid(8, 2.0))
    together = camera(ellipsoid(domain), [CORE, OEDEMA, DENSITY])
    for modality, image in zip([CORE, OEDEMA, DENSITY], together, strict=True):
        torch.testing.assert_close(image, camera(ellipsoid(domain), [modality])[0])
        assert image.shape == (512,)


def test_scan_voxels_past_the_edge_of_the_mesh() -> None:
    """A scan voxel cut by the brain's surface takes the nearest values; one far outside is refused."""
    mask = np.ones((4, 4, 4), dtype=bool)
    domain = voxels(mask, np.diag([2.0, 2.0, 2.0, 1.0]), comm=SELF)
    u = torch.full((domain.n_owned,), 0.7, dtype=torch.float64)
    beyond = np.array([[7.5, 3.0, 3.0]])
    (image,) = Camera(domain, beyond, np.eye(3))(u, [DENSITY])
    assert float(image) == pytest.approx(0.7)
    with pytest.raises(GliodeError, match="lie outside the mesh"):
        Camera(domain, np.array([[30.0, 3.0, 3.0]]), np.eye(3))


def test_derivatives() -> None:
    domain = box((8.0, 8.0, 8.0), (4, 4, 4), SELF)
    camera = Camera(domain, *grid(4, 2.0))
    u = ellipsoid(domain).requires_grad_()

    def images(u: torch.Tensor) -> torch.Tensor:
        return torch.cat(camera(u, [CORE, DENSITY]))

    assert torch.autograd.gradcheck(images, (u,), check_forward_ad=True)
    direction = torch.rand(domain.n_owned, dtype=torch.float64)
    with forward_ad.dual_level():
        dual = images(forward_ad.make_dual(u.detach(), direction))
        tangent = forward_ad.unpack_dual(dual).tangent
    g = torch.rand(len(tangent), dtype=torch.float64)
    (gradient,) = torch.autograd.grad(images(u), u, g)
    assert float(g @ tangent) == pytest.approx(float(gradient @ direction), rel=1e-12)


def test_noise_has_its_level_and_is_seeded() -> None:
    image: np.ndarray = np.linspace(0.0, 0.8, 40_000)
    for modality, sd in ((Modality("density", noise=0.05), 0.04), (Modality("oedema", noise=0.1), 0.1)):
        assert noise_sd(image, modality) == pytest.approx(sd)
        noise = add_noise(image, modality, np.random.default_rng(1)) - image
        assert abs(noise.mean()) < 4 * sd / math.sqrt(len(image))
        assert noise.std() == pytest.approx(sd, rel=4 / math.sqrt(2 * len(image)))
        # Independent from voxel to voxel.
        assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 4 / math.sqrt(len(image))
        again = add_noise(image, modality, np.random.default_rng(1)) - image
        np.testing.assert_array_equal(noise, again)


def test_what_makes_no_sense_is_refused() -> None:
    for bad, message in (
        ({"kind": "mri"}, "kind 'mri' is not one of density, enhancing, oedema"),
        ({"kind": "density", "noise": 0.0}, "imaging.noise: 0.0"),
        ({"kind": "oedema", "width": -1.0}, "imaging.width: -1.0"),
        ({"kind": "oedema", "level": 1.2}, "imaging.level: 1.2"),
    ):
        with pytest.raises(GliodeError, match=message):
            Modality(**bad)  # type: ignore[arg-type]
    with pytest.raises(GliodeError, match="zero everywhere"):
        noise_sd(np.zeros(3), DENSITY)
    assert noise_sd(np.zeros(3), CORE) == 0.05


@pytest.mark.mpi
def test_ranks_agree_with_one_process() -> None:
    """Every rank gets every voxel; the gradient of a sum over voxels is not counted once a rank."""
    results = []
    for comm in (SELF, WORLD):
        domain = box((16.0, 16.0, 16.0), (8, 8, 8), comm)
        u = ellipsoid(domain).requires_grad_()
        images = Camera(domain, *grid(16, 1.0))(u, [OEDEMA, DENSITY])
        value = (images[0] ** 2).sum() + images[1].sum()
        (gradient,) = torch.autograd.grad(value, u)
        # <gradient, direction> over the ranks tells both the values and their places.
        x = torch.from_numpy(domain.points[: domain.n_owned])
        moments = [reduce((gradient * x[:, k] ** 2).sum(), comm) for k in range(3)]
        results.append([*(image.detach().numpy() for image in images), *(float(m) for m in moments)])
    for serial, parallel in zip(*results, strict=True):
        np.testing.assert_allclose(parallel, serial, rtol=1e-9, atol=1e-12)
