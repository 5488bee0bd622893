"""How much to regularize: rules that choose alpha, or the stopping index, and say why.

    trials = sweep(solve, start, alphas)      solutions on a grid of alphas, or Path().trials of an iteration
    l_curve(trials), gcv(trials, ...), quasi_optimality(trials, ...), oracle(trials, ...)
    discrepancy(solve, start, delta)          alpha itself, by root finding; no grid

Each returns a Choice. `solve(alpha, start)` is any optimizer's `minimise` of 1/2 ||r(m)||^2 + alpha R(m)
from that start; `SpectralTikhonov` solves small linear problems exactly.
"""

from inverse.choice.discrepancy import discrepancy
from inverse.choice.freedom import degrees_of_freedom
from inverse.choice.rules import first_discrepancy, gcv, l_curve, oracle, quasi_optimality
from inverse.choice.spectral import SpectralTikhonov
from inverse.choice.trials import Choice, ChoiceError, Path, Trial, Trials, sweep

__all__ = [
    "Choice",
    "ChoiceError",
    "Path",
    "SpectralTikhonov",
    "Trial",
    "Trials",
    "degrees_of_freedom",
    "discrepancy",
    "first_discrepancy",
    "gcv",
    "l_curve",
    "oracle",
    "quasi_optimality",
    "sweep",
]
