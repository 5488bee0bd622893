"""The rows of `benchmark.py equations`: each module here has `rows(full: bool) -> list[Row]`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from scripts.benchmarks import Check

SLACK = 0.2  # an observed order may stay this much below the expected one
WITHIN = 0.05  # of the truth, at 1 % noise


@dataclass(frozen=True)
class Row:
    """One case of one equation.

    error: of the direct problem against `reference`, held to `bar`; order: observed, held to `expected` -
    0.2 (None: no order applies). parameters: {name: (truth, estimates)}, an estimate for each of the seeds of
    1 % noise. note: what a reader must know to judge the row, such as why it misses.
    """

    case: str
    reference: str
    error: float
    bar: float
    order: float | None = None
    expected: float | None = None
    parameters: Mapping[str, tuple[float, Sequence[float]]] = field(default_factory=dict)
    note: str = ""

    @property
    def worst(self) -> float:
        """The largest relative error of a parameter over the seeds."""
        errors = [abs(e / truth - 1.0) for truth, estimates in self.parameters.values() for e in estimates]
        return max(errors, default=math.nan)

    @property
    def estimates(self) -> str:
        """Each parameter: its truth, and what was estimated from the data of each seed."""
        parts = [
            f"{name} {truth:g}: {', '.join(f'{estimate:.4g}' for estimate in found)}"
            for name, (truth, found) in self.parameters.items()
        ]
        return "; ".join(parts)

    def checks(self) -> list[Check]:
        """Its checks; the parameters are held to the bar together, over all rows."""
        found = [Check.at_most(f"{self.case}: error against {self.reference}", self.error, self.bar)]
        if self.order is not None and self.expected is not None:
            found.append(Check.at_least(f"{self.case}: order", self.order, self.expected - SLACK))
        if self.parameters:
            found.append(Check(f"{self.case}: worst parameter", 100 * self.worst, "%"))
            found.append(Check(f"{self.case}: truth and estimates", self.estimates))
        if self.note:
            found.append(Check(f"{self.case}: note", self.note))
        return found
