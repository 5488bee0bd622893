"""Whether Markov chains can be trusted: ArviZ's R-hat and effective sample sizes (Vehtari, Gelman, Simpson,
Carpenter, Buerkner 2021).

rhat compares chains with each other and each with itself, by ranks: 1 where they agree, above 1.01 run them
longer. The effective sample size is the number of independent draws that would know a mean (bulk) or the 5
and 95 % quantiles (tail) as well: at 1,000 a mean is known to 0.03 posterior standard deviations, a
standard deviation to about 2.5 %.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from solvers.errors import GliodeError

CONVERGED = 1.01  # Vehtari et al. 2021, section 4


@dataclass(frozen=True)
class Diagnostics:
    """rhat, bulk, tail: of the shape of one draw; NaN where a quantity never changed."""

    rhat: Tensor
    bulk: Tensor
    tail: Tensor

    @property
    def converged(self) -> bool:
        """Whether all R-hat are at most 1.01 (not where one is NaN)."""
        return bool((self.rhat <= CONVERGED).all())

    def __str__(self) -> str:
        return (
            f"R-hat <= {float(self.rhat.max()):.3f}, effective sample size >= "
            f"{float(self.bulk.min()):.0f} (bulk), {float(self.tail.min()):.0f} (tail)"
        )


def diagnose(samples: Tensor) -> Diagnostics:
    """Diagnostics of samples (chains, draws, ...), each entry of a draw by itself.

    Raises GliodeError for fewer than two chains or four draws, or where arviz-stats is not installed.
    """
    if samples.ndim < 2 or samples.shape[0] < 2 or samples.shape[1] < 4:
        raise GliodeError(
            f"diagnose: samples of shape {tuple(samples.shape)}; needs (chains >= 2, draws >= 4, ...)"
        )
    try:
        from arviz_stats.base import array_stats
    except ImportError as error:
        raise GliodeError(
            "diagnose: arviz-stats is not in this Python; pip install arviz-stats, or use scripts/env"
        ) from error
    array = samples.detach().cpu().double().numpy().reshape(*samples.shape[:2], -1)
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (
            array_stats.rhat(array, chain_axis=0, draw_axis=1),
            array_stats.ess(array, chain_axis=0, draw_axis=1, method="bulk"),
            array_stats.ess(array, chain_axis=0, draw_axis=1, method="tail", prob=(0.05, 0.95)),
        )
    rhat, bulk, tail = (torch.from_numpy(np.asarray(x, np.float64)).view(samples.shape[2:]) for x in found)
    return Diagnostics(rhat, bulk, tail)
