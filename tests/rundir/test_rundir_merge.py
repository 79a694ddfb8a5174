from __future__ import annotations

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from calledshot.rundir.merge import merge, standing, starts

incarnations = st.lists(st.tuples(st.integers(1, 30), st.integers(0, 15)), max_size=6)


def rows_of(history: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Rows as a trainer writes them that starts at a step and does so many, once for each incarnation."""
    return [
        {"step": step, "incarnation": number}
        for number, (start, count) in enumerate(history, 1)
        for step in range(start, start + count)
    ]


@given(incarnations)
def test_merged_rows_are_the_history_that_the_last_model_has_gone_through(history: list[tuple[int, int]]) -> None:
    gone_through: dict[int, int] = {}
    for number, (start, count) in enumerate(history, 1):
        if count:  # going back to a checkpoint forgets all that came after it
            gone_through = {step: by for step, by in gone_through.items() if step < start}
            gone_through |= dict.fromkeys(range(start, start + count), number)
    assert {row["step"]: row["incarnation"] for row in merge(rows_of(history))} == gone_through


@given(incarnations, st.randoms(use_true_random=False))
def test_the_order_of_the_file_does_not_matter_and_merging_twice_changes_nothing(
    history: list[tuple[int, int]], shuffler: random.Random
) -> None:
    rows = rows_of(history)
    merged = merge(rows)
    shuffler.shuffle(rows)
    assert merge(rows) == merged == merge(merged)
    assert [row["step"] for row in merged] == sorted({row["step"] for row in merged})


def test_rows_of_other_trainers() -> None:
    rows: list[dict[str, Any]] = [{"step": 2, "loss": 1.0}, {"step": 1}, {"loss": 3.0}, {"step": "x"}, {"step": 2}]
    assert merge(rows) == [{"step": 1}, {"step": 2}]


def test_several_rows_a_step_stand_together_until_gone_back_behind() -> None:
    rows = [{"step": s, "incarnation": 1, "source": n} for s in (5, 10, 15) for n in "ab"]
    assert [row["step"] for row in standing(rows, {1: 1, 2: 11})] == [5, 5, 10, 10]
    assert starts(rows) == {1: 5}
