from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calledshot.data.mixture import SCALE, Split, mixture, split

WEIGHTS = st.lists(st.floats(0.001, 1000), min_size=1, max_size=6)


def nodes(tree: Split):
    if tree.left is not None and tree.right is not None:
        yield tree
        yield from nodes(tree.left)
        yield from nodes(tree.right)


def leaves(tree: Split) -> set[int]:
    return {tree.source} if tree.left is None or tree.right is None else leaves(tree.left) | leaves(tree.right)


@given(WEIGHTS)
@settings(max_examples=40)
def test_at_every_node_every_prefix_is_within_one_of_its_share(weights):
    tree = split(weights)
    drawn = [tree.locate(slot)[0] for slot in range(400)]
    for node in nodes(tree):
        mine = [source for source in drawn if source in leaves(node)]
        left, count = leaves(node.left), 0
        for n, source in enumerate(mine, 1):
            count += source in left
            assert abs(count - Fraction(node.share, SCALE) * n) < 1


@given(WEIGHTS)
@settings(max_examples=40)
def test_indices_within_a_source_count_up_and_agree_with_count(weights):
    tree = split(weights)
    seen = [0] * len(weights)
    for slot in range(300):
        source, index = tree.locate(slot)
        assert index == seen[source] == tree.count(source, slot)
        seen[source] += 1


def test_shares_are_those_of_the_weights():
    tree = split([5, 3, 2, 0])
    assert [tree.count(source, 100_000) for source in range(4)] == [
        pytest.approx(n, abs=3) for n in (50_000, 30_000, 20_000, 0)
    ]


def test_slots_beyond_64_bits_are_exact():
    tree = split([1, 2])
    source, index = tree.locate(10**18)
    assert tree.count(source, 10**18) == index


@given(WEIGHTS, st.data())
@settings(max_examples=60)
def test_used_up_sources_hand_their_share_on_and_nothing_is_drawn_twice(weights, data):
    capacities = data.draw(
        st.lists(st.one_of(st.none(), st.integers(0, 60)), min_size=len(weights), max_size=len(weights))
    )
    laid = mixture([(0, weights)], capacities)
    length = 400 if laid.end is None else laid.end
    drawn = [laid.locate(slot) for slot in range(length)]
    assert len(set(drawn)) == length
    counts = [sum(source == wanted for source, _ in drawn) for wanted in range(len(weights))]
    assert counts == laid.counts(length)
    for source, (capacity, count) in enumerate(zip(capacities, counts, strict=True)):
        assert {index for drawn_source, index in drawn if drawn_source == source} == set(range(count))
        assert capacity is None or count <= capacity
    if laid.end is not None:
        assert counts == capacities


def test_phases_change_the_weights_and_go_on_where_the_sources_are():
    laid = mixture([(0, [1, 1]), (100, [0, 1]), (150, [3, 1])], [None, None])
    drawn = [laid.locate(slot) for slot in range(350)]
    assert sum(source == 0 for source, _ in drawn[:100]) == 50
    assert all(source == 1 for source, _ in drawn[100:150])
    assert sum(source == 0 for source, _ in drawn[150:350]) == 150
    assert drawn[100] == (1, 50) and laid.counts(350) == [200, 150]
