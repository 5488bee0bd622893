"""The standalone NODE on scikit-learn's digits at 840 gradients: conjugate gradients and Adam, noise and
attacks.

x' = tanh(W(t) x + b(t)) is the whole network: x(0) are the 64 pixels, scaled to [0, -1], the scores are ten
components of x(3). The NCG variant, then its inner product over the depth (H1 or L2), and Adam's learning
rate and batch, are chosen by accuracy on 287 validation digits of the training part, on seeds of their own;
then five seeds, each with its own 360 stratified random test digits, the network trained on all the others.
Both methods minimise the same loss and start from the same weights.
"""

from __future__ import annotations

import os
import statistics
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from inverse.datasets import digits
from inverse.losses import SquaredLoss
from inverse.methods import Adam, ConjugateGradients, Method
from inverse.sensitivity import minimal_attack
from inverse.training import evaluate, train
from scripts.benchmarks import Check
from solvers.node.fields import Standalone
from solvers.node.models import Components, Node

OUT = Path(__file__).resolve().parents[2] / "results" / "benchmarks"
BUDGET = 840
DURATION, STEPS, KNOTS = 3.0, 30, 31
LENGTH = 1.0
VARIANTS = ("FR", "PR+", "FR-PR", "HS", "DY")
RATES, BATCHES = (1e-3, 3e-3, 1e-2), (100, 300)
TUNING, SEEDS = (101, 102), (1, 2, 3, 4, 5)
NOISE = (0.1, 0.2, 0.3)  # standard deviations, of pixels in [0, 1]


@dataclass(frozen=True)
class Job:
    """One training; validate: on the validation part; robust: under noise and attacks too."""

    seed: int
    method: Method
    batch: int
    network: str = "node"
    length: float = LENGTH
    gradients: int = BUDGET
    validate: bool = False
    robust: bool = False


def model_of(network: str, seed: int) -> nn.Sequential:
    """The NODE, with the same weights at all depths at first; or the ResNet of the same size and scores,
    whose layers begin with random weights each of their own.
    """
    kind = {"node": "linear", "resnet": "steps"}[network]
    knots = KNOTS if network == "node" else STEPS
    field = Standalone(64, kind=kind, knots=knots, duration=DURATION)
    rough = 0.0 if network == "node" else 1.0
    field.reset(0.5, rough, torch.Generator().manual_seed(seed))
    return nn.Sequential(Node(field, DURATION, STEPS, "euler"), Components(10))


def run_job(job: Job) -> dict[str, Any]:
    """Train, and test."""
    torch.set_num_threads(1)
    parts = digits(job.seed, validation=287 if job.validate else 0)
    data = -parts.train[0], parts.train[1]
    test = parts.validation if job.validate else parts.test
    test = -test[0], test[1]
    model, loss = model_of(job.network, job.seed), SquaredLoss(10)
    trained = train(
        model,
        loss,
        data,
        job.method,
        epochs=10**6,
        batch=job.batch,
        length=job.length,
        max_gradients=job.gradients,
        seed=job.seed,
    )
    field = model.get_submodule("0.field")
    assert isinstance(field, Standalone)
    found: dict[str, Any] = {
        "accuracy": 100 * evaluate(model, loss, test)[1],
        "gradients": trained.counts["adjoint"],
        "seconds": trained.seconds,
        "roughness": field.weights("W").roughness(),
    }
    if not job.robust:
        return found
    model.eval().requires_grad_(False)
    noise = torch.Generator().manual_seed(job.seed)
    for sd in NOISE:
        copies = test[0].repeat(20, 1)
        noisy = copies + sd * torch.randn(copies.shape, generator=noise)
        found[f"noise {sd}"] = 100 * evaluate(model, loss, (noisy, test[1].repeat(20)))[1]
    found["attack"] = _attack_norms(model, test)
    return found


def _attack_norms(model: nn.Module, test: tuple[Tensor, Tensor]) -> list[float]:
    """||perturbation|| of the minimal attack for each test digit; 0 where it is wrong as it is."""
    return minimal_attack(model, *test).norms.tolist()


def run(full: bool) -> list[Check]:
    """Choose, train, compare."""
    with get_context("spawn").Pool(len(os.sched_getaffinity(0))) as pool:
        all_of = partial(pool.map, run_job, chunksize=1)
        checks: list[Check] = []
        # Choice of the variant, and of Adam's rate and batch, by validation accuracy.
        ours = {v: Job(0, ConjugateGradients(v, 11), 300, validate=True) for v in VARIANTS}
        theirs = {(lr, b): Job(0, Adam(lr, cosine=True), b, validate=True) for lr in RATES for b in BATCHES}
        resnets = {lr: replace(theirs[lr, 100], network="resnet", length=0.0) for lr in RATES}
        candidates = [*ours.values(), *theirs.values(), *resnets.values()]
        found = all_of([replace(job, seed=seed) for job in candidates for seed in TUNING])
        scores = {
            job: statistics.mean(r["accuracy"] for r in found[k * len(TUNING) : (k + 1) * len(TUNING)])
            for k, job in enumerate(candidates)
        }
        variant = max(VARIANTS, key=lambda v: scores[ours[v]])
        rate = max(theirs, key=lambda key: scores[theirs[key]])
        deep = max(RATES, key=lambda lr: scores[resnets[lr]])
        flat = replace(ours[variant], length=0.0)
        scores[flat] = statistics.mean(
            r["accuracy"] for r in all_of([replace(flat, seed=seed) for seed in TUNING])
        )
        text = ", ".join(f"{v} {scores[ours[v]]:.1f}" for v in VARIANTS)
        checks.append(Check(f"variant chosen on validation ({text})", variant))
        text = f"H1 {scores[ours[variant]]:.1f}, L2 {scores[flat]:.1f}"
        inner = "H1" if scores[ours[variant]] >= scores[flat] else "L2"
        checks.append(Check(f"inner product over depth chosen on validation ({text})", inner))
        text = ", ".join(f"{lr:g}/{b} {scores[job]:.1f}" for (lr, b), job in theirs.items())
        checks.append(Check(f"Adam's rate/batch chosen on validation ({text})", f"{rate[0]:g}/{rate[1]}"))
        # The test.
        base = replace(ours[variant], validate=False)
        adam = replace(theirs[rate], validate=False)
        resnet = replace(resnets[deep], validate=False, robust=True)
        kinds = {
            f"NODE, NCG {variant}, H1": replace(base, robust=inner == "H1"),
            f"NODE, NCG {variant}, L2": replace(base, length=0.0, robust=inner == "L2"),
            "NODE, Adam, equal gradients": adam,
            "ResNet, Adam": resnet,
        }
        runs = dict(
            zip(
                kinds,
                _split(all_of([replace(j, seed=s) for j in kinds.values() for s in SEEDS])),
                strict=True,
            )
        )
        first = f"NODE, NCG {variant}, {inner}"
        cost = statistics.mean(r["seconds"] / r["gradients"] for r in runs["NODE, Adam, equal gradients"])
        spent = statistics.mean(r["seconds"] for r in runs[first])
        longer = replace(adam, gradients=round(spent / cost))
        runs["NODE, Adam, equal CPU time"] = all_of([replace(longer, seed=s) for s in SEEDS])
    for name, results in runs.items():
        accuracy = [r["accuracy"] for r in results]
        gradients = statistics.mean(r["gradients"] for r in results)
        seconds = statistics.mean(r["seconds"] for r in results)
        spread = statistics.stdev(accuracy)
        what = f"{name}: test accuracy (sd {spread:.2f}; {gradients:.0f} gradients, {seconds:.0f} s)"
        mean = statistics.mean(accuracy)
        checks.append(Check.at_least(what, mean, 97, "%") if name == first else Check(what, mean, "%"))
    most = max(r["gradients"] for r in runs[first])
    checks.append(Check.at_most("gradients spent by NCG", most, BUDGET))
    for name in list(kinds)[:3]:
        rough = statistics.mean(r["roughness"] for r in runs[name])
        checks.append(Check(f"{name}: mean |W'|", rough))
    for name in (first, "ResNet, Adam"):
        for sd in NOISE:
            noisy = statistics.mean(r[f"noise {sd}"] for r in runs[name])
            checks.append(Check(f"{name}: accuracy under pixel noise of sd {sd}", noisy, "%"))
        norms = [n for r in runs[name] for n in r["attack"]]
        checks.append(Check(f"{name}: median norm of the minimal attack", statistics.median(norms)))
        for radius in (0.25, 0.5, 1.0):
            share = 100 * sum(n > radius for n in norms) / len(norms)
            checks.append(Check(f"{name}: accuracy under the minimal attack, radius {radius}", share, "%"))
    _picture(runs, first)
    return checks


def _split(found: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    return [found[k : k + len(SEEDS)] for k in range(0, len(found), len(SEEDS))]


def _picture(runs: dict[str, list[dict[str, Any]]], first: str) -> None:
    """Accuracy against the radius of the minimal attack."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    radii = [0.02 * k for k in range(100)]
    for name in (first, "ResNet, Adam"):
        norms = [n for r in runs[name] for n in r["attack"]]
        axes.plot(radii, [100 * sum(n > radius for n in norms) / len(norms) for radius in radii], label=name)
    axes.set(xlabel="radius of the attack (L2, pixels in [0, 1])", ylabel="accuracy [%]", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    OUT.mkdir(parents=True, exist_ok=True)
    figure.savefig(OUT / "digits.png", dpi=130)
    pyplot.close(figure)
