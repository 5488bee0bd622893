#!/usr/bin/env python3
"""The table and the picture of docs/studies/source.md: one tumour followed back under other conditions.

scripts/env python scripts/draw_source.py [--out docs/pictures/source.png]
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.benchmarks.source import REACH, SEED, Brains, near
from tumour.growth import LAWS
from tumour.imaging import Modality, add_noise, noise_sd
from tumour.model import TumourModel, domain_of
from tumour.patients import Scan, camera
from tumour.pictures import style
from tumour.source import Known, SourceProblem, corner_values
from tumour.source_foci import distances, relative_error
from tumour.source_search import Locator, Settings, Source

ONE = np.array([[-28.0, -14.0, 26.0]])
TWO = np.array([[-28.0, -20.0, 26.0], [-26.0, 24.0, 22.0]])
KNOWN = Known(0.35, 0.06, 0.02, 120.0)


@dataclass(frozen=True)
class Study:
    """One row; kinds: of the images; gap: only every other axial slice of voxels is scanned."""

    name: str
    law: str = "logistic"
    known: Known = KNOWN
    noise: float = 0.05
    kinds: tuple[str, ...] = ("density",)
    gap: bool = False
    foci: bool = False
    settings: Settings = field(default_factory=Settings)


GOMPERTZ = replace(KNOWN, rho=0.006)
STUDIES = (
    Study("as it is: logistic, 120 days, 5 %, density"),
    Study("noise 1 %", noise=0.01),
    Study("noise 2 %", noise=0.02),
    Study("noise 10 %", noise=0.10),
    Study("60 days", known=replace(KNOWN, age=60.0)),
    Study("200 days", known=replace(KNOWN, age=200.0)),
    Study("300 days", known=replace(KNOWN, age=300.0)),
    Study("Malthus (exponential)", law="exponential"),
    Study("Gompertz, rho 0.006/day", law="gompertz", known=GOMPERTZ),
    Study("outlines, enhancing and oedema", kinds=("enhancing", "oedema")),
    Study("oedema's outline alone", kinds=("oedema",)),
    Study("every other slice missing", gap=True),
    Study("two foci, 44 mm apart", foci=True, settings=Settings(level=0.4)),
    Study("H1 gradient of 4 mm", settings=Settings(length=4.0)),
    Study("sparse field", settings=Settings("sparse")),
    Study("one point", settings=Settings("points")),
)


def main() -> None:
    """Print the table; write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/pictures/source.png"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    brains = Brains.read()
    print("| what is changed | centre, mm | error | largest | r / (tau delta) | iterations | solves |")
    print("|---|---|---|---|---|---|---|")
    shown = []
    for study in STUDIES:
        found, problem, truth = located(brains, study)
        away = ", ".join(f"{d:.1f}" for d in distances(found.foci, TWO if study.foci else ONE))
        error = relative_error(problem.domain, found.u, truth)
        reached = found.residual_norm / (study.settings.tau * found.delta)
        print(
            f"| {study.name} | {away} | {error:.2f} | {float(found.u.max()):.2f} | {reached:.2f} |"
            f" {len(found.history) - 1} | {sum(found.counts.values())} |",
            flush=True,
        )
        shown.append((study, corner_values(problem.domain, found.u), corner_values(problem.domain, truth)))
    draw(brains, shown, options.out)


def located(brains: Brains, study: Study) -> tuple[Source, SourceProblem, Tensor]:
    """The search of one row, its problem, and the true source on its mesh."""
    centres, law = TWO if study.foci else ONE, LAWS[study.law]()
    wide = np.any([near(brains.truth, c, REACH + 4) for c in centres], axis=0)
    mask = np.any([near(brains.coarse, c, REACH) for c in centres], axis=0) & brains.coarse.brain
    model = TumourModel(domain_of(brains.truth, wide), law, SEED, 2.0)
    known = study.known
    D_white, D_grey, rho, age = (
        torch.tensor(x, dtype=torch.float64) for x in (known.D_white, known.D_grey, known.rho, known.age)
    )
    modalities = [Modality(kind, study.noise) for kind in study.kinds]  # type: ignore[arg-type]
    with torch.no_grad():
        state = model.evolve(seeds(model, centres), model.diffusivity(D_white, D_grey), rho, age)[0]
        images = camera(model, brains.coarse, mask, 3)(state, modalities)
    covered = mask.copy()
    if study.gap:
        covered[:, :, ::2] = False
    generator, scans = np.random.default_rng(7), []
    for modality, image in zip(modalities, images, strict=True):
        values = np.zeros(mask.shape)
        values[mask] = add_noise(image.numpy(), modality, generator)
        scans.append(Scan(0.0, modality, values, covered, noise_sd(image.numpy(), modality)))
    problem = SourceProblem(known, brains.coarse, scans, law, SEED, finer=brains.finer)
    return Locator(problem, study.settings).run(), problem, seeds(problem.growing.model, centres)


def seeds(model: TumourModel, centres: np.ndarray) -> Tensor:
    """The sum of the model's seeds."""
    with torch.no_grad():
        return torch.stack([model.seed_state(torch.from_numpy(c)) for c in centres]).sum(0)


def draw(brains: Brains, shown: list[tuple[Study, np.ndarray, np.ndarray]], path: Path) -> None:
    """Axial planes through the sources: the truth, then some rows, in one colour scale."""
    chosen = [("truth", shown[0][2])]
    names = {"noise 1 %", "noise 10 %", "60 days", "300 days", "Malthus (exponential)"}
    names |= {"oedema's outline alone", "sparse field", "one point"}
    chosen += [("5 %, 120 days", shown[0][1])] + [(s.name, u) for s, u, _ in shown if s.name in names]
    drawing = style.figure((1500, 640))
    axes = drawing.subplots(2, 5).ravel()
    drawing.subplots_adjust(left=0.02, right=0.98, top=0.9, bottom=0.04, wspace=0.08, hspace=0.2)
    x, y, z = np.rint(brains.coarse.index(ONE[0]) + 0.5).astype(int)
    for panel, (name, values) in zip(axes, chosen, strict=False):
        part = values[x - 9 : x + 10, y - 9 : y + 10, z]
        drawn = panel.imshow(
            part.T, origin="lower", cmap="viridis", vmin=0, vmax=0.5, interpolation="nearest"
        )
        panel.set_title(name, size=9, color=style.INK)
        panel.set(xticks=[], yticks=[])
    drawing.colorbar(drawn, ax=list(axes), fraction=0.02, pad=0.02)
    style.save(drawing, path)


if __name__ == "__main__":
    main()
