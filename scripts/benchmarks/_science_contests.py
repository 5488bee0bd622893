"""The contests of the study `science`: ours and the rivals on the same problem, sizes as tuned."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from inverse.collocation import Term
from scripts.benchmarks import Check
from scripts.benchmarks import _science_rivals as rivals
from scripts.benchmarks._science_rivals import Result, Rival, Unknowing, columns, worst
from scripts.benchmarks.equation_rows.odes import Case, by_scipy, uniform
from solvers.node.collocation import Field, scattered
from solvers.node.science.activated import ScienceActivated, Unknown
from solvers.node.science.systems import SYSTEMS

# ---- Lotka-Volterra, inverse ------------------------------------------------------------------------------

PREY = SYSTEMS["lotka_volterra"]
PREY_STARTS = {"alpha": 1.0, "beta": 1.0, "gamma": 1.3, "delta": 0.7}


def prey_case() -> Case:
    return uniform(PREY, 90, 3, (0, 1))


def prey_data(case: Case, seed: int, noise: float = 0.01) -> tuple[Tensor, Tensor]:
    """States at the observed times with noise, and its standard deviations."""
    clean = by_scipy(case)
    sd = noise * clean.abs().amax(0).expand_as(clean)
    draw = torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return clean + sd * draw, sd


def far_starts(seed: int) -> dict[str, float]:
    """Rates up to three times too large or too small."""
    draw = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return {
        name: value * 3 ** (2 * float(u) - 1)
        for (name, value), u in zip(PREY.parameters.items(), draw, strict=True)
    }


def prey_identified(
    seed: int, windows: tuple[float, ...] = (1 / 3, 1.0), starts: Mapping[str, float] = PREY_STARTS
) -> Result:
    case = prey_case()
    data, sd = prey_data(case, seed)
    begin = time.process_time()
    unknowns = {name: Unknown(value, positive=True) for name, value in starts.items()}
    network = ScienceActivated(PREY.field, unknowns)
    for share in windows:
        case.fit(network, data, sd, round(share * len(data)))
    found = {name: float(unknown.value()) for name, unknown in unknowns.items()}
    return {"error": worst(found, PREY.parameters), "seconds": time.process_time() - begin}


def prey_pinn(rival: Rival, seconds: float, seed: int, starts: Mapping[str, float] = PREY_STARTS) -> Result:
    case = prey_case()
    data, sd = prey_data(case, seed)
    x0, high = PREY.x0, (PREY.duration,)
    solution = Field(
        "t",
        (0.0,),
        high,
        2,
        lift=lambda z: x0.expand(len(z), 2),
        start=True,
        width=rival.width,
        layers=rival.layers,
        seed=seed,
    )
    model = Unknowing(solution, starts)
    rows = torch.cat([case.times[:, None], data], 1)
    inputs, scale = columns(rows, 1), sd[0] / sd[0].max()

    def equation(model: Unknowing, z: Tensor) -> Tensor:
        u = model.solution.jets(z, ("t",))
        return u["t"] - PREY.field(z, u[""], **model.rates())

    def misfit(model: Unknowing, z: Tensor) -> Tensor:
        return (model.solution(inputs(z)) - z[:, 1:]) / scale

    terms = [Term(equation, scattered((0.0,), high, rival.points, seed)), Term(misfit, rows, rival.data)]
    spent = rival.train(model, terms, seconds)
    found = {name: float(rate.detach()) for name, rate in model.rates().items()}
    return {"error": worst(found, PREY.parameters), "seconds": spent}


# ---- rivals -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contest:
    """A problem: ours (seed -> result), and the rivals (seconds, seed -> result), with their tuned sizes."""

    ours: Callable[[int], Result]
    others: dict[str, Callable[[float, int], Result]]
    unit: str
    direct: bool


def contests() -> dict[str, Contest]:
    return {
        "logistic growth, direct": Contest(
            lambda seed: rivals.logistic_ours(640),
            {"PINN": lambda T, seed: rivals.logistic_pinn(Rival(layers=2, points=100), T, seed)},
            "relative L2",
            True,
        ),
        "heat, direct": Contest(
            lambda seed: rivals.heat_ours(512, 320),
            {"PINN": lambda T, seed: rivals.heat_pinn(Rival(layers=2, points=400), T, seed)},
            "relative L2",
            True,
        ),
        "Poisson, direct": Contest(
            lambda seed: rivals.poisson_ours(128),
            {
                "PINN": lambda T, seed: rivals.poisson_rival(
                    Rival(width=24, points=500, share=0.1), T, seed, False
                ),
                "deep Ritz": lambda T, seed: rivals.poisson_rival(
                    Rival(width=24, points=2000), T, seed, True
                ),
            },
            "relative L2",
            True,
        ),
        "heat, conductivity at 1 % noise": Contest(
            lambda seed: rivals.heat_identified(seed),
            {"PINN": lambda T, seed: rivals.heat_inverse_pinn(Rival(layers=2, points=300), T, seed)},
            "of the truth",
            False,
        ),
        "Lotka-Volterra, 4 rates at 1 % noise": Contest(
            lambda seed: prey_identified(seed),
            {
                "PINN": lambda T, seed: prey_pinn(Rival(points=150, data=3), T, seed),
                "ours in one window": lambda T, seed: prey_identified(seed, (1.0,)),
            },
            "of the truth, worst",
            False,
        ),
    }


def rival_checks(seconds: float, seeds: Sequence[int]) -> list[Check]:
    checks = []
    for name, contest in contests().items():
        found = {"ours": [contest.ours(seed) for seed in seeds]}
        for rival, train in contest.others.items():
            found[rival] = [train(seconds, seed) for seed in seeds]
        means = {}
        for who, results in found.items():
            errors = [result["error"] for result in results]
            means[who] = float(np.mean(errors))
            spent = float(np.mean([result["seconds"] for result in results]))
            text = f"{means[who]:.2e} +- {np.std(errors, ddof=1):.1e} in {spent:.2g} s"
            checks.append(Check(f"{name}, {who}: error {contest.unit}", text))
        if contest.direct:
            ratio = min(mean for who, mean in means.items() if who != "ours") / means["ours"]
            checks.append(Check.at_least(f"{name}: best rival's error over ours", ratio, 1))
        else:
            checks.append(Check.at_most(f"{name}: ours", 100 * means["ours"], 5, "%"))
    return checks


def start_checks(seconds: float, count: int) -> list[Check]:
    """Lotka-Volterra from rates up to three times off: how often all four come within 10 %."""
    ways: dict[str, Callable[[int], Result]] = {
        "ours, one window": lambda seed: prey_identified(seed, (1.0,), far_starts(seed)),
        "ours, two windows": lambda seed: prey_identified(seed, (1 / 3, 1.0), far_starts(seed)),
        "ours, three windows": lambda seed: prey_identified(seed, (0.1, 0.3, 1.0), far_starts(seed)),
        "PINN": lambda seed: prey_pinn(Rival(points=150, data=3), seconds, seed, far_starts(seed)),
    }
    seeds = range(1, count + 1)
    return [
        Check(f"far starts, {who}: of {count} within 10 %", sum(way(seed)["error"] < 0.1 for seed in seeds))
        for who, way in ways.items()
    ]
