"""Benchmarks: each module here has a first docstring line and `run(full: bool) -> list[Check]`
(`run(full, device)` where a benchmark can run on CUDA).

`scripts/benchmark.py NAME` runs it, prints the checks and writes results/benchmarks/NAME.json.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One row: what was measured, its value, and the bar it must meet (None: for information)."""

    what: str
    value: float | int | str
    unit: str = ""
    bar: str | None = None
    holds: bool | None = None

    @staticmethod
    def at_most(what: str, value: float, bar: float, unit: str = "") -> Check:
        """Holds for value <= bar (not for NaN)."""
        return Check(what, value, unit, f"<= {bar:g}", bool(value <= bar))

    @staticmethod
    def at_least(what: str, value: float, bar: float, unit: str = "") -> Check:
        """Holds for value >= bar."""
        return Check(what, value, unit, f">= {bar:g}", bool(value >= bar))

    @staticmethod
    def near(what: str, value: float, target: float, tolerance: float, unit: str = "") -> Check:
        """Holds for |value - target| <= tolerance."""
        return Check(
            what, value, unit, f"{target:g} +- {tolerance:g}", bool(abs(value - target) <= tolerance)
        )

    @staticmethod
    def within(what: str, value: float, low: float, high: float, unit: str = "") -> Check:
        """Holds for low <= value <= high."""
        return Check(what, value, unit, f"{low:g} to {high:g}", bool(low <= value <= high))
