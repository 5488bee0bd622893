"""Gaussian blur of 1.6 pixels, 1 % noise, 96 x 96 pixels: classical and learned regularizers, tuned alike.

The picture stands on black. Pictures, tuning, intervals and bars are those of `tomography`. `--full` adds a
motion blur, along a diagonal of 7 pixels.
"""

from __future__ import annotations

from scripts.benchmarks import Check
from scripts.benchmarks._image_contest import judged


def run(full: bool) -> list[Check]:
    """The table and its bars."""
    return judged(("deconvolution", "motion") if full else ("deconvolution",), noise=1.0, full=full)
