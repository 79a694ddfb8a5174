"""How ranks are laid out: sizes that multiply to the world, and one line for what cannot be."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from calledshot.recipe import Layout, UsageError, layout, load_recipe, problems

SPARSE = ["model.experts=6", "model.expert_hidden=128", "batch.tokens=4M"]


def found(ranks: int, *overrides: str, preset: str = "demo", memory: int | None = None) -> Layout:
    return layout(load_recipe(preset, ["batch.tokens=262_144", *overrides]), ranks, memory)


def refusal(ranks: int, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        found(ranks, *overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_left_open_is_filled():
    assert found(1) == Layout() and Layout().world == 1
    assert found(8) == Layout(replicate=8)
    assert found(8, "parallel.shard=4") == Layout(replicate=2, shard=4)
    assert found(8, "parallel.replicate=2") == Layout(replicate=2, shard=4)
    assert found(12, "parallel.tensor=2", "parallel.context=2", "parallel.shard=3") == Layout(1, 3, 2, 2)
    assert found(4, "parallel.expert=2", *SPARSE) == Layout(replicate=4, expert=2)
    assert found(3, "parallel.shard=3").data == 3


@settings(max_examples=100, deadline=None)
@given(
    ranks=st.integers(1, 48),
    replicate=st.integers(0, 4),
    shard=st.integers(0, 4),
    tensor=st.integers(1, 2),
    context=st.integers(1, 3),
    expert=st.integers(1, 3),
)
def test_every_layout_uses_every_rank_once(ranks, replicate, shard, tensor, context, expert):
    asked = {"replicate": replicate, "shard": shard, "tensor": tensor, "context": context, "expert": expert}
    keys = [f"parallel.{key}={value}" for key, value in asked.items()]
    possible = [
        (copies, sharing)
        for copies, sharing in product(range(1, ranks + 1), repeat=2)
        if copies * sharing * context * tensor == ranks and replicate in (0, copies) and shard in (0, sharing)
    ]
    try:
        one = found(ranks, "model.context=768", "batch.tokens=7_680_000", *SPARSE[:2], *keys)
    except UsageError:
        both = tensor > 1 and expert > 1
        assert not possible or possible[0][0] * possible[0][1] * context % expert or both
    else:
        assert (one.replicate, one.shard) in possible and one.world == ranks
        assert (one.context, one.tensor, one.expert) == (context, tensor, expert)
        assert one.replicate * one.shard * one.context % expert == 0


def test_copies_are_shared_by_as_few_ranks_as_the_memory_needs():
    """7B of parameters with 18 bytes each (float32 weights, gradients, two moments; bfloat16 copies of the first two)
    are more than one device of 80 GiB has, and a share of them is not."""
    assert found(8, preset="1B", memory=80 * 2**30).shard == 1
    seven = found(64, "batch.tokens=4_194_304", preset="7B", memory=80 * 2**30)
    assert seven.shard in (2, 4) and seven.world == 64
    assert found(64, "batch.tokens=4_194_304", preset="7B", memory=24 * 2**30).shard > seven.shard
    assert found(64, "batch.tokens=4_194_304", preset="7B", memory=2**20).shard == 64
    assert found(64, "batch.tokens=4_194_304", "parallel.shard=1", preset="7B", memory=2**30).shard == 1


@pytest.mark.parametrize(
    ("ranks", "overrides", "said"),
    [
        (
            3,
            ["parallel.tensor=2"],
            "3 ranks are not a multiple of parallel.tensor = 2 times",
        ),
        (1, ["parallel.context=2"], "start 2"),
        (6, ["parallel.shard=4"], "parallel.shard = 4 does not divide the 6 ranks: take 1, 2, 3 or 6"),
        (8, ["parallel.replicate=2", "parallel.shard=2"], "set parallel.replicate=0"),
        (
            12,
            ["parallel.tensor=2", "parallel.shard=4"],
            "the 6 ranks that tensor and context leave of 12",
        ),
        (3, ["parallel.expert=2", *SPARSE], "parallel.expert = 2 does not divide the 3 ranks"),
        (4, ["batch.tokens=512"], "batch.tokens = 512 is 2 sequences, too few for 4 ranks"),
    ],
)
def test_ranks_that_do_not_come_out_even(ranks, overrides, said):
    assert said in refusal(ranks, *overrides)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel.tensor=3"], "does not divide the model's kv_heads = 2: take 1 or 2"),
        (["parallel.tensor=2", "model.hidden=129"], "hidden = 129: take 1"),
        (["parallel.tensor=2", "model.experts=8", "model.expert_hidden=33"], "expert_hidden = 33"),
        (["parallel.tensor=2", "model.experts=8", "model.shared_expert_hidden=33"], "shared_expert_hidden = 33"),
        (["parallel.tensor=2", "model.topology=encoder-decoder", "objective.kind=span", "model.encoder_hidden=65"],
         "encoder's hidden = 65"),
        (["parallel.tensor=2", "parallel.expert=2", "model.experts=8"], "would both cut the experts"),
        (["parallel.expert=2"], "shares experts, and there are none"),
        (["parallel.expert=3", "model.experts=8"], "does not divide model.experts = 8: take 1, 2, 4 or 8"),
        (["parallel.context=3"], "does not divide model.context = 256: take 2"),
        (["parallel.context=2", "model.topology=encoder-decoder", "objective.kind=span"], "a decoder alone"),
        (["parallel.float8=true", "parallel.dtype=float32"], "parallel.float8 is for matmuls in bfloat16"),
        (["parallel.tensor=0"], "parallel.tensor = 0 must be more than 0"),
        (["parallel.shard=-1"], "parallel.shard = -1 must not be negative"),
        (["parallel.activation_checkpointing=all"], "choose none or selective or full"),
        (["checkpoint.keep_best=-1"], "must not be negative"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_be_cut_into_is_refused_with_the_recipe(overrides, said):
    recipe = load_recipe("demo", ["batch.tokens=12_288", *overrides], checked=False)
    listed = list(problems(recipe))
    assert len(listed) == 1 and said in listed[0] and "\n" not in listed[0]


def test_experts_everywhere_leave_the_dense_width_free():
    keys = ["parallel.tensor=2", "model.hidden=129", "model.experts=4", "model.expert_hidden=64"]
    assert not list(problems(load_recipe("demo", keys, checked=False)))
    assert list(problems(load_recipe("demo", [*keys, "model.dense_layers=1"], checked=False)))
