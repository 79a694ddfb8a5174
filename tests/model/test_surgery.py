"""Models changed in shape compute what they should: the same where that is promised, means where heads are pooled."""

import dataclasses
import math

import pytest
import torch
from huggingface_models import loaded, random_decoder, sized

from calledshot.model import Decoder, EncoderInputs, Request, Sampling, generate
from calledshot.model.positions import frequencies
from calledshot.model.surgery import (
    pool_kv_heads,
    upcycle,
    upcycle_optimizer,
)
from calledshot.recipe import UsageError, schema
from calledshot.recipe.conversion import extended_model, pooled_model, upcycled_model

DENSE = sized(schema.Model(layers=3, width=64, heads=8, kv_heads=8, hidden=96))
ENCODER_DECODER = dataclasses.replace(
    DENSE, topology="encoder-decoder", encoder_layers=2, encoder_width=32, encoder_hidden=96, feed_forward="gelu",
    layers=2, heads=8, kv_heads=4,
)  # fmt: skip


def logits(decoder: Decoder) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 640, (2, 24), generator=generator)
    read = None
    if decoder.encoder is not None:
        read = EncoderInputs(torch.randint(0, 640, (2, 17), generator=generator))
    return decoder.logits(decoder.hidden_states(tokens, encoder_inputs=read))


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("model", [DENSE, ENCODER_DECODER], ids=["decoder", "encoder-decoder"])
def test_with_weights_that_sum_to_one_copies_are_the_feed_forward(model, top_k):
    """Whatever the routers say."""
    decoder = random_decoder(model)
    sparse = dataclasses.replace(
        upcycled_model(model, experts=8, top_k=top_k, renormalize=top_k > 1), renormalize=True
    )  # fmt: skip
    upcycled = loaded(sparse, upcycle(sparse, decoder.state_dict()))
    for block in upcycled.all_blocks:
        router = block.experts.router_ED
        assert float(router.std()) == pytest.approx(router.size(1) ** -0.5, rel=0.15)
    assert relative_error(logits(upcycled), logits(decoder)) < 1e-5


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_without_they_are_off_by_the_weights_that_are_missing(top_k):
    """A router that knows nothing gives each of 8 experts an eighth: the error is 1 - k / 8."""
    decoder = random_decoder(DENSE)
    sparse = upcycled_model(DENSE, experts=8, top_k=top_k, renormalize=False)
    upcycled = loaded(sparse, upcycle(sparse, decoder.state_dict()))
    upcycled.blocks[0].experts.router_ED *= 1e-4
    x = torch.randn(1, 50, 64, generator=torch.Generator().manual_seed(0))
    dense, _ = decoder.blocks[0]._feed_forward(x)
    copies, _ = upcycled.blocks[0].experts(x)
    assert relative_error(copies, dense) == pytest.approx(1 - top_k / 8, rel=1e-3)
    assert relative_error(logits(upcycled), logits(decoder)) > 0.1


@pytest.mark.parametrize("balance", ["auxiliary", "bias"])
def test_first_layers_may_stay_dense_and_noise_tells_copies_apart(balance):
    decoder = random_decoder(dataclasses.replace(DENSE, balance=balance))
    sparse = upcycled_model(decoder.config, experts=4, top_k=2, dense_layers=1)
    state = upcycle(sparse, decoder.state_dict(), noise=0.1)
    upcycled = loaded(sparse, state)  # every name and shape is there
    assert upcycled.blocks[0].experts is None and upcycled.blocks[1].experts is not None
    dense, copies = decoder.blocks[1].down_DF, upcycled.blocks[1].experts.down_EDF
    noise = (copies - dense).flatten(1)
    assert float(noise.square().mean().sqrt() / dense.square().mean().sqrt()) == pytest.approx(0.1, rel=0.05)
    assert torch.corrcoef(noise).triu(1).abs().max() < 0.1
    assert torch.equal(state["blocks.0.down_DF"], decoder.blocks[0].down_DF)
    assert relative_error(logits(upcycled), logits(decoder)) < 0.2


def test_moments_are_repeated_and_routers_have_none():
    sparse = upcycled_model(DENSE, experts=4, top_k=2, dense_layers=1)
    generator = torch.Generator().manual_seed(0)
    before = {
        "blocks.0.down_DF.momentum": torch.randn(64, 96, generator=generator),
        "blocks.2.down_DF.momentum": torch.randn(64, 96, generator=generator),
        "blocks.2.gate_up_2FD.second": torch.randn(2, 96, 64, generator=generator),
        "blocks.2.gate_up_2FD.step": torch.tensor(7.0),
        "blocks.2.qkv_KXCD.momentum": torch.randn(8, 3, 8, 64, generator=generator),
    }
    after = upcycle_optimizer(sparse, before)
    assert set(after) == {
        "blocks.0.down_DF.momentum",
        "blocks.2.experts.down_EDF.momentum",
        "blocks.2.experts.gate_up_E2FD.second",
        "blocks.2.experts.gate_up_E2FD.step",
        "blocks.2.qkv_KXCD.momentum",
    }
    assert torch.equal(after["blocks.2.experts.gate_up_E2FD.second"][3], before["blocks.2.gate_up_2FD.second"])
    assert after["blocks.2.experts.gate_up_E2FD.step"] == 7
    assert torch.equal(after["blocks.0.down_DF.momentum"], before["blocks.0.down_DF.momentum"])


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        (dataclasses.replace(DENSE, experts=4), {"experts": 8, "top_k": 2}, "has 4 experts already"),
        (DENSE, {"experts": 1, "top_k": 1}, "--experts 1: must be 2 or more"),
        (DENSE, {"experts": 8, "top_k": 9}, "--top-k 9: a token goes to 1 to 8"),
        (DENSE, {"experts": 8, "top_k": 1}, "--no-renormalize"),
        (DENSE, {"experts": 8, "top_k": 2, "dense_layers": 3}, "--dense-layers 3: leaves none of the 3 layers"),
        (dataclasses.replace(ENCODER_DECODER, encoder_hidden=64), {"experts": 8, "top_k": 2}, "model.encoder_hidden"),
    ],
)
def test_what_cannot_be_upcycled_is_said(model, options, words):
    with pytest.raises(UsageError, match=words):
        upcycled_model(model, **options)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_equal_heads_pool_to_the_same_bits(kv_heads, qk_norm):
    """Keys and values that a group shares already are what the pooled model has, to the last bit of the logits."""
    pooled = pooled_model(dataclasses.replace(DENSE, qk_norm=qk_norm), kv_heads)
    grouped = random_decoder(pooled)
    # The same function with 8 key heads, each group's written out.
    wide = Decoder(dataclasses.replace(pooled, kv_heads=8))
    state = grouped.state_dict()
    for name, tensor in state.items():
        if name.endswith("qkv_KXCD"):
            groups = 8 // kv_heads
            queries = tensor[:, :-2].reshape(8, 1, *tensor.shape[2:])
            state[name] = torch.cat((queries, tensor[:, -2:].repeat_interleave(groups, 0)), 1)
    wide.load_state_dict(state)
    back = pool_kv_heads(pooled, wide.state_dict())
    assert all(torch.equal(back[name], tensor) for name, tensor in grouped.state_dict().items())
    assert torch.equal(logits(wide.eval()), logits(loaded(pooled, back)))


def test_three_equal_heads_pool_to_the_same_bits():
    """A mean of three in float32 would be off by a bit now and then."""
    model = dataclasses.replace(DENSE, heads=6, kv_heads=6, head_width=8)
    pooled = pooled_model(model, 2)
    one = torch.randn(2, 1, 2, 8, 64, generator=torch.Generator().manual_seed(0)).expand(2, 3, 2, 8, 64)
    state = {"blocks.0.qkv_KXCD": torch.cat((torch.randn(6, 1, 8, 64), one.reshape(6, 2, 8, 64)), 1)}
    assert torch.equal(pool_kv_heads(pooled, state)["blocks.0.qkv_KXCD"][:, -2:], one[:, 0])


def test_other_heads_pool_to_their_mean_in_every_attention():
    """As the view and mean of the paper's formula on separate projections; queries and outputs keep their places."""
    decoder = random_decoder(ENCODER_DECODER)
    pooled = pooled_model(ENCODER_DECODER, 2)
    state = pool_kv_heads(pooled, decoder.state_dict())
    after = loaded(pooled, state)
    assert logits(after).isfinite().all()
    before = decoder.state_dict()
    for name, heads, kv_heads in (("blocks.1.", 4, 2), ("encoder.blocks.0.", 2, 1)):
        old, new = before[f"{name}qkv_KXCD"], state[f"{name}qkv_KXCD"]
        for part in (1, 2):
            separate = old[:, -part].reshape(kv_heads, heads // kv_heads, 8, -1)
            torch.testing.assert_close(new[:, -part], separate.mean(1), rtol=0, atol=1e-6)
        assert torch.equal(new[:, :-2].flatten(0, 2), old[:, :-2].flatten(0, 2))
        assert torch.equal(state[f"{name}out_DHC"], before[f"{name}out_DHC"])
    old, new = before["blocks.0.cross_key_value_K2CD"], state["blocks.0.cross_key_value_K2CD"]
    torch.testing.assert_close(new, old.view(2, 2, 2, 8, 32).mean(1), rtol=0, atol=1e-6)
    assert torch.equal(
        state["blocks.0.cross_query_KGCD"].flatten(0, 2), before["blocks.0.cross_query_KGCD"].flatten(0, 2)
    )


@pytest.mark.parametrize("kv_heads", [0, 3, 8, 16])
def test_heads_that_are_no_equal_groups_are_refused(kv_heads):
    with pytest.raises(UsageError, match=r"take 1 or 2 or 4$"):
        pooled_model(DENSE, kv_heads)


LONG = schema.Model(layers=1, width=256, heads=2, kv_heads=2, head_width=128, rope_base=1e6, context=32768)


@pytest.mark.parametrize("factor", [2.0, 4.0, 8.0])
@pytest.mark.parametrize("method", ["yarn", "dynamic", "ntk", "llama3"])
def test_frequencies_are_those_of_transformers(method, factor, transformers):
    """At Qwen3's settings. Its "dynamic" is asked for the length that ours is fixed at."""
    rope = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    context = round(LONG.context * factor)
    model = extended_model(LONG, context, "yarn" if method == "llama3" else method)
    if method == "llama3":  # which models come with
        model = dataclasses.replace(model, rope_scaling=method)
    assert (model.rope_scaling, model.rope_factor, model.rope_original_context) == (method, factor, 32768)
    rotary = {"rope_type": "default", "rope_theta": 1e6 * factor ** (128 / 126)}
    if method != "ntk":
        rotary = {"rope_type": method, "rope_theta": 1e6, "factor": factor}
    if method in ("yarn", "llama3"):
        rotary["original_max_position_embeddings"] = 32768
    if method == "llama3":  # as Llama 3.1 has them
        rotary |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    length = 32768 if method in ("dynamic", "ntk") else context
    config = transformers.Qwen3Config(head_dim=128, max_position_embeddings=length, rope_parameters=rotary)
    if method == "ntk":
        theirs = transformers.models.qwen3.modeling_qwen3.Qwen3RotaryEmbedding(config)
        expected, attention = theirs.inv_freq, theirs.attention_scaling
    else:
        expected, attention = rope[method](config, seq_len=context)
    found, scale = frequencies(model, 128)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)
    assert scale == pytest.approx(attention, rel=1e-12)
    assert attention == (pytest.approx(0.1 * math.log(factor) + 1) if method == "yarn" else 1.0)


def test_a_base_is_raised_by_a_factor_and_positions_without_rope_just_go_on():
    assert extended_model(LONG, 262_144, "base", 50.0) == dataclasses.replace(LONG, context=262_144, rope_base=5e7)
    for positions in ("t5", "none"):
        model = dataclasses.replace(LONG, positions=positions)
        assert extended_model(model, 65_536) == dataclasses.replace(model, context=65_536)
        with pytest.raises(UsageError, match="--method"):
            extended_model(model, 65_536, "yarn")


def test_an_extension_is_extended_from_where_it_was_trained():
    once = extended_model(LONG, 65_536)
    twice = extended_model(once, 131_072)
    assert twice == extended_model(LONG, 131_072)
    assert twice.rope_scaling == "yarn" and twice.rope_factor == 4.0
    for method in ("ntk", "base"):
        with pytest.raises(UsageError, match="extended by yarn already"):
            extended_model(once, 131_072, method)


@pytest.mark.parametrize(
    ("context", "method", "factor", "words"),
    [
        (32_768, None, None, "reads 32768 tokens already"),
        (65_536, "base", None, "--factor"),
        (65_536, "yarn", 0.5, "--factor 0.5: must be 1 or more"),
    ],
)
def test_extensions_that_say_nothing_are_refused(context, method, factor, words):
    with pytest.raises(UsageError, match=words):
        extended_model(LONG, context, method, factor)


@pytest.mark.parametrize("method", ["yarn", "dynamic", "ntk"])
def test_a_longer_prompt_is_read_and_continued_with_the_same_weights(method):
    decoder = random_decoder(DENSE)
    model = extended_model(DENSE, 256, method)
    longer = loaded(model, decoder.state_dict())
    prompt = tuple(torch.randint(0, 640, (200,), generator=torch.Generator().manual_seed(2)).tolist())
    with pytest.raises(UsageError, match="more than the model's context of 64"):
        generate(decoder, [Request(prompt, 8)])
    (completion,) = generate(longer, [Request(prompt, 8, Sampling(temperature=0))])
    tokens = list(prompt)
    for _ in range(8):  # cached and uncached agree past the length trained at
        tokens.append(int(longer.logits(longer.hidden_states(torch.tensor([tokens]))[:, -1]).argmax()))
    assert completion.tokens == tokens[200:]


def test_a_demand_on_the_export_that_no_longer_holds_is_dropped():
    model = dataclasses.replace(DENSE, exportable_to="qwen3")
    assert upcycled_model(model, experts=4, top_k=2).exportable_to == ""
    assert pooled_model(model, 2).exportable_to == "qwen3"
    assert extended_model(model, 128).exportable_to == "qwen3"
