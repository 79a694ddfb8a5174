"""The sizes of a run's batches, counted one after another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calledshot.recipe import Batching, batching, cost, layout, load_recipe
from calledshot.recipe.batching import Stage
from calledshot.recipe.errors import UsageError

RAMP = [
    "model.context=256", "batch.tokens=4096", "duration.tokens=1M",
    "batch.ramp.0.tokens=1024", "batch.ramp.0.until=0.1", "batch.ramp.1.tokens=2048", "batch.ramp.1.until=0.3",
]  # fmt: skip


def test_stages_are_shares_of_the_tokens():
    recipe = load_recipe("demo", RAMP)
    found = batching(recipe)
    sizes = [found.rows(number) for number in range(cost(recipe).steps)]
    assert sorted(sizes) == sizes and set(sizes) == {4, 8, 16}
    tokens = {rows: 256 * rows * sizes.count(rows) for rows in (4, 8, 16)}
    ends = tokens[4], tokens[4] + tokens[8]  # each within half a batch
    assert ends[0] == pytest.approx(100_000, abs=512) and ends[1] == pytest.approx(300_000, abs=1024)
    # The run ends with the batch that reaches its tokens, as without a ramp.
    assert 1_000_000 <= cost(recipe).tokens == 256 * sum(sizes) < 1_000_000 + 4096
    assert cost(recipe).steps > cost(load_recipe("demo", RAMP[:3])).steps


def test_without_a_ramp_all_are_alike():
    recipe = load_recipe("demo", RAMP[:3])
    found = batching(recipe)
    assert found.stages == (Stage(0, 0, 16),)
    assert cost(recipe).steps == -(-1_000_000 // 4096) and cost(recipe).tokens == cost(recipe).steps * 4096


stages = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4)


@given(stages, st.integers(0, 300), st.integers(1, 7))
def test_counting_agrees_with_adding_up(made, rows, positions):
    parts, first, before = [], 0, 0
    for batches, size in made:
        parts.append(Stage(first, before, size))
        first, before = first + batches, before + batches * size
    found = Batching(positions, tuple(parts))
    sizes = [found.rows(number) for number in range(400)]
    assert sizes[:first] == [size for batches, size in made for _ in range(batches)][:first]
    assert all(size == made[-1][1] for size in sizes[first:])
    assert [found.before(number) for number in range(400)] == [sum(sizes[:number]) for number in range(400)]
    assert found.filled(rows) == next(number for number in range(400) if sum(sizes[: number + 1]) > rows)
    needed = found.needed(rows * positions)
    assert found.tokens(needed) >= rows * positions and (not needed or found.tokens(needed - 1) < rows * positions)


def test_every_rank_has_a_row_of_the_smallest_batch():
    assert layout(load_recipe("demo", RAMP), 4).data == 4
    with pytest.raises(UsageError, match=r"batch.ramp.0.tokens = 1024 is 4 sequences, too few for 8 ranks"):
        layout(load_recipe("demo", RAMP), 8)
