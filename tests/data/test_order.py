from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calledshot.data.order import permute


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 9, 31, 100, 1024, 1025, 5000])
def test_every_index_comes_exactly_once(size):
    for epoch in range(3):
        assert sorted(permute(i, size, seed=7, source="a", epoch=epoch) for i in range(size)) == list(range(size))


@given(st.integers(3, 2**62), st.data())
def test_it_stays_inside_sizes_too_large_to_list(size, data):
    index = data.draw(st.integers(0, size - 1))
    assert 0 <= permute(index, size, seed=0, source="a", epoch=0) < size


def test_seed_source_and_epoch_each_give_another_order():
    def order(**change):
        key = {"seed": 0, "source": "a", "epoch": 0, **change}
        return tuple(permute(i, 1000, **key) for i in range(1000))

    assert len({order(), order(seed=1), order(source="b"), order(epoch=1)}) == 4


def test_it_looks_like_chance():
    # Fixed points and kept successions of a random permutation are Poisson with mean 1; three epochs of each stay below
    # 15 with probability 1 - 1e-6.
    size = 4096
    fixed = kept = 0
    places = Counter()
    for epoch in range(3):
        order = [permute(i, size, seed=3, source="s", epoch=epoch) for i in range(size)]
        fixed += sum(a == b for a, b in enumerate(order))
        kept += sum(b == a + 1 for a, b in pairwise(order))
        places.update(place * 8 // size for place in order[: size // 8])
    assert fixed < 15 and kept < 15
    # The first eighth of each epoch is spread over all eighths: 192 expected in each, standard deviation about 12.
    assert all(120 < places[eighth] < 270 for eighth in range(8))
