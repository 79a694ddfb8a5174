"""T5's buckets and RoPE's extensions against other implementations and the formulas' own properties."""

import math

import pytest
import torch
from torch import Tensor
from trunks import config, random_model

from calledshot.model.positions import frequencies, relative_bias, relative_bucket, rotary, rotate
from calledshot.recipe import schema

T5_BOTH_WAYS = {
    -130: 15, -128: 15, -64: 14, -20: 10, -9: 8, -8: 8, -7: 7, -1: 1, 0: 0,
    1: 17, 7: 23, 8: 24, 9: 24, 20: 26, 64: 30, 127: 31, 130: 31,
}  # fmt: skip
"""Bucket by key position minus query position, of an encoder (transformers' T5)."""
T5_ORDERED = {
    0: 0, 1: 1, 15: 15, 16: 16, 17: 16, 20: 17, 31: 21, 32: 21, 64: 26,
    100: 30, 112: 30, 113: 31, 127: 31, 128: 31, 140: 31,
}  # fmt: skip
"""Bucket by how far back a key is, of a decoder."""
SCALINGS = {
    "none": {},
    "ntk": {"rope_scaling": "ntk", "rope_factor": 8.0, "rope_original_context": 512, "context": 4096},
    "dynamic": {"rope_scaling": "dynamic", "rope_factor": 8.0, "rope_original_context": 512, "context": 4096},
    "yarn": {"rope_scaling": "yarn", "rope_factor": 8.0, "rope_original_context": 512, "context": 4096},
}


def test_t5_buckets_are_those_of_the_table():
    distances = torch.tensor(list(T5_BOTH_WAYS))
    assert relative_bucket(distances, ordered=False).tolist() == list(T5_BOTH_WAYS.values())
    back = torch.tensor(list(T5_ORDERED))
    assert relative_bucket(-back, ordered=True).tolist() == list(T5_ORDERED.values())
    assert relative_bucket(back, ordered=True).eq(0).all(), "a prefix's later keys share the bucket of distance 0"


@pytest.mark.parametrize("ordered", [True, False])
def test_t5_buckets_are_transformers(ordered):
    attention = pytest.importorskip("transformers.models.t5.modeling_t5").T5Attention
    distances = torch.arange(-3000, 3000)
    expected = attention._relative_position_bucket(distances, not ordered, num_buckets=32, max_distance=128)
    assert torch.equal(relative_bucket(distances, ordered=ordered), expected)


def test_t5_bias_is_the_tables_entry_of_the_distance():
    table_HR = torch.arange(64.0).view(2, 32)
    bias_HTS = relative_bias(table_HR, 3, 7, 9, ordered=False)
    assert bias_HTS.shape == (2, 4, 9)
    for t in range(4):
        for s in range(9):
            bucket = int(relative_bucket(torch.tensor(s - (t + 3)), ordered=False))
            assert bias_HTS[:, t, s].tolist() == table_HR[:, bucket].tolist()


@pytest.mark.parametrize("width", [8, 64, 128])
@pytest.mark.parametrize("base", [10_000.0, 1_000_000.0])
@pytest.mark.parametrize("kind", ["dynamic", "yarn"])
def test_rope_extensions_are_transformers(kind, base, width):
    transformers = pytest.importorskip("transformers")
    rope = pytest.importorskip("transformers.modeling_rope_utils")
    for original, factor, context in ((512, 8.0, 4096), (4096, 4.0, 16384), (4096, 64.0, 262_144), (2048, 1.0, 2048)):
        model = config(
            rope_scaling=kind, rope_base=base, rope_factor=factor, rope_original_context=original, context=context
        )
        theirs = transformers.LlamaConfig(
            hidden_size=4 * width, num_attention_heads=4, head_dim=width, max_position_embeddings=original,
            rope_parameters={
                "rope_type": kind, "rope_theta": base, "factor": factor, "original_max_position_embeddings": original,
            },
        )  # fmt: skip
        expected, expected_factor = rope.ROPE_INIT_FUNCTIONS[kind](theirs, "cpu", seq_len=context)
        found, found_factor = frequencies(model, width)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)
        assert found_factor == pytest.approx(expected_factor)


@pytest.mark.parametrize("width", [8, 64, 128])
def test_ntk_stretches_the_longest_wavelength_by_the_factor_and_keeps_the_shortest(width):
    plain, _ = frequencies(config(), width)
    stretched, _ = frequencies(config(**SCALINGS["ntk"]), width)
    assert stretched[0] == plain[0] == 1.0
    assert float(plain[-1] / stretched[-1]) == pytest.approx(8.0, rel=1e-5)
    ratio = plain / stretched
    assert (ratio.diff() > 0).all()


def test_dynamic_at_the_original_length_is_plain_and_at_f_times_it_is_close_to_ntk():
    at_home, _ = frequencies(config(**{**SCALINGS["dynamic"], "context": 512}), 64)
    torch.testing.assert_close(at_home, frequencies(config(), 64)[0])
    # base' = base * (f^2 - f + 1)^(d / (d - 2)) at f times the length.
    far, _ = frequencies(config(**SCALINGS["dynamic"]), 64)
    base = 10_000 * (64 - 8 + 1) ** (64 / 62)
    assert float(far[-1]) == pytest.approx(base ** (-62 / 64), rel=1e-5)


def test_yarn_keeps_what_turns_often_and_interpolates_what_does_not_turn_once():
    plain, _ = frequencies(config(), 128)
    found, factor = frequencies(config(**SCALINGS["yarn"]), 128)
    turns = 512 * plain / (2 * math.pi)
    often, seldom = turns > 40, turns < 0.8
    assert often.any() and seldom.any()
    torch.testing.assert_close(found[often], plain[often])
    torch.testing.assert_close(found[seldom], plain[seldom] / 8)
    assert factor == pytest.approx(0.1 * math.log(8) + 1)


@pytest.mark.parametrize("scaling", ["dynamic", "yarn", "llama3"])
def test_an_encoder_of_its_own_length_turns_as_a_decoder_of_that_length(scaling):
    """Both were extended by 8, the encoder from twice the length."""
    keys = {"rope_scaling": scaling, "rope_factor": 8.0}
    both = config("encoder-decoder", **keys, context=4096, encoder_context=8192, rope_original_context=512)
    alone = config(**keys, context=8192, rope_original_context=1024)
    decoder = config(**keys, context=4096, rope_original_context=512)
    positions = torch.arange(0, 8192, 61)[None]
    for found, expected in ((rotary(positions, both, 64, encoder=True), alone), (rotary(positions, both, 64), decoder)):
        for ours, theirs in zip(found, rotary(positions, expected, 64), strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("shift", [1, 500, 3000])
def test_scores_depend_on_the_distance_alone(scaling, shift):
    model = config(**SCALINGS[scaling])
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 1, 16, generator=generator), torch.randn(1, 64, 16, generator=generator)
    query, keys = torch.tensor([[63]]), torch.arange(64)[None]

    def scores(offset: int) -> Tensor:
        rotated = rotate(q, *rotary(query + offset, model, 16)), rotate(k, *rotary(keys + offset, model, 16))
        return (rotated[0] * rotated[1]).sum(-1)

    torch.testing.assert_close(scores(shift), scores(0), rtol=1e-4, atol=2e-3)
    assert not torch.allclose(scores(0), (q * k).sum(-1), atol=0.1)


def shuffled(model: schema.Model) -> tuple[Tensor, Tensor]:
    """What a token at the end gives after keys in order, and in another."""
    decoder = random_model(model)
    tokens = torch.tensor([[5, 6, 7, 8, 9], [7, 5, 8, 6, 9]])
    with torch.no_grad():
        hidden = decoder.hidden_states(tokens)[:, -1]
    return hidden[0], hidden[1]


def test_without_positions_one_layer_does_not_see_the_order_and_with_them_it_does():
    torch.testing.assert_close(*shuffled(config(layers=1, positions="none")), rtol=1e-5, atol=1e-5)
    for positions in ("rope", "t5"):
        first, second = shuffled(config(layers=1, positions=positions))
        assert (first - second).abs().max() > 0.05
