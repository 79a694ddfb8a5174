"""What a model gives token by token through its cache is what it gives in one pass without."""

import pytest
import torch
from torch import Tensor
from trunks import TOPOLOGIES, config, random_model

from calledshot.model import Decoder, EncoderInputs
from calledshot.model import decoder as decoder_module

PROMPTS, NEW = (9, 5, 1), 6
INPUTS = (14, 3, 8)
"""Tokens of three rows' prompts and encoder inputs: the shorter ones are padded."""
VARIANTS = {
    **{name: (name, {}) for name in TOPOLOGIES},
    **{
        f"{name}, {positions}": (name, {"positions": positions})
        for name in TOPOLOGIES
        for positions in ("t5", "none")
    },
    **{
        f"{name}, {key} {value}": (name, {key: value})
        for name in ("prefix", "encoder-decoder")
        for key, value in (
            ("norm_placement", "post"), ("norm_placement", "sandwich"), ("norm", "layernorm"),
            ("feed_forward", "geglu"), ("feed_forward", "gelu"), ("feed_forward", "relu2"),
            ("qk_norm", False), ("tied_embeddings", True), ("kv_heads", 1), ("kv_heads", 4),
        )
    },
    "decoder, experts": ("decoder", {"experts": 8, "dense_layers": 1}),
    "encoder-decoder, experts": (
        "encoder-decoder", {"experts": 4, "router": "sigmoid", "shared_expert_hidden": 32, "balance": "bias"}
    ),
    "yarn": ("decoder", {"rope_scaling": "yarn", "rope_factor": 8.0, "rope_original_context": 16}),
}  # fmt: skip


def tokens_of(lengths: tuple[int, ...], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 96, (length,), generator=generator) for length in lengths]


def padded(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=7)


def alone(decoder: Decoder, ids_T: Tensor, prompt: int, inputs_S: Tensor | None) -> Tensor:
    """Logits (T, V) of one row in one pass, without padding and without a cache."""
    regions_1T = None
    if decoder.config.topology == "prefix":
        regions_1T = (torch.arange(len(ids_T)) < prompt).to(torch.int8)[None]
    encoder = None if inputs_S is None else EncoderInputs(inputs_S[None])
    return decoder.logits(decoder.hidden_states(ids_T[None], regions_BT=regions_1T, encoder_inputs=encoder))[0]


def read_prompts(decoder: Decoder, ids: list[Tensor], inputs: list[Tensor]) -> tuple[decoder_module.Cache, Tensor]:
    """A cache that has read the prompts, shorter ones padded, and their states."""
    prompts = padded([row[:length] for row, length in zip(ids, PROMPTS, strict=True)])
    at_T = torch.arange(prompts.size(1))
    regions_BT = encoder = None
    if decoder.config.topology == "prefix":
        regions_BT = (at_T < torch.tensor(PROMPTS)[:, None]).to(torch.int8)
    encoded = 0
    if decoder.encoder is not None:
        tokens_BS = padded(inputs)
        documents_BS = (torch.arange(tokens_BS.size(1)) < torch.tensor(INPUTS)[:, None]).long() - 1
        encoder, encoded = EncoderInputs(tokens_BS, None, documents_BS), 20
    cache = decoder.new_cache(3, max(PROMPTS) + NEW, encoded)
    return cache, decoder.hidden_states(prompts, cache=cache, regions_BT=regions_BT, encoder_inputs=encoder)


@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_token_by_token_is_one_pass(variant, blocked):
    """Three rows together: their prompts are read at once, then each goes on from its own place."""
    topology, keys = VARIANTS[variant]
    decoder = random_model(config(topology, **keys), blocked=blocked)
    ids = tokens_of(tuple(length + NEW for length in PROMPTS), 1)
    inputs = tokens_of(INPUTS, 2)
    cache, states_BTD = read_prompts(decoder, ids, inputs)
    logits = decoder.logits(states_BTD)
    expected = [
        alone(decoder, row, prompt, given if decoder.encoder else None)
        for row, prompt, given in zip(ids, PROMPTS, inputs, strict=True)
    ]
    for row, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(logits[row, :prompt], expected[row][:prompt], rtol=1e-4, atol=2e-5)
    for step in range(NEW):
        at_B1 = torch.tensor(PROMPTS)[:, None] + step
        new_B1 = torch.stack([row[at] for row, at in zip(ids, at_B1, strict=True)])
        logits = decoder.logits(decoder.hidden_states(new_B1, at_B1, cache=cache))
        for row, at in enumerate(at_B1[:, 0].tolist()):
            torch.testing.assert_close(logits[row, 0], expected[row][at], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("positions", ["rope", "t5"])
@pytest.mark.parametrize("topology", ["decoder", "encoder-decoder"])
@torch.no_grad()
def test_a_prompt_read_in_bounded_memory_is_the_same(topology, positions, monkeypatch):
    """Scores over the cache for two queries at a time, or for not even one."""
    decoder = random_model(config(topology, positions=positions))
    (ids_T, inputs_S), encoder = tokens_of((40, 24), 1), None
    if decoder.encoder is not None:
        encoder = EncoderInputs(inputs_S[None])
    whole = decoder.hidden_states(ids_T[None], encoder_inputs=encoder)
    for scores in (4 * 48 * 2, 10):
        monkeypatch.setattr(decoder_module, "CACHE_SCORES", scores)
        cache = decoder.new_cache(1, 48, 24)
        first = decoder.hidden_states(ids_T[None, :15], cache=cache, encoder_inputs=encoder)
        second = decoder.hidden_states(ids_T[None, 15:], torch.arange(15, 40)[None], cache=cache)
        torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_a_cache_that_grows_and_rows_that_move_keep_what_they_hold():
    """As generation does it: a longer cache takes over a shorter one, a row that ends gives its place to another."""
    decoder = random_model(config("encoder-decoder"))
    ids = tokens_of(tuple(length + NEW for length in PROMPTS), 1)
    inputs = tokens_of(INPUTS, 2)
    cache, _ = read_prompts(decoder, ids, inputs)
    larger = decoder.new_cache(4, 32, 30)
    larger.copy_from(cache)
    larger.part(slice(0, 1), 32).copy_from(larger.part(slice(2, 3), 32))
    order = (2, 1)
    at_B1 = torch.tensor([[PROMPTS[row]] for row in order])
    new_B1 = torch.stack([ids[row][PROMPTS[row]] for row in order])[:, None]
    states = decoder.hidden_states(new_B1, at_B1, cache=larger.part(slice(2), 32))
    for place, row in enumerate(order):
        expected = alone(decoder, ids[row], PROMPTS[row], inputs[row])[PROMPTS[row]]
        torch.testing.assert_close(decoder.logits(states)[place, 0], expected, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_a_row_without_inputs_is_finite_and_the_same_either_way():
    decoder = random_model(config("encoder-decoder"))
    tokens = torch.arange(16).view(2, 8)
    documents_BS = torch.tensor([[0] * 6, [-1] * 6])
    encoder = EncoderInputs(torch.arange(12).view(2, 6), None, documents_BS)
    whole = decoder.hidden_states(tokens, encoder_inputs=encoder)
    assert whole.isfinite().all()
    cached = decoder.hidden_states(tokens, cache=decoder.new_cache(2, 8, 10), encoder_inputs=encoder)
    torch.testing.assert_close(cached, whole, rtol=1e-4, atol=2e-5)
