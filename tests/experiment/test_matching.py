"""Arms are matched as the plan says they are, counted on real models, and what is not matched is said."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planted import suite

from calledshot.experiment import resolve, unmatched
from calledshot.experiment.matching import TOLERANCE
from calledshot.model import Decoder
from calledshot.recipe import UsageError, cost
from calledshot.recipe.conversion import pooled_model, upcycled_model

ARMS = {
    "mha": "set.model.kv_heads = 4",
    "mqa": "set.model.kv_heads = 1",
    "tied": "set.model.tied_embeddings = true",
    "deeper": "set.model.layers = 3",
    "relu2": 'set.model.feed_forward = "relu2"',
    "vocabulary": "set.model.vocabulary = 1088",
}


def counted(cell) -> int:
    """Parameters of the model that is really built."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in Decoder(cell.recipe.model).parameters())


def arm(name: str, line: str, more: str = "") -> str:
    return f'name = "{name}"\n{line}\n{more}'


BASE = 'name = "base"'


def test_matched_parameters_are_those_of_real_models():
    found = resolve(suite(BASE, *(arm(*one) for one in ARMS.items()), sizes=(("S", 64), ("M", 128))))
    for (name, size), cell in found.items():
        assert counted(cell) == pytest.approx(counted(found["base", size]), rel=TOLERANCE), name
        assert "parameters" not in unmatched(cell, found["base", size])
    assert str(found["mqa", "M"].adjusted) == "model.hidden 384 → 408"
    assert found["mqa", "M"].changed == ("model.kv_heads",)
    # At the same total, a head that is the embedding leaves its parameters to the blocks, where they cost FLOPs.
    assert unmatched(found["tied", "S"], found["base", "S"])["FLOPs a token"] > 0.2


@pytest.mark.parametrize("match", ["non-embedding", "active", "parameters"])
@settings(max_examples=25, deadline=None)
@given(layers=st.integers(1, 4), heads=st.sampled_from([(4, 4), (4, 1), (8, 2)]), tied=st.booleans())
def test_any_arm_is_matched_or_refused(match, layers, heads, tied):
    lines = f"set.model = {{ layers = {layers}, heads = {heads[0]}, kv_heads = {heads[1]}, "
    lines += f"tied_embeddings = {str(tied).lower()} }}"
    asked = suite(BASE, arm("arm", lines, f'match = "{match}"'), sizes=(("S", 128),))
    try:
        found = resolve(asked)
    except UsageError as error:
        assert "is not matched by" in str(error)
        return
    assert match not in unmatched(found["arm", "S"], found["base", "S"])


def test_memory_is_compared_over_as_many_positions_whatever_a_row_holds():
    """A token crosses one stack of an encoder-decoder: with as many blocks in all it keeps about half as much for the
    backward pass, not twice because its rows are twice as long."""
    both = arm("both", 'set.model = { topology = "encoder-decoder", layers = 1 }', 'match = "none"')
    longer = arm("longer", "set.model.context = 128", 'match = "none"')
    cells = resolve(suite(BASE, both, longer, more='set.objective.kind = "prefix"\n'))
    base, both, longer = (cells[name, "S"] for name in ("base", "both", "longer"))
    kept = {one.arm.name: one.memory - one.cost.bytes.fixed for one in (base, both)}
    assert kept["both"] < kept["base"]
    assert "memory" not in unmatched(longer, base) or abs(unmatched(longer, base)["memory"]) < 0.2


def test_matched_flops_are_those_of_the_whole_run():
    more = 'match = "flops"'
    found = resolve(suite(BASE, *(arm(name, line, more) for name, line in ARMS.items())))
    base = found["base", "S"]
    for name, cell in found.items():
        assert cost(cell.recipe).flops == pytest.approx(base.cost.flops, rel=TOLERANCE), name
    assert found["deeper", "S"].adjusted.key == "duration.tokens"
    assert unmatched(found["deeper", "S"], base)["tokens"] < -0.1


def test_flops_can_be_matched_by_the_model_too():
    deeper = arm("deeper", "set.model.layers = 3", 'match = "flops"\nadjust = ["model.hidden"]')
    found = resolve(suite(BASE, deeper))
    assert found["deeper", "S"].adjusted.key == "model.hidden"
    assert found["deeper", "S"].cost.tokens == found["base", "S"].cost.tokens
    assert "FLOPs" not in unmatched(found["deeper", "S"], found["base", "S"])


def test_seconds_are_matched_by_measured_speeds():
    asked = suite(BASE, arm("slow", "set.model.layers = 4", 'match = "seconds"'))
    assert resolve(asked)["slow", "S"].pending
    found = resolve(asked, {("base", "S"): 30_000.0, ("slow", "S"): 20_000.0})
    tokens = [found[name, "S"].cost.tokens for name in ("base", "slow")]
    assert not found["slow", "S"].pending
    assert tokens[1] / 20_000 == pytest.approx(tokens[0] / 30_000, rel=TOLERANCE)
    guessed = suite(BASE, arm("slow", 'set = { model.layers = 4, parallel.compile = "auto" }', 'match = "seconds"'))
    with pytest.raises(UsageError, match=r"set\.parallel\.compile: say on or off"):
        resolve(guessed)


def test_what_an_arm_changes_is_not_moved():
    with pytest.raises(UsageError) as error:
        resolve(suite(BASE, arm("wide", "set.model.hidden = 1000", 'adjust = ["model.hidden", "model.layers"]')))
    said = str(error.value)
    assert "arm wide, size S: is not matched by parameters within 1%" in said
    assert "model.hidden is what the arm changes" in said and "model.layers = 1: " in said
    kept = resolve(suite(BASE, arm("wide", "set.model.hidden = 1000", 'match = "none"')))
    assert kept["wide", "S"].recipe.model.hidden == 1000


def test_shapes_that_are_more_than_a_size_are_not_moved():
    with pytest.raises(UsageError, match=r"only duration\.tokens and sizes of the model can be moved"):
        resolve(suite(BASE, arm("mha", ARMS["mha"], 'adjust = ["model.context"]')))


def test_a_size_may_be_given_in_flops():
    asked = suite(BASE, arm("deeper", ARMS["deeper"]))
    found = resolve(replace(asked, sizes=(replace(asked.sizes[0], tokens=0, flops=2e11),)))
    assert found["base", "S"].cost.flops == pytest.approx(2e11, rel=0.01)
    assert found["deeper", "S"].cost.tokens == found["base", "S"].cost.tokens


def test_the_command_line_moves_baseline_and_arms_alike():
    asked = suite(BASE, arm("mqa", ARMS["mqa"]))
    found = resolve(replace(asked, overrides=("duration.tokens=50k", "model.width=128")))
    assert {cell.cost.tokens for cell in found.values()} == {50_176}
    assert {cell.recipe.model.width for cell in found.values()} == {128}


HALF = 'name = "half"\nmatch = "none"\nset.model.qk_norm = false\nat.S.duration.tokens = 50_000'


def grown(convert: str, more: str = "") -> str:
    return f'name = "grown"\nstart = "half"\nmatch = "none"\nconvert = [{convert}]\n{more}'


def test_an_arm_that_begins_with_another_is_what_that_one_is_converted_to():
    cells = resolve(
        suite('name = "base"', HALF, grown('"upcycle", "--experts", "4"', "set.model.balance_weight = 0.02"))
    )
    half, made = (cells[arm, "S"].recipe.model for arm in ("half", "grown"))
    assert (made.experts, made.top_k, made.balance_weight) == (4, 2, 0.02)
    assert not made.qk_norm and made == replace(
        upcycled_model(half, experts=4, top_k=2), balance_weight=0.02
    )  # and what the arm it begins with had changed
    longer = resolve(suite('name = "base"', HALF, grown('"extend", "--context=128"')))["grown", "S"].recipe.model
    assert (longer.context, longer.rope_scaling) == (128, "yarn")
    pooled = resolve(suite('name = "base"', HALF, grown('"kv-heads", "1"')))["grown", "S"].recipe.model
    assert pooled == pooled_model(half, 1)


@pytest.mark.parametrize(
    ("convert", "more", "said"),
    [
        ('"foo"', "", "shot convert foo: there are upcycle, kv-heads, extend"),
        ('"upcycle"', "", "shot convert upcycle: needs --experts"),
        ('"upcycle", "--experts"', "", "shot convert upcycle: --experts '' is no number"),
        ('"upcycle", "--expert", "4"', "", "did you mean --experts?"),
        ('"upcycle", "--experts", "4", "--top-k", "9"', "", "--top-k 9"),
        ('"kv-heads"', "", "say how many heads are left"),
        ('"extend", "--context", "32"', "", "extend it to more"),
        ('"upcycle", "--experts", "4"', "set.model.experts = 8", "model.experts is 4 after `shot convert`"),
        ('"upcycle", "--experts", "4"', "set.model.width = 96", "a converted run keeps its shape"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_the_plan(convert, more, said):
    with pytest.raises(UsageError) as error:
        resolve(suite('name = "base"', HALF, grown(convert, more)))
    assert said in str(error.value) and "arm grown, size S" in str(error.value)
