"""Exported models are the same function in `transformers`, and come back as the same bytes."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_models import VOCABULARY, loaded, random_decoder, randomize, sized

from calledshot.model import Decoder
from calledshot.model.huggingface import architecture, export_huggingface, load_huggingface
from calledshot.recipe import RunError, UsageError, schema
from calledshot.recipe.conversion import extended_model

SMALL = {"layers": 2, "width": 64, "heads": 4, "kv_heads": 2}
SHAPES = {
    "gqa": schema.Model(layers=3, width=96, heads=6, kv_heads=2, qk_norm=True),
    "mha": schema.Model(layers=2, width=64, heads=4, kv_heads=4, qk_norm=True, rope_base=500_000.0),
    "mqa-tied": schema.Model(layers=2, width=64, heads=4, kv_heads=1, qk_norm=True, tied_embeddings=True),
    "wide-heads": schema.Model(layers=2, width=64, heads=4, kv_heads=2, head_width=48, qk_norm=True, norm_epsilon=1e-5),
    "odd-heads": schema.Model(layers=2, width=64, heads=6, kv_heads=3, head_width=16, hidden=100, qk_norm=True),
    "llama-gqa": schema.Model(layers=3, width=96, heads=6, kv_heads=2, qk_norm=False),
    "llama-mha-tied": schema.Model(layers=2, width=64, heads=2, kv_heads=2, qk_norm=False, tied_embeddings=True),
    "llama-mqa-wide": schema.Model(layers=2, width=64, heads=4, kv_heads=1, head_width=24, qk_norm=False),
    "yarn": schema.Model(**SMALL, rope_scaling="yarn", rope_factor=4.0, rope_original_context=16),
    "llama-yarn": schema.Model(
        **SMALL, qk_norm=False, rope_base=100.0, rope_scaling="yarn", rope_factor=2.0, rope_original_context=32
    ),
    "llama3": schema.Model(
        **SMALL, qk_norm=False, rope_base=100.0, rope_scaling="llama3", rope_factor=8.0, rope_original_context=16
    ),
    "ntk": schema.Model(**SMALL, rope_scaling="ntk", rope_factor=4.0, rope_original_context=16),
    "dynamic": schema.Model(**SMALL, rope_scaling="dynamic", rope_factor=2.0, rope_original_context=16),
    "moe": schema.Model(**SMALL, hidden=96, experts=8, top_k=2),
    "moe-unnormalized": schema.Model(
        **{**SMALL, "layers": 3}, hidden=96, experts=5, top_k=3, expert_hidden=40, renormalize=False, dense_layers=1
    ),
    "moe-one": schema.Model(**SMALL, experts=4, top_k=1, renormalize=False, balance="none"),
    "mixtral": schema.Model(**SMALL, hidden=96, experts=4, top_k=2, qk_norm=False),
    "mixtral-mqa-tied": schema.Model(
        layers=2, width=64, heads=4, kv_heads=1, head_width=24, experts=3, top_k=3, qk_norm=False, tied_embeddings=True
    ),
}
CLASSES = {"llama": "Llama", "llama3": "Llama", "mixtral": "Mixtral", "moe": "Qwen3Moe"}
"""By what a shape's name begins with; the others are Qwen3."""


@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_generation_equal_transformers(name, tmp_path, tokenizer, transformers, caplog):
    config = sized(SHAPES[name])
    decoder = random_decoder(config)
    export_huggingface(tmp_path / "model", config, decoder.state_dict(), tokenizer)
    with caplog.at_level(logging.INFO):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert type(theirs).__name__ == f"{CLASSES.get(name.split('-')[0], 'Qwen3')}ForCausalLM" == architecture(config)
    assert theirs.dtype == torch.float32
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in decoder.parameters())
    generator = torch.Generator().manual_seed(1)
    for context in (1, 7, 64):
        tokens = torch.randint(0, VOCABULARY, (2, context), generator=generator)
        ours = decoder.logits(decoder.hidden_states(tokens))
        torch.testing.assert_close(theirs(tokens).logits, ours, rtol=0, atol=1e-5)
        assert ours.std() > 0.1

    prompt = torch.randint(0, VOCABULARY, (1, 5), generator=generator)
    continued = theirs.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    tokens = prompt
    for _ in range(8):
        tokens = torch.cat((tokens, decoder.logits(decoder.hidden_states(tokens))[:, -1:].argmax(-1)), 1)
    assert torch.equal(tokens, continued)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", SHAPES)
def test_a_round_trip_returns_the_same_bytes(name, dtype, tmp_path, tokenizer):
    config = sized(SHAPES[name])
    decoder = random_decoder(config)
    export_huggingface(tmp_path / "a", config, decoder.state_dict(), tokenizer, dtype=dtype)
    read, state = load_huggingface(tmp_path / "a")
    back = Decoder(read)
    back.load_state_dict(state)
    for key, parameter in back.named_parameters():
        expected = decoder.get_parameter(key).to(dtype).to(parameter.dtype)
        assert torch.equal(parameter.view(torch.int32), expected.view(torch.int32)), key
    export_huggingface(tmp_path / "b", read, back.state_dict(), tokenizer, dtype=dtype)
    for file in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_shards_load_as_one(tmp_path, tokenizer, transformers):
    config = sized(SHAPES["gqa"])
    decoder = random_decoder(config)
    files = export_huggingface(tmp_path / "m", config, decoder.state_dict(), tokenizer, shard_bytes=300_000)
    shards = [file for file in files if file.suffix == ".safetensors"]
    assert len(shards) > 2
    assert all(shard.stat().st_size < 320_000 for shard in shards)
    tokens = torch.arange(20)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    torch.testing.assert_close(theirs(tokens).logits, decoder.logits(decoder.hidden_states(tokens)), rtol=0, atol=1e-5)
    back = Decoder(config)
    back.load_state_dict(load_huggingface(tmp_path / "m")[1])
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), decoder.parameters(), strict=True))


@pytest.mark.parametrize("name", ["moe", "mixtral"])
def test_experts_in_shards(name, tmp_path, tokenizer):
    config = sized(SHAPES[name])
    decoder = random_decoder(config)
    export_huggingface(tmp_path / "m", config, decoder.state_dict(), tokenizer, shard_bytes=200_000)
    assert len(list((tmp_path / "m").glob("model-*"))) > 2
    back = loaded(*load_huggingface(tmp_path / "m"))
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), decoder.parameters(), strict=True))


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("Qwen3", {}),
        ("Llama", {}),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0}}),
        (
            "Qwen3",
            {"rope_parameters": {
                "rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 8
            }},
        ),
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}),
        (
            "Qwen3Moe",
            {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": True,
             "mlp_only_layers": [0]},
        ),
        ("Mixtral", {"num_local_experts": 4}),
    ],
)  # fmt: skip
def test_models_saved_by_transformers_are_read(kind, more, tmp_path, transformers):
    """Their own config.json, which leaves out what is at its default."""
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=32, bos_token_id=None, eos_token_id=None, **more,
    )  # fmt: skip
    theirs = randomize(getattr(transformers, f"{kind}ForCausalLM")(config))
    theirs.save_pretrained(tmp_path)
    ours = loaded(*load_huggingface(tmp_path))
    tokens = torch.arange(30)[None]
    logits = ours.logits(ours.hidden_states(tokens))
    torch.testing.assert_close(logits, theirs(tokens).logits, rtol=0, atol=1e-5)
    assert logits.std() > 0.1


def test_dynamic_stays_dynamic_and_stretches_as_theirs_does(tmp_path, transformers):
    """To the length that it was trained at nothing is stretched; past it, ours at the length that it is extended to."""
    rotary = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 500.0}
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, bos_token_id=None, eos_token_id=None, rope_parameters=rotary,
    )  # fmt: skip
    theirs = randomize(transformers.LlamaForCausalLM(config))
    theirs.save_pretrained(tmp_path)
    model, state = load_huggingface(tmp_path)
    assert (model.rope_scaling, model.rope_factor, model.rope_original_context) == ("dynamic", 4.0, 32)
    longer = loaded(extended_model(model, 96, factor=model.rope_factor), state)
    tokens = torch.arange(96)[None]
    logits = longer.logits(longer.hidden_states(tokens))
    torch.testing.assert_close(logits, theirs(tokens).logits, rtol=0, atol=1e-5)
    assert (logits - loaded(model, state).logits(loaded(model, state).hidden_states(tokens))).abs().max() > 0.1


@pytest.mark.parametrize("name", ["gqa", "moe"])
def test_prefixes_are_a_four_dimensional_mask_there(name, tmp_path, tokenizer, transformers):
    """Prefixes of other lengths in each row, seen both ways; the mask is added, since "eager" misreads booleans."""
    config = schema.Model(**{**vars(sized(SHAPES[name])), "topology": "prefix"})
    decoder = random_decoder(config)
    export_huggingface(tmp_path / "m", config, decoder.state_dict(), tokenizer)
    tokens = torch.randint(0, VOCABULARY, (3, 24), generator=torch.Generator().manual_seed(1))
    place = torch.arange(24)
    regions = (place < torch.tensor([[5], [24], [1]])).to(torch.int8)
    seen = (place[:, None] >= place) | (regions[:, :, None] * regions[:, None] > 0)
    mask = torch.zeros(3, 1, 24, 24).masked_fill_(~seen[:, None], torch.finfo(torch.float32).min)
    ours = decoder.logits(decoder.hidden_states(tokens, regions_BT=regions))
    for attention in ("eager", "sdpa"):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m", attn_implementation=attention)
        torch.testing.assert_close(theirs(tokens, attention_mask=mask).logits, ours, rtol=0, atol=1e-5)
    assert (ours - theirs(tokens).logits).abs().max() > 0.1


@pytest.mark.parametrize("name", ["gqa", "llama-gqa"])
def test_the_tokenizer_gives_identical_ids(name, tmp_path, tokenizer, transformers):
    config = sized(SHAPES[name])
    export_huggingface(tmp_path / "m", config, random_decoder(config).state_dict(), tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    texts = [
        "",
        "  def f(x):\n\treturn x",
        "naïve 日本語 👍🏽\r\n",
        "a<|end|>b <|begin|> <|sentinel_0|>",
        "\x00\ufeff x  ",
    ]
    for text in texts:
        assert theirs(text, add_special_tokens=False).input_ids == tokenizer.encode(text)
        assert theirs(text).input_ids == [tokenizer.begin, *tokenizer.encode(text)]
        assert theirs.decode(tokenizer.encode(text)) == text
    found = theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id
    assert found == (tokenizer.begin, tokenizer.end, tokenizer.pad)
    # The model has more rows than the tokenizer has ids.
    assert len(theirs) == tokenizer.size < VOCABULARY


@pytest.mark.parametrize(
    "change, key",
    [
        ({"softcap": 30.0}, "model.softcap"),
        ({"qk_norm": False, "heads": 6, "kv_heads": 2, "head_width": 16}, "model.heads=4"),
        ({"norm": "layernorm"}, "model.norm"),
        ({"norm_placement": "sandwich"}, "model.norm_placement"),
        ({"feed_forward": "relu2"}, "model.feed_forward"),
        ({"positions": "none"}, "model.positions"),
        ({"experts": 4, "router": "sigmoid"}, "model.router"),
        ({"experts": 4, "balance": "bias"}, "model.balance"),
        ({"experts": 4, "shared_expert_hidden": 32}, "model.shared_expert_hidden"),
    ],
)
def test_what_no_class_expresses_is_refused(change, key, tmp_path, tokenizer):
    config = schema.Model(**{**vars(sized(SHAPES["mha"])), **change})
    with pytest.raises(UsageError, match=key):
        export_huggingface(tmp_path / "m", config, random_decoder(config).state_dict(), tokenizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "change, word",
    [
        ({"model_type": "gemma2"}, "gemma2"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 8.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0}}, "low_freq_factor"),
        ({"attention_bias": True}, "attention_bias"),
        ({"model_type": ["llama"]}, "model_type is"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0 is not a whole number above 0"),
        ({"num_key_value_heads": -2}, "num_key_value_heads = -2"),
        ({"max_position_embeddings": 0}, "max_position_embeddings = 0"),
        ({"rope_scaling": None, "rope_parameters": 5}, "rotary embedding are 5, not a table"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0}}, "factor = 0 of its yarn stretches nothing"),
        ({"num_hidden_layers": 4}, "model.layers.3"),
        ({"num_hidden_layers": 2}, "model.layers.2"),
        ({"intermediate_size": 64}, "mlp.gate_proj"),
        ({"hidden_size": "wide"}, "wide"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_fast": 16}}, "beta_fast = 16"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.0}}, "attention_factor"),
    ],
)
def test_folders_of_other_models_are_refused(change, word, tmp_path, tokenizer):
    config = sized(SHAPES["gqa"])
    export_huggingface(tmp_path / "m", config, random_decoder(config).state_dict(), tokenizer)
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UsageError, match=word):
        load_huggingface(tmp_path / "m")


def test_an_index_that_points_elsewhere_is_refused(tmp_path, tokenizer):
    config = sized(SHAPES["gqa"])
    export_huggingface(tmp_path / "m", config, random_decoder(config).state_dict(), tokenizer, shard_bytes=300_000)
    file = tmp_path / "m" / "model.safetensors.index.json"
    file.write_text(file.read_text().replace("model-00001-of", "../model-00001-of"))
    with pytest.raises(UsageError, match="not a file of its folder"):
        load_huggingface(tmp_path / "m")
    file.write_text("{}")
    with pytest.raises(RunError, match="is damaged"):
        load_huggingface(tmp_path / "m")


def test_a_file_cut_in_half_is_named(tmp_path, tokenizer):
    config = sized(SHAPES["gqa"])
    export_huggingface(tmp_path / "m", config, random_decoder(config).state_dict(), tokenizer)
    file = tmp_path / "m" / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(RunError, match=r"model\.safetensors: is missing or damaged"):
        load_huggingface(tmp_path / "m")


def test_a_folder_in_use_is_kept_unless_forced(tmp_path, tokenizer):
    config, tied = sized(SHAPES["gqa"]), sized(SHAPES["mqa-tied"])
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="--force"):
        export_huggingface(folder, config, random_decoder(config).state_dict(), tokenizer)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    export_huggingface(folder, config, random_decoder(config).state_dict(), tokenizer, force=True, shard_bytes=300_000)
    export_huggingface(folder, tied, random_decoder(tied).state_dict(), tokenizer, force=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert [path.name for path in folder.glob("model*")] == ["model.safetensors"]
    assert load_huggingface(folder)[0].tied_embeddings
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("there_before", [False, True])
def test_a_full_disk_leaves_nothing_half_made(there_before, tmp_path, tokenizer):
    """A limit on the size of files stands for the disk: the weights' file cannot be written to its end."""
    config = sized(SHAPES["gqa"])
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json())
    if there_before:
        export_huggingface(tmp_path / "m", config, random_decoder(config).state_dict(), tokenizer)
    before = {path: path.read_bytes() for path in (tmp_path / "m").glob("*")}
    code = f"""
import resource, signal
from pathlib import Path
from calledshot.data import Tokenizer
from calledshot.model import Decoder
from calledshot.model.huggingface import export_huggingface
from calledshot.recipe import RunError, schema
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tokenizer = Tokenizer.load({str(tmp_path / "tokenizer.json")!r})
config = schema.Model(**{vars(config)!r})
decoder = Decoder(config).requires_grad_(False)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    export_huggingface(Path({str(tmp_path / "m")!r}), config, decoder.state_dict(), tokenizer, force=True)
except RunError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "cannot be written" in done.stdout, done.stderr
    assert {path: path.read_bytes() for path in (tmp_path / "m").glob("*")} == before
    assert {path.name for path in tmp_path.iterdir()} == {"tokenizer.json"} | ({"m"} if there_before else set())


def test_weights_that_can_run_code_are_not_read(tmp_path: Path):
    (tmp_path / "config.json").write_text(
        json.dumps(
            {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1,
             "num_attention_heads": 4, "vocab_size": 100}
        )
    )  # fmt: skip
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"model\.safetensors"):
        load_huggingface(tmp_path)
