"""How images are compared: measures against formulas, intervals against the normal law, the search."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from inverse.datasets.images import TEST, VALIDATION
from inverse.datasets.procedural import ellipses
from inverse.image_problems import TEST_NAMES, VALIDATION_NAMES, image_problem
from inverse.regularizers.learned import files
from inverse.regularizers.learned.adversarial import AdversarialNetwork
from inverse.regularizers.learned.ridge import Ridge
from scripts.benchmarks import _image_contest as contest
from scripts.benchmarks import _image_limits as limits
from scripts.benchmarks._images import Interval, Parameters, Row, gain, interval, psnr, ssim, table, tuned
from solvers.node.convolution_flow import NonExpansiveDenoiser


def test_psnr_and_ssim_of_known_errors() -> None:
    truth = torch.rand(32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert psnr(truth + 0.1, truth) == pytest.approx(20, abs=1e-9)
    assert psnr((truth + 0.01).float(), truth) == pytest.approx(40, abs=1e-3)
    assert ssim(truth, truth) == pytest.approx(1)
    assert psnr(truth * math.nan, truth) == -math.inf and ssim(truth * math.inf, truth) == 0
    # two constants a, b: all variances are 0, SSIM = (2 a b + c) / (a^2 + b^2 + c), c = 0.01^2
    a, b = 0.4, 0.7
    flat = torch.ones(16, 16, dtype=torch.float64)
    assert ssim(a * flat, b * flat) == pytest.approx((2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4))


def test_intervals_are_those_of_the_normal_law_for_many_values() -> None:
    x = np.random.default_rng(1).normal(3, 2, 2000)
    found = interval(list(x))
    half = 1.96 * x.std() / math.sqrt(2000)
    assert found.mean == pytest.approx(x.mean())
    assert found.low == pytest.approx(x.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(x.mean() + half, abs=0.1 * half)
    assert interval([2.0, 2.0, 2.0]) == Interval(2, 2, 2)
    assert math.isinf(interval([1.0]).high) and math.isinf(interval([1.0, -math.inf]).high)


def test_gains_are_paired() -> None:
    """Images differ by 10 dB, the methods by 0.5 on each: paired, that is certain."""
    base = [20.0, 30.0, 25.0, 40.0, 22.0]
    low, high = gain([x + d for x, d in zip(base, (0.4, 0.5, 0.6, 0.5, 0.5), strict=True)], base)[1:]
    assert 0.4 < low < 0.5 < high < 0.6


@pytest.mark.parametrize("start", [{"weight": 1.0}, {"weight": 100.0}])
def test_the_search_finds_a_maximum_within_its_last_factor(start: Parameters) -> None:
    calls = []

    def score(p: Parameters) -> float:
        calls.append(p["weight"])
        return -abs(math.log(p["weight"] / 7.3))

    found = tuned(score, start, budget=40)
    assert 1 / 1.2 < found.parameters["weight"] / 7.3 < 1.2
    assert found.tried == len(calls) == len(set(calls)) < 40


def test_the_search_of_two_parameters_survives_failures_and_keeps_its_budget() -> None:
    def score(p: Parameters) -> float:
        if p["scale"] > 50:
            return math.nan
        return -(math.log(p["weight"] / 30) ** 2) - math.log(p["scale"] * 3) ** 2

    found = tuned(score, {"weight": 1.0, "scale": 100.0}, budget=60)
    assert found.parameters["weight"] == pytest.approx(30, rel=0.25)
    assert found.parameters["scale"] == pytest.approx(1 / 3, rel=0.25)
    assert tuned(score, {"weight": 1.0, "scale": 1.0}, budget=5).tried == 5
    assert tuned(lambda p: 3.0, {}) == ({}, 3.0, 1)


def test_the_table_shows_gains_over_tv_and_failures() -> None:
    truth = torch.linspace(0, 1, 256, dtype=torch.float64).view(16, 16)
    rows = [Row("TV"), Row("good", parameters={"weight": 2.0}, tried=9), Row("bad")]
    for number in range(8):
        wave = torch.sin(torch.arange(256, dtype=torch.float64) + number).view(16, 16)
        for row, size in zip(rows, (0.1, 0.05, 0.2), strict=True):
            row.add(truth + (size + 0.001 * number) * wave, truth, 0.5, 30)
    tv, good, bad = (str(check.value) for check in table("problem", rows))
    assert "over TV" not in tv and "30 iterations" in tv
    assert "over TV +5." in good and "weight 2 (9 tried)" in good and "loses" not in good
    assert "over TV -" in bad and bad.endswith("loses against TV")


# ---- the contest ------------------------------------------------------------------------------------------


def weights(folder: Path, **modules: nn.Module) -> None:
    for name, module in modules.items():
        files.save(folder / f"{name}.safetensors", module, files.Card(name, "none", "none"))


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of data/regularizers, problems of 20 pixels in the place of 96."""
    monkeypatch.setattr(files, "FOLDER", tmp_path)
    monkeypatch.setattr(contest, "image_problem", lambda name: image_problem(name, 20))
    monkeypatch.setattr(limits, "image_problem", lambda name: image_problem(name, 20))
    for module in (contest, limits):
        monkeypatch.setattr(module, "test_truths", lambda: ellipses(2, 20, 5))
    monkeypatch.setattr(contest, "KINDS", {"one": (slice(0, 1), slice(1, 2))})
    monkeypatch.setattr(contest, "BUDGET", {0: 1, 1: 4, 2: 5})
    monkeypatch.setattr(contest, "ITERATIONS", 30)
    monkeypatch.setattr(contest, "validation_truths", lambda: ellipses(1, 20, 6))
    return tmp_path


def test_methods_are_those_of_the_folder_for_the_problem(shipped: Path) -> None:
    torch.manual_seed(0)
    convex, weak = Ridge((4,), (3,)), Ridge((4,), (3,), potential="saturating")
    weights(
        shipped, crr=convex, wcrr=weak, ar_tomography=AdversarialNetwork(2, 4), pnp=NonExpansiveDenoiser(2)
    )
    names = list(contest.methods("deconvolution"))
    assert names == ["TV", "H1", "CRR (crr)", "PnP (pnp)", "WCRR (wcrr)"]
    assert "AR (ar_tomography)" in contest.methods("tomography")
    assert "AR (ar_tomography)" not in contest.methods("sparse_tomography")


@pytest.mark.parametrize("name", ["TV", "H1", "CRR (crr)", "PnP (pnp)"])
def test_each_method_is_tuned_and_judged(name: str, shipped: Path) -> None:
    """It comes nearer to the truth than what tuning began with, or as near; numbers are of its images."""
    torch.manual_seed(0)
    weights(shipped, crr=Ridge((4,), (3,)), pnp=NonExpansiveDenoiser(2))
    row, images = contest.row(("deconvolution", name))["one"]
    assert images.shape == (1, 20, 20)
    truth = ellipses(2, 20, 5)[1]
    assert row.psnr == [pytest.approx(psnr(images[0], truth))] and row.psnr[0] > 12
    assert 1 < row.tried <= 5 and set(row.parameters) == set(contest.methods("deconvolution")[name].start)


def test_the_kinds_are_all_pictures_once() -> None:
    for part, names in enumerate((VALIDATION_NAMES, TEST_NAMES)):
        photographs, sections = (names[of[part]] for of in contest.KINDS.values())
        assert (*photographs, *sections) == names and photographs == (VALIDATION, TEST)[part]
        assert all(name.startswith("ellipses") for name in sections)


def test_bars_miss_methods_and_losses() -> None:
    rows = {
        name: Row(name, psnr=[30 + gain + 0.1 * k for k in range(8)])
        for name, gain in (("TV", 0.0), ("H1", -2.0), ("CRR (a)", 0.3), ("WCRR (b)", 0.2))
    }
    there, better = contest.bars("problem", rows)
    assert there.holds is False and there.value == "ICNN-AR, AR, NETT, TDV, unrolled, PnP"
    assert better.holds and better.value == pytest.approx(0.3) and "CRR (a)" in better.what
    rows["CRR (a)"].psnr = rows["WCRR (b)"].psnr = [29.0] * 8
    assert contest.bars("problem", rows)[1].holds is False


def test_the_limit_of_a_convex_one_obeys_the_bounds_of_the_theory(shipped: Path) -> None:
    """At each level; numbers that do not fall, or are above the bounds, fail the checks."""
    torch.manual_seed(0)
    weights(shipped, crr=Ridge((8,), (5,)))
    levels = tuple(value / 2 for value in limits.NOISE)
    job = ("tomography", str(shipped / "crr.safetensors"), {"weight": 200.0, "scale": 10.0}, 1, levels)
    found = limits.limit(job)
    assert max(found.share) <= 1 and max(found.discrepancy) < 3
    checks = limits.limit_checks("tomography", "CRR", 2.0, levels, [found])
    assert [check.holds for check in checks] == [None, True, None, True, True, True]
    flat = limits.Limit([0.1] * 5, [1.0] * 5, [1.2] * 5, [4.0] * 5)
    checks = limits.limit_checks("tomography", "CRR", 2.0, levels, [flat])
    assert [check.holds for check in checks] == [None, False, None, False, False, False]
