"""Pictures of a result folder: glass brain, slices, convergence, estimates, growth, a page that turns.

    made = make(Path("results/demo"))          # every picture that the result allows
    made.paths, made.notes                     # what was written; why something was not

Only the result folder is read (result.json and maps/*.nii.gz). matplotlib draws the flat figures, pyvista the
three-dimensional ones, off screen.
"""

from tumour.pictures.making import KINDS, Pictures, make

__all__ = ["KINDS", "Pictures", "make"]
