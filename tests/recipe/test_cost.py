"""Costs against published models and against sums done by hand."""

import re
from dataclasses import replace

import pytest

from calledshot.recipe import UsageError, cost, load_recipe, presets, shape
from calledshot.recipe.load import size_in_name
from calledshot.recipe.schema import Duration, Model, Optimizer, Parallel, Recipe

LLAMA_3_8B = Model(
    layers=32,
    width=4096,
    heads=32,
    kv_heads=8,
    hidden=14336,
    vocabulary=128_256,
    context=8192,
    tied_embeddings=False,
    qk_norm=False,
)
QWEN3_600M = Model(
    layers=28,
    width=1024,
    heads=16,
    kv_heads=8,
    head_width=128,
    hidden=3072,
    vocabulary=151_936,
    context=4096,
    tied_embeddings=True,
    qk_norm=True,
)
TINY = Model(
    layers=2, width=8, heads=2, kv_heads=1, hidden=12, vocabulary=10, context=4, tied_embeddings=False, qk_norm=True
)


def recipe(model: Model, **sections: object) -> Recipe:
    return replace(Recipe(model=model, duration=Duration(tokens=81_920)), **sections)


@pytest.mark.parametrize(
    ("model", "total", "non_embedding"),
    [
        (LLAMA_3_8B, 8_030_261_248, 8_030_261_248 - 2 * 128_256 * 4096),
        (QWEN3_600M, 596_049_920, 596_049_920 - 151_936 * 1024),
    ],
)
def test_parameters_of_published_models(model, total, non_embedding):
    """Sums of the tensors in the published checkpoints: Meta-Llama-3-8B and Qwen3-0.6B."""
    counts = cost(recipe(model)).parameters
    assert (counts.total, counts.non_embedding, counts.active) == (total, non_embedding, total)


def test_a_small_model_by_hand():
    """D 8, H 2, K 1, C 4, F 12, V 10, T 4, two layers."""
    layer = 8 * (2 + 2) * 4 + 2 * 4 * 8 + 8 * 24 + 12 * 8  # 128 + 64 + 192 + 96
    gains = 2 * (8 + 8 + 4 + 4) + 8
    found = cost(recipe(TINY))
    assert found.parameters.matrices == 2 * layer == 960
    assert found.parameters.vectors == gains == 56
    assert found.parameters.total == 960 + 56 + 80 + 80
    assert found.parameters.non_embedding == 1016
    # Scores and values: 2 matmuls x 2 FLOPs x 8 channels x 2 layers = 64 a key; positions see 1, 2, 3, 4 keys.
    attention = 64 * (1 + 2 + 3 + 4) // 4
    forward = 2 * (960 + 80) + attention
    flops = found.flops_per_token
    assert (flops.forward, flops.backward, flops.total) == (forward, 2 * forward, 3 * forward)
    assert (flops.attention, flops.attention_full) == (3 * attention, 3 * 64 * 4)


def test_tying_shares_one_matrix_and_saves_no_flops():
    tied, untied = cost(recipe(replace(TINY, tied_embeddings=True))), cost(recipe(TINY))
    assert untied.parameters.total - tied.parameters.total == 80
    assert tied.parameters.non_embedding == untied.parameters.non_embedding
    assert tied.flops_per_token == untied.flops_per_token


def test_six_n_is_the_limit_of_a_short_context():
    """Kaplan et al. count 6 N a token without attention; at a context of 1 nearly nothing else remains."""
    found = cost(recipe(replace(LLAMA_3_8B, context=1), batch=replace(Recipe().batch, tokens=1)))
    matrices = found.parameters.matrices + found.parameters.head
    assert found.flops_per_token.total == pytest.approx(6 * matrices, rel=1e-3)


def test_bytes_by_hand():
    total, matrices = 1176, 960
    sizes = cost(recipe(TINY, parallel=Parallel(dtype="bfloat16"))).bytes
    assert (sizes.weights, sizes.master, sizes.gradients) == (2 * total, 4 * total, 6 * total)
    assert sizes.optimizer == 4 * matrices + 8 * (total - matrices)
    assert sizes.kv_cache_per_token == 2 * 2 * 1 * 4 * 2
    assert sizes.checkpoint == sizes.master + sizes.optimizer
    adamw = cost(recipe(TINY, optimizer=Optimizer(name="adamw"), parallel=Parallel(dtype="float32"))).bytes
    assert (adamw.weights, adamw.optimizer, adamw.kv_cache_per_token) == (0, 8 * total, 32 * 2)


def test_the_llama_cache_is_128_kib_a_token():
    """2 x 32 layers x 8 heads x 128 x 2 bytes, as the model's users quote it."""
    assert cost(recipe(LLAMA_3_8B)).bytes.kv_cache_per_token == 128 * 1024


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        (Duration(tokens=81_920), 10),
        (Duration(tokens=81_921), 11),
        (Duration(flops=10.5 * 8192 * 6720), 10),
        (Duration(flops=1.0), 1),
        (Duration(minutes=2), None),
    ],
)
def test_steps_and_tokens(duration, steps):
    found = cost(recipe(TINY, duration=duration))
    assert found.flops_per_token.total == 6720
    assert found.steps == steps
    assert found.tokens == (steps and steps * 8192)


def test_minutes_become_tokens_at_a_speed():
    found = cost(recipe(TINY, duration=Duration(minutes=2)), tokens_per_second=1000)
    assert (found.steps, found.tokens) == (120_000 // 8192, 120_000 // 8192 * 8192)
    assert cost(recipe(TINY, duration=Duration(minutes=90))).hours(0.4, 1e12) == 1.5


def test_hours_and_money():
    """Meta's model card gives 1.3 M H100 hours for 8B and 15 T tokens; at 40 % of the peak the arithmetic alone takes
    less, but not by an order of magnitude."""
    found = cost(recipe(LLAMA_3_8B, duration=Duration(tokens=15 * 10**12)))
    hours = found.hours(0.4, 989e12, gpus=1)
    assert hours == pytest.approx(found.flops / (0.4 * 989e12 * 3600))
    assert 0.4e6 < hours < 1.3e6
    assert found.hours(0.4, 989e12, gpus=100) == pytest.approx(hours / 100)
    assert found.money(2.0, 0.4, 989e12, gpus=100) == pytest.approx(2 * hours)


def test_an_open_vocabulary_has_no_cost_yet():
    with pytest.raises(UsageError, match=r"model\.vocabulary=SIZE"):
        cost(recipe(replace(TINY, vocabulary=0)))


def test_an_encoder_decoder_costs_what_a_decoder_of_half_its_parameters_costs():
    """Raffel et al. 2020, table 2: 2 P parameters at the cost of P. Here 20B with T5's positions beside 10B."""
    both, one = (cost(load_recipe(name)) for name in ("ul2-20B", "10B"))
    assert both.parameters.non_embedding / one.parameters.non_embedding == pytest.approx(2, rel=0.001)
    projections = [each.flops_per_token.total - each.flops_per_token.attention for each in (both, one)]
    assert projections[0] / projections[1] == pytest.approx(1, rel=0.05)


def test_shape_resolves_zeros():
    found = shape(Model(width=256, heads=4))
    assert (found.head_width, found.hidden) == (64, 704)
    assert shape(found) == found
    assert shape(Model(width=4096, heads=32, hidden=11_008)).hidden == 11_008


@pytest.mark.parametrize("preset", [preset for preset in presets() if preset.name != "demo"], ids=lambda one: one.name)
def test_presets_are_of_the_size_they_are_called_and_cost_what_their_header_says(preset):
    found = cost(load_recipe(preset.name))
    label = size_in_name(preset.name)
    assert found.parameters.total == pytest.approx(label, rel=0.05)
    crossed = found.parameters.total / len(found.shape.stacks)
    assert found.tokens / crossed > 19.5  # Hoffmann et al. 2022: about 20
    header = preset.path.read_text()
    stated = re.search(r"Hours: ([\d.]+) on (one|\d+) H100 SXM at (\d+) % MFU", header)
    gpus = 1 if stated[2] == "one" else int(stated[2])
    assert found.hours(int(stated[3]) / 100, 989e12, gpus) == pytest.approx(float(stated[1]), rel=0.07)
    assert f"shot train {preset.name}" in header and "not yet measured" in header
