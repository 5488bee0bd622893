#!/usr/bin/env python3
"""Train the regularizer of a tumour's source (data/regularizers/source.safetensors); see `--help`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.launching import missing_packages

with missing_packages("train_source_prior.py"):
    import torch
    import typer

    from inverse.regularizers.learned import files
    from tumour import source_training


def main(
    out: Path = typer.Option(Path("results/source.safetensors"), help="The file of weights to write."),
) -> None:
    """Train on the TRAIN cases of tumour/priors.py on 6 mm, bilevel, and write the weights with their card.

    Cases are prepared first (a few seconds each); then come 14 epochs of linear problems and 8 of the
    growth: some six minutes on one core.
    """
    torch.set_num_threads(1)
    energy, figures = source_training.trained(say=lambda text: print(text, flush=True))
    card = files.Card(
        name="source",
        data="18 sources of 1 to 3 balls, ellipsoids, bumps (5-14 mm) in MNI152 at 6 mm, 5 % noise, 120 days",
        command="scripts/env python scripts/train_source_prior.py --out data/regularizers/source.safetensors",
        seed=source_training.SEED,
        noise=(0.05, 0.05),
        figures=figures,
    )
    files.save(out, energy, card)
    print(out)


if __name__ == "__main__":
    with missing_packages("train_source_prior.py"):
        typer.run(main)
