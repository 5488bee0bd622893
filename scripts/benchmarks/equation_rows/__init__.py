"""The rows of `benchmark.py equations`: each module here has `rows(full: bool) -> list[Row]`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from scripts.benchmarks import Check

SLACK = 0.2  # an observed order may stay this much below the expected one
WITHIN = 0.05  # of the truth, at 1 % noise


@dataclass(frozen=True)
class Row:
    """One case of one equation.

    error: of the direct problem against `reference`, held to `bar`; order: observed, held to `expected` -
    0.2 (None: no order applies). parameters: {name: (truth, estimates)}, an estimate for each of the seeds of
    1 % noise; field_error: the relative error of a whole field found from such data, the worst seed's. note:
    what a reader must know to judge the row, such as why it misses.
    """

    case: str
    reference: str
    error: float
    bar: float
    order: float | None = None
    expected: float | None = None
    parameters: Mapping[str, tuple[float, Sequence[float]]] = field(default_factory=dict)
    note: str = ""
    field_error: float | None = None

    @property
    def worst(self) -> float:
        """The largest error of a parameter over the seeds, or of the field; NaN where nothing is identified.

        Relative to the truth; as it is where the truth is 0.
        """
        values = self.parameters.values()
        errors = [abs(e - truth) / (abs(truth) or 1.0) for truth, estimates in values for e in estimates]
        if self.field_error is not None:
            errors.append(self.field_error)
        return float(np.max(errors)) if errors else math.nan  # of NumPy: a NaN is not lost

    @property
    def identifies(self) -> bool:
        """Whether parameters or a field are found from data."""
        return bool(self.parameters) or self.field_error is not None

    @property
    def misses(self) -> bool:
        """Whether what it identifies is further from the truth than `WITHIN`."""
        return self.identifies and not self.worst <= WITHIN

    @property
    def estimates(self) -> str:
        """Each parameter: its truth, and what was estimated from the data of each seed; the field's error."""
        parts = [
            f"{name} {truth:g}: {', '.join(f'{estimate:.4g}' for estimate in found)}"
            for name, (truth, found) in self.parameters.items()
        ]
        if self.field_error is not None:
            parts.append(f"a field, {100 * self.field_error:.1f} % off in the worst of the seeds")
        return "; ".join(parts)

    def checks(self) -> list[Check]:
        """Its checks; the parameters are held to the bar together, over all rows."""
        found = [Check.at_most(f"{self.case}: error against {self.reference}", self.error, self.bar)]
        if self.order is not None and self.expected is not None:
            found.append(Check.at_least(f"{self.case}: order", self.order, self.expected - SLACK))
        if self.identifies:
            found.append(Check(f"{self.case}: worst parameter", 100 * self.worst, "%"))
            found.append(Check(f"{self.case}: truth and estimates", self.estimates))
        if self.note:
            found.append(Check(f"{self.case}: note", self.note))
        return found
