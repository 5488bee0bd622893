"""Tomography of 60 angles, 2 % noise, 96 x 96 pixels: classical and learned regularizers, tuned alike.

Test pictures: eight photographs that nothing was trained or tuned on (inverse.datasets.images.TEST), and four
drawn sections of a body. Each method's one or two parameters are tuned on three other photographs, or on two
other sections, by one search for all (`_image_contest`). Intervals are 95 % bootstrap ones; those of gains
over TV are paired by picture.

Bars: on photographs, of which CRR and WCRR were trained on others, the better of them gains over TV, its
interval above 0; all methods of the issue are there; and for CRR, which is convex, solutions converge as the
noise falls (`_image_limits`). Sections, constant in parts, are TV's own: shown without a bar. `--full` adds
30 angles.
"""

from __future__ import annotations

from scripts.benchmarks import Check
from scripts.benchmarks._image_contest import judged


def run(full: bool) -> list[Check]:
    """The table and its bars."""
    return judged(("tomography", "sparse_tomography") if full else ("tomography",), noise=2.0, full=full)
