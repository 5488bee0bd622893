"""Identification on a small synthetic head: recovery, what one scan leaves open, resuming, and refusals."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from solvers.errors import GliodeError
from tests.tumour import heads
from tumour.identification import LOGARITHMIC, Identifier, Prior, Settings, _bumps
from tumour.imaging import Modality
from tumour.model import PARAMETERS, Seed, TumourModel, domain_of
from tumour.patients import Scan, draw, observe

TRUTH = {"D_white": 0.4, "D_grey": 0.08, "rho": 0.03, "x": 3.0, "y": -4.0, "z": 2.0, "age": 170.0}
SEED = Seed(width=4.0)  # wide enough for the coarse mesh of 12 mm


head = partial(heads.head, radius=44, side=96)


@pytest.fixture(scope="module")
def scans() -> list[Scan]:
    finer = TumourModel(domain_of(head(3.0)), seed=SEED, step=2.5)
    return observe(finer, TRUTH, head(6.0), (0.0, 60.0), [Modality("density")], noise_seed=1)


def identifier(scans: list[Scan], **options: object) -> Identifier:
    settings = Settings(prior=Prior(age=(250.0, 0.6)))
    return Identifier(head(6.0), scans, settings, seed=SEED, **options)  # type: ignore[arg-type]


def test_two_visits_give_the_parameters_back(scans: list[Scan]) -> None:
    found = identifier(scans).run()
    for k, name in enumerate(PARAMETERS):
        truth = math.log(TRUTH[name]) if name in LOGARITHMIC else TRUTH[name]
        assert abs(float(found.posterior.mean[k]) - truth) < 3.5 * float(found.posterior.sd[k]), name
    assert found.estimates["D_white"].value == pytest.approx(TRUTH["D_white"], rel=0.15)
    assert found.estimates["rho"].value == pytest.approx(TRUTH["rho"], rel=0.1)
    seed = [found.estimates[axis].value for axis in "xyz"]
    assert math.dist(seed, [TRUTH[axis] for axis in "xyz"]) < 2.0


def test_missing_slices_leave_only_the_data(scans: list[Scan]) -> None:
    """Half of the second scan is missing, and garbage stands there: the parameters are found all the same."""
    first, second = scans
    mask = second.mask.copy()
    mask[:, :, : mask.shape[2] // 2] = False
    half = replace(second, mask=mask, values=np.where(mask, second.values, np.nan))
    partial, full = identifier([first, half]), identifier(scans)
    region, count = partial.region, int(full.region.sum())
    assert len(partial.data) == region.sum() + (region & mask).sum() < 1.6 * region.sum()
    assert bool(torch.isfinite(partial.data).all())
    m = partial.settings.prior.mean(np.array([TRUTH[axis] for axis in "xyz"]))
    with torch.no_grad():
        images, all_of = partial.fine(m), full.fine(m)
    for image, whole, shown in zip(
        images.split([int(region.sum()), int((region & mask).sum())]),
        all_of.split(count),
        (region, region & mask),
        strict=True,
    ):
        both = shown & full.region  # the regions differ by what the missing half showed
        assert both.sum() > 0.9 * shown.sum()
        here, there = (torch.from_numpy(both[region_of]) for region_of in (shown, full.region))
        torch.testing.assert_close(image[here], whole[there])
    found = partial.run()
    for k, name in enumerate(PARAMETERS):
        truth = math.log(TRUTH[name]) if name in LOGARITHMIC else TRUTH[name]
        assert abs(float(found.posterior.mean[k]) - truth) < 3.5 * float(found.posterior.sd[k]), name


def test_one_scan_fixes_length_and_growth_times_only(scans: list[Scan]) -> None:
    found = identifier(scans[:1]).run()
    assert found.derived["infiltration_length"].variance_ratio < 0.1
    assert found.derived["growth_times"].variance_ratio < 0.1
    assert found.derived["front_speed"].variance_ratio > 0.25  # fixed is 0.1 and less
    length = math.sqrt(TRUTH["D_white"] / TRUTH["rho"])
    assert found.derived["infiltration_length"].value == pytest.approx(length, rel=0.15)
    assert any(not combination.fixed for combination in found.combinations)


def test_resumed_run_gives_the_same_result(scans: list[Scan]) -> None:
    class Killed(Exception):
        pass

    saved: list[dict[str, np.ndarray]] = []

    def save(memory: dict[str, np.ndarray]) -> None:
        saved.append(dict(memory))
        if len(saved) == 12:
            raise Killed

    whole = identifier(scans).run()
    with pytest.raises(Killed):
        identifier(scans, save=save).run()
    again = identifier(scans, resume=saved[-1]).run()
    assert torch.allclose(again.posterior.mean, whole.posterior.mean, rtol=0, atol=1e-12)
    assert torch.allclose(again.posterior.sd, whole.posterior.sd, rtol=1e-9)


def test_bumps_are_a_partition_of_unity() -> None:
    at = torch.rand(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 100
    assert torch.allclose(_bumps(at, 16.0).to_dense().sum(1), torch.ones(50, dtype=torch.float64))


def test_prior_covariance_is_that_of_an_independent_ratio() -> None:
    covariance = Prior(D_white=(0.3, 0.9), ratio=(6.0, 0.4)).covariance()
    ratio = torch.zeros(7, dtype=torch.float64)
    ratio[0], ratio[1] = 1.0, -1.0
    assert float(ratio @ covariance @ ratio) == pytest.approx(0.4**2)
    assert float(covariance[0] @ ratio) == pytest.approx(0.0, abs=1e-12)


def test_refusals(scans: list[Scan]) -> None:
    with pytest.raises(GliodeError, match="none given"):
        Identifier(head(6.0), [])
    with pytest.raises(GliodeError, match="earliest must be day 0"):
        Identifier(head(6.0), [replace(scans[0], day=5.0)])
    with pytest.raises(GliodeError, match="shape"):
        Identifier(head(3.0), scans)
    with pytest.raises(GliodeError, match="nothing is visible"):
        Identifier(head(6.0), [replace(scans[0], values=0 * scans[0].values)], seed=SEED)
    with pytest.raises(GliodeError, match="NaN"):
        replace(scans[0], values=np.full_like(scans[0].values, np.nan))


def test_drawn_patients_are_seeded_and_realistic() -> None:
    anatomy = head(4.0)
    model = TumourModel(domain_of(head(6.0)))
    first, again, other = (draw(anatomy, seed, model) for seed in (3, 3, 4))
    assert first == again and first != other
    m = {name: torch.tensor(value, dtype=torch.float64) for name, value in first.items()}
    u = model.states(m)[0]
    assert 10e3 < model.domain.integral((u > 0.16).double()) < 150e3
    assert model.domain.integral((u > 0.6).double()) >= 1e3
