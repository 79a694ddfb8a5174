"""Encoder-decoders with T5 1.1's settings are the same function in `transformers`, and come back as the same bytes."""

import dataclasses
import json

import pytest
import torch
from huggingface_models import VOCABULARY, loaded, random_decoder, randomize, sized

from calledshot.model import Decoder, EncoderInputs, Request, Sampling, generate
from calledshot.model.decoder import Reading
from calledshot.model.huggingface import architecture, export_huggingface, load_huggingface
from calledshot.recipe import UsageError, schema

T5 = schema.Model(
    topology="encoder-decoder", positions="t5", qk_norm=False, feed_forward="geglu",
    layers=2, width=64, heads=4, kv_heads=4, hidden=96,
)  # fmt: skip
SHAPES = {
    "t5": T5,
    "deeper-decoder": dataclasses.replace(T5, layers=3, encoder_layers=1),
    "narrow-heads": dataclasses.replace(T5, heads=6, kv_heads=6, head_width=4, norm_epsilon=1e-5),
    "tied": dataclasses.replace(T5, tied_embeddings=True),
    "swiglu": dataclasses.replace(T5, feed_forward="swiglu"),
    "gelu": dataclasses.replace(T5, feed_forward="gelu"),
    "relu2": dataclasses.replace(T5, feed_forward="relu2"),
}
"""A head's width is a power of 4, so that the root of it that T5's queries hold is exact."""
HARMLESS = "The tied weights mapping"
"""How transformers 5 begins a warning about every T5 whose head is its own."""


def ours(decoder: Decoder, tokens: torch.Tensor, read: torch.Tensor, **more) -> torch.Tensor:
    return decoder.logits(decoder.hidden_states(tokens, encoder_inputs=EncoderInputs(read), **more))


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_generation_equal_transformers(name, tmp_path, tokenizer, transformers, caplog):
    config = sized(SHAPES[name], context=200)
    decoder = random_decoder(config)
    export_huggingface(tmp_path / "m", config, decoder.state_dict(), tokenizer)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "m")
    assert not [one for one in caplog.records if one.levelname == "WARNING" and HARMLESS not in one.message]
    assert type(theirs).__name__ == architecture(config) == "T5ForConditionalGeneration"
    assert theirs.config.decoder_start_token_id == tokenizer.begin
    # Far enough for every bucket of the relative bias, and inputs and targets of different lengths.
    for inputs, targets in ((1, 1), (7, 3), (160, 150)):
        read, tokens = random_tokens(2, inputs), random_tokens(2, targets)
        logits = ours(decoder, tokens, read)
        torch.testing.assert_close(theirs(read, decoder_input_ids=tokens).logits, logits, rtol=0, atol=1e-5)
        assert logits.std() > 0.1

    read = random_tokens(1, 9)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    continued = theirs.generate(read, attention_mask=torch.ones_like(read), **options)[0, 1:].tolist()
    reading = Reading(start=(tokenizer.begin,))
    request = Request(tuple(read[0].tolist()), 8, Sampling(temperature=0), reading=reading)
    (completion,) = generate(decoder, [request])
    assert completion.tokens == continued


def test_padding_on_both_sides_of_the_encoder_is_not_seen(tmp_path, tokenizer, transformers):
    config = sized(T5)
    decoder = random_decoder(config)
    export_huggingface(tmp_path / "m", config, decoder.state_dict(), tokenizer)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "m")
    read, tokens = random_tokens(3, 20), random_tokens(3, 12)
    there = (torch.arange(20) < torch.tensor([[20], [13], [1]])).long()
    written = (torch.arange(12) < torch.tensor([[5], [12], [9]])).long()
    expected = theirs(read, attention_mask=there, decoder_input_ids=tokens, decoder_attention_mask=written).logits
    found = decoder.hidden_states(
        tokens, documents_BT=written - 1, encoder_inputs=EncoderInputs(read, documents_BS=there - 1)
    )
    real = written.bool()
    torch.testing.assert_close(decoder.logits(found)[real], expected[real], rtol=0, atol=1e-5)


def test_documents_packed_in_a_row_are_as_they_are_alone(tmp_path, tokenizer, transformers):
    """Their relative positions are those inside the document, wherever it stands."""
    config = sized(T5)
    decoder = random_decoder(config)
    export_huggingface(tmp_path / "m", config, decoder.state_dict(), tokenizer)
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "m")
    read, tokens = random_tokens(1, 30), random_tokens(1, 20)
    read_documents = (torch.arange(30) >= 11).int()[None]
    documents = (torch.arange(20) >= 8).int()[None]
    found = decoder.logits(
        decoder.hidden_states(
            tokens, documents_BT=documents, encoder_inputs=EncoderInputs(read, documents_BS=read_documents)
        )
    )
    first = theirs(read[:, :11], decoder_input_ids=tokens[:, :8]).logits
    second = theirs(read[:, 11:], decoder_input_ids=tokens[:, 8:]).logits
    torch.testing.assert_close(found, torch.cat((first, second), 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_a_round_trip_returns_the_same_bytes(name, dtype, tmp_path, tokenizer):
    config = sized(SHAPES[name])
    decoder = random_decoder(config)
    export_huggingface(tmp_path / "a", config, decoder.state_dict(), tokenizer, dtype=dtype, shard_bytes=300_000)
    read, state = load_huggingface(tmp_path / "a")
    back = loaded(read, state)
    for key, parameter in back.named_parameters():
        expected = decoder.get_parameter(key).to(dtype).to(parameter.dtype)
        assert torch.equal(parameter.view(torch.int32), expected.view(torch.int32)), key
    export_huggingface(tmp_path / "b", read, back.state_dict(), tokenizer, dtype=dtype, shard_bytes=300_000)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir())
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize("ties", [{}, {"tie_word_embeddings": False}])
@pytest.mark.parametrize("own_head", [True, False])
def test_models_saved_by_transformers_are_read(ties, own_head, tmp_path, transformers):
    """The first T5 divided what goes into its tied head by the root of the width; T5 1.1 does not."""
    config = transformers.T5Config(
        vocab_size=100, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu", **ties
    )
    theirs = transformers.T5ForConditionalGeneration(config)
    if own_head:
        theirs.lm_head.weight = torch.nn.Parameter(torch.empty(100, 32))
    randomize(theirs).save_pretrained(tmp_path)
    model, state = load_huggingface(tmp_path)
    assert model.tied_embeddings is not own_head
    read, tokens = random_tokens(2, 20) % 100, random_tokens(2, 10) % 100
    logits = ours(loaded(model, state), tokens, read)
    torch.testing.assert_close(logits, theirs(read, decoder_input_ids=tokens).logits, rtol=0, atol=1e-5)
    assert logits.std() > 0.05


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"positions": "rope"}, "model.positions=t5"),
        ({"qk_norm": True}, "model.qk_norm=false"),
        ({"kv_heads": 2}, "model.kv_heads=4"),
        ({"encoder_pooling": 2}, "model.encoder_pooling=1"),
        ({"encoder_width": 32}, "model.encoder_width=64"),
        ({"encoder_hidden": 32}, "model.encoder_hidden=96"),
        ({"experts": 4}, "model.experts=0"),
        ({"norm": "layernorm", "softcap": 30.0}, "model.norm=rmsnorm model.softcap=0"),
    ],
)
def test_what_is_not_t5_is_refused_with_what_would_be(change, words, tmp_path, tokenizer):
    config = dataclasses.replace(sized(T5), **change)
    with pytest.raises(UsageError, match=f"T5ForConditionalGeneration fits with {words}$"):
        export_huggingface(tmp_path / "m", config, {}, tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"feed_forward_proj": "relu"}, "feed_forward_proj = 'relu'"),
        ({"feed_forward_proj": "gated-relu"}, "gated-relu"),
        ({"relative_attention_max_distance": 64}, "relative_attention_max_distance"),
        ({"num_layers": 3}, "encoder.block.2"),
        ({"d_kv": 8}, "SelfAttention.q"),
    ],
)
def test_folders_of_other_models_are_refused(change, word, tmp_path, tokenizer):
    config = sized(T5)
    export_huggingface(tmp_path / "m", config, random_decoder(config).state_dict(), tokenizer)
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UsageError, match=word):
        load_huggingface(tmp_path / "m")
