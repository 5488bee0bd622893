"""What a row of the equations' table holds, and when it misses."""

from __future__ import annotations

import math

from scripts.benchmarks.equation_rows import Row


def test_the_worst_seed_of_the_worst_parameter_counts() -> None:
    row = Row("heat", "closed form", 0.1, 1.0, parameters={"D": (2.0, [2.02, 1.9]), "k": (0.5, [0.5, 0.52])})
    assert math.isclose(row.worst, 0.05)
    assert row.estimates == "D 2: 2.02, 1.9; k 0.5: 0.5, 0.52"
    assert math.isnan(Row("no inverse", "closed form", 0.1, 1.0).worst)


def test_a_nan_or_a_lost_order_misses() -> None:
    def holds(row: Row) -> list[bool | None]:
        return [check.holds for check in row.checks() if check.bar]

    assert holds(Row("fine", "x", 0.5, 1.0, order=1.85, expected=2.0)) == [True, True]
    assert holds(Row("too large", "x", 1.5, 1.0)) == [False]
    assert holds(Row("not a number", "x", math.nan, 1.0)) == [False]
    assert holds(Row("order lost", "x", 0.5, 1.0, order=1.7, expected=2.0)) == [True, False]
