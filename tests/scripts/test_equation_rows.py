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


def test_a_field_a_nan_and_a_truth_of_zero_count_as_misses() -> None:
    def row(estimates: list[float], truth: float = 2.0, field: float | None = None) -> Row:
        return Row("heat", "x", 0.1, 1.0, parameters={"D": (truth, estimates)}, field_error=field)

    assert not row([2.05]).misses and row([2.2]).misses
    assert row([2.0, math.nan]).misses and row([math.nan, 2.0]).misses
    assert not row([0.04], 0.0).misses and row([-0.06], 0.0).misses
    assert row([2.0], field=0.07).misses and row([2.0], field=0.07).worst == 0.07
    field = Row("heat", "x", 0.1, 1.0, field_error=0.07)
    assert field.misses and not Row("heat", "x", 0.1, 1.0).misses
    assert any("7.0 % off" in str(check.value) for check in field.checks())
