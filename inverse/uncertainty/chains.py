"""What a run of Markov chains is told, and what it gives back."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from inverse.uncertainty.diagnostics import Diagnostics, diagnose
from solvers.errors import GliodeError


@dataclass(frozen=True)
class Plan:
    """How long to sample: `draws` of each of `chains`, after `burn_in` steps that adapt beta from `step`.

    target: acceptance aimed at (None: 0.3 for pcn, 0.574 for mala).
    """

    chains: int = 4
    draws: int = 1000
    burn_in: int = 500
    seed: int = 0
    step: float = 0.5
    target: float | None = None

    def __post_init__(self) -> None:
        if self.chains < 1 or self.draws < 1 or self.burn_in < 0 or self.seed < 0:
            raise GliodeError(
                f"Plan: chains {self.chains} and draws {self.draws} must be at least 1, "
                f"burn_in {self.burn_in} and seed {self.seed} at least 0"
            )
        if not 0 < self.step <= 1:
            raise GliodeError(f"Plan: step {self.step} is not in (0, 1]")
        if self.target is not None and not 0 < self.target < 1:
            raise GliodeError(f"Plan: target {self.target} is not an acceptance in (0, 1)")


@dataclass(frozen=True)
class Chains:
    """What was drawn.

    samples: (chains, draws, ...), after the burn-in; beta: the step adapted in it; acceptance: (chains,),
    the share of proposals accepted after it; stopped_by: "draws" or "interrupted"; counts: solves of this
    call.
    """

    samples: Tensor
    beta: float
    acceptance: Tensor
    stopped_by: str
    counts: dict[str, int]

    def mean(self) -> Tensor:
        """The posterior mean of each entry."""
        return self.samples.mean((0, 1))

    def sd(self) -> Tensor:
        """The posterior standard deviation of each entry."""
        return self.samples.flatten(0, 1).std(0)

    def interval(self, level: float = 0.9) -> tuple[Tensor, Tensor]:
        """Central credible intervals (low, high) of each entry, at a level in (0, 1)."""
        if not 0 < level < 1:
            raise GliodeError(f"Chains: the level must lie between 0 and 1, got {level}")
        flat = self.samples.flatten(0, 1).numpy()
        low, high = np.quantile(flat, [(1 - level) / 2, (1 + level) / 2], axis=0)
        return torch.from_numpy(np.asarray(low)), torch.from_numpy(np.asarray(high))

    def diagnostics(self) -> Diagnostics:
        """R-hat and effective sample sizes of each entry."""
        return diagnose(self.samples)


@dataclass(frozen=True)
class Progress:
    """What a callback is told: `step` of `steps` are done; beta, and the acceptance after the burn-in."""

    step: int
    steps: int
    acceptance: float
    beta: float
