"""What a rank holds, by arithmetic, and what is taken for it; `test_memory_measured.py` holds it against real steps."""

import itertools

import pytest

from calledshot.model import attention, loss, routing
from calledshot.recipe import (
    Layout,
    UsageError,
    cost,
    enough_ranks,
    footprint,
    largest_micro_tokens,
    layout,
    load_recipe,
    memory,
    presets,
)
from calledshot.recipe import activations as arithmetic
from calledshot.recipe.activations import Setting, passing
from calledshot.recipe.check import problems
from calledshot.recipe.derived import shape
from calledshot.recipe.memory import NEWTON_SCHULZ_ENTRIES, weights
from calledshot.training import optimizer

GIB = 2**30
SPARSE = ("model.experts=8", "model.shared_expert_hidden=256", "model.dense_layers=1", "model.expert_hidden=256")
BOTH = ("model.topology=encoder-decoder", "objective.kind=span", "model.positions=t5", "model.encoder_pooling=2")
LAYOUTS = (
    Layout(), Layout(replicate=2), Layout(shard=2), Layout(2, 2), Layout(shard=4, tensor=2), Layout(context=2),
    Layout(shard=2, context=2),
)  # fmt: skip


def test_the_arithmetic_knows_the_limits_of_the_code_it_counts():
    assert arithmetic.CHUNK_LOGITS == loss.CHUNK_LOGITS
    assert arithmetic.BLOCKED_CONTEXT == attention.BLOCKED_CONTEXT_LIMIT
    assert arithmetic.MASK_ENTRIES == attention.MASK_ENTRIES
    assert arithmetic.TILE == routing.LARGEST_TILE
    assert optimizer.NEWTON_SCHULZ_BYTES == 2 * NEWTON_SCHULZ_ENTRIES


@pytest.mark.parametrize(
    "overrides", [(), SPARSE, BOTH, ("model.tied_embeddings=true",), (*BOTH, "model.encoder_width=192")]
)
def test_every_parameter_is_counted_once(overrides):
    """Those that the pass uses and those that are held are one another, and the counter's."""
    recipe = load_recipe("demo", ["model.context=256", *overrides, "batch.tokens=4M"], checked=False)
    model, total = shape(recipe.model), cost(recipe).parameters.total
    assert sum(one.all for one in weights(model, Layout())) == total
    used = sum(part.parameters for part in passing(model, 1, Layout(), Setting()))
    twice = model.tied_embeddings + (model.encoder_width == model.width)  # one table read at two places
    assert used == total + twice * model.vocabulary * model.width
    for one in LAYOUTS:
        if not model.encoder or one.context == 1:
            held = sum(each.all for each in weights(model, one))
            used = sum(part.parameters + part.apart for part in passing(model, 1, one, Setting()))
            assert used == held + twice * model.vocabulary * model.width, one


def test_experts_that_ranks_share_are_held_once_by_each_group():
    model = shape(load_recipe("demo", [*SPARSE]).model)
    alone, shared = (weights(model, one) for one in (Layout(replicate=4), Layout(replicate=4, expert=4)))
    apart = sum(each.all for each in shared if each.apart)
    assert apart and sum(each.all for each in alone) - sum(each.all for each in shared) == 3 * apart


def test_bytes_of_the_state():
    """AdamW: 4 + 4 + 4 bytes a parameter in float32, and 2 for the copy in bfloat16 (ZeRO, arXiv 1910.02054, section
    3.1, with which the shares of 64 ranks agree: 7.5B parameters take 1.9 GB of the state and gradients each)."""
    recipe = load_recipe("demo", ["batch.tokens=1_048_576", "optimizer.name=adamw"])
    total = cost(recipe).parameters.total

    def state(one: Layout, dtype_bytes: int = 2) -> float:
        return footprint(recipe, one, 256, Setting("cpu", dtype_bytes)).state / total

    assert state(Layout(), 4) == pytest.approx(12) and state(Layout()) == pytest.approx(14)
    assert state(Layout(replicate=2)) == pytest.approx(2 + 12 / 2)
    assert state(Layout(replicate=2), 4) == pytest.approx(4 + 8 / 2)
    assert state(Layout(shard=64)) == pytest.approx(12 / 64, rel=1e-4)
    assert state(Layout(2, 4)) == pytest.approx(12 / 4)
    muon = load_recipe("demo", ["batch.tokens=1_048_576"])
    matrices = cost(muon).parameters.matrices
    assert footprint(muon, Layout(), 256, Setting("cpu")).optimizer == 8 * total - 4 * matrices


@pytest.mark.parametrize("name", [preset.name for preset in presets()])
def test_more_ranks_and_more_recomputation_hold_less_and_more_tokens_hold_more(name):
    recipe = load_recipe(name, ["batch.tokens=16_777_216", "model.context=512"], checked=False)
    row = shape(recipe.model).row_positions

    def peak(tokens: int, one: Layout = LAYOUTS[0], mode: str = "none") -> int:
        return footprint(recipe, one, tokens, Setting(checkpointing=mode)).peak

    for few, many in itertools.pairwise((1, 2, 4, 8)):
        assert peak(few * row) < peak(many * row)
    modes = [peak(64 * row, mode=mode) for mode in ("full", "selective", "none")]
    assert modes == sorted(modes)
    shards = [peak(row, Layout(shard=number)) for number in (32, 16, 8, 4)]
    assert shards == sorted(shards)


def test_what_is_taken_fits_and_is_what_a_run_would_take():
    for name, ranks, each in (("1B", 8, 80), ("7B", 8, 80), ("7B", 8, 24), ("20B", 64, 80), ("125M", 1, 6)):
        recipe = load_recipe(name)
        found = memory(recipe, ranks, each * GIB)
        assert found.fits and found.needed <= found.usable == int(0.9 * each * GIB)
        taken = load_recipe(name, found.settings)
        assert not list(problems(taken))
        assert layout(taken, ranks, each * GIB) == found.chosen.layout
        assert found.micro_tokens and recipe.batch.tokens % found.micro_tokens == 0
        again = memory(taken, ranks, each * GIB)
        assert (again.chosen.layout, again.needed, again.settings) == (found.chosen.layout, found.needed, ())


def test_weights_are_shared_before_anything_is_computed_again():
    seven = load_recipe("7B")
    roomy, tight = memory(seven, 8, 80 * GIB), memory(seven, 8, 24 * GIB)
    assert roomy.chosen.activation_checkpointing == "none" and roomy.chosen.layout.shard > 1
    assert tight.chosen.activation_checkpointing != "none" and tight.chosen.layout.shard == 8
    assert memory(seven, 8, 192 * GIB).chosen.layout.shard == 1
    kept = memory(load_recipe("7B", ["parallel.activation_checkpointing=full", "parallel.shard=8"]), 8, 80 * GIB)
    assert {one.activation_checkpointing for one in kept.options} == {"full"} and len(kept.options) == 1


def test_micro_batches_are_the_largest_of_use_that_divide_the_batch():
    recipe = load_recipe("demo", ["batch.tokens=12_288"])  # 48 rows of 256
    how = Setting("cpu")
    assert largest_micro_tokens(recipe, Layout(), 80 * GIB, how) == 4096  # and no more: caches
    assert largest_micro_tokens(recipe, Layout(replicate=5), 80 * GIB, how) == 2048  # of 10 rows, 8 divide 48
    assert largest_micro_tokens(recipe, Layout(), 80 * GIB, Setting()) == 12_288
    one_row = footprint(recipe, Layout(), 256, how).peak
    assert largest_micro_tokens(recipe, Layout(), one_row, how) == 256
    assert largest_micro_tokens(recipe, Layout(), one_row - 1, how) is None
    assert memory(load_recipe("demo", ["parallel.micro_tokens=512"])).micro_tokens == 512


def test_what_does_not_fit_says_how_much_and_on_how_many_ranks_it_would():
    recipe = load_recipe("20B")
    found = memory(recipe, 4, 80 * GIB)
    assert not found.fits and found.micro_tokens is None and found.needed > found.usable
    more = enough_ranks(recipe, 4, 80 * GIB)
    assert more and more > 4 and memory(recipe, more, 80 * GIB).fits and not memory(recipe, more // 2, 80 * GIB).fits
    assert enough_ranks(recipe, 4, 2**20) is None
    with pytest.raises(UsageError, match="too few for 100000 ranks"):
        memory(recipe, 100_000, 80 * GIB)
