"""Data to learn from: planar sets with known laws, scikit-learn's digits, MNIST files, grey pictures.

Every loader of labelled data gives inputs (n, d) in floating point and labels (n,) as int64.
"""

from inverse.datasets.digits import Digits, digits
from inverse.datasets.idx import mnist, read_idx
from inverse.datasets.images import patches, photograph
from inverse.datasets.planar import PLANAR, Law, bayes_accuracy, densities, planar

__all__ = [
    "PLANAR",
    "Digits",
    "Law",
    "bayes_accuracy",
    "densities",
    "digits",
    "mnist",
    "patches",
    "photograph",
    "planar",
    "read_idx",
]
