"""Hugging Face folders, in and out: Qwen3ForCausalLM with QK-norm, LlamaForCausalLM without; `transformers` not needed.

Shapes: K key/value heads, G query heads a key head, X = G + 2, C head width, D width, F hidden, V vocabulary.

| ours | theirs |
|---|---|
| qkv_KXCD[k, g] | self_attn.q_proj, rows of query head k * G + g |
| qkv_KXCD[k, G], qkv_KXCD[k, G + 1] | self_attn.k_proj, self_attn.v_proj, rows of key head k |
| out_DHC, down_DF | self_attn.o_proj, mlp.down_proj |
| gate_up_2FD[0], gate_up_2FD[1] | mlp.gate_proj, mlp.up_proj |

Nothing is computed on the way, so that a round trip gives the same bytes; the rotary halves are laid out alike in both.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from calledshot.model.decoder import Decoder
from calledshot.recipe import RunError, UsageError, schema, shape
from calledshot.rundir import atomic_write, read_json
from calledshot.rundir.files import write_failure

if TYPE_CHECKING:
    from calledshot.data import Tokenizer

SHARD_BYTES = 5_000_000_000
"""Weights past this are spread over several files, as the Hub asks."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

PLAIN = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "pretraining_tp": 1,
}
"""What a configuration that says otherwise describes is not this decoder."""
COMPUTED = ("rotary_emb.inv_freq",)
"""Ends of names in old files of tensors that are computed, not learned."""


def architecture(config: schema.Model) -> str:
    """The class in `transformers` that computes the same function. UsageError with the reason where there is none."""
    if config.softcap:
        raise UsageError(
            f"model.softcap = {config.softcap:g}: neither Qwen3 nor Llama caps its logits; train with model.softcap=0"
        )
    if config.qk_norm:
        return "Qwen3ForCausalLM"
    if config.width % config.heads:
        raise UsageError(
            f"model.heads = {config.heads}: Llama wants heads that divide the width ({config.width}); "
            f"choose such heads, or model.qk_norm=true, which Qwen3 takes with any"
        )
    return "LlamaForCausalLM"


def to_huggingface(config: schema.Model, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the class's state dict, from the Decoder's, one after the other; some are views."""
    groups = config.heads // config.kv_heads
    yield "model.embed_tokens.weight", state["embedding_VD"]
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        qkv_KXCD = state[f"{ours}qkv_KXCD"]
        gate_FD, up_FD = state[f"{ours}gate_up_2FD"]
        yield f"{theirs}input_layernorm.weight", state[f"{ours}attention_norm_D"]
        yield f"{theirs}self_attn.q_proj.weight", qkv_KXCD[:, :groups].flatten(0, 2)
        yield f"{theirs}self_attn.k_proj.weight", qkv_KXCD[:, groups].flatten(0, 1)
        yield f"{theirs}self_attn.v_proj.weight", qkv_KXCD[:, groups + 1].flatten(0, 1)
        if config.qk_norm:
            yield f"{theirs}self_attn.q_norm.weight", state[f"{ours}query_norm_C"]
            yield f"{theirs}self_attn.k_norm.weight", state[f"{ours}key_norm_C"]
        yield f"{theirs}self_attn.o_proj.weight", state[f"{ours}out_DHC"]
        yield f"{theirs}post_attention_layernorm.weight", state[f"{ours}feed_forward_norm_D"]
        yield f"{theirs}mlp.gate_proj.weight", gate_FD
        yield f"{theirs}mlp.up_proj.weight", up_FD
        yield f"{theirs}mlp.down_proj.weight", state[f"{ours}down_DF"]
    yield "model.norm.weight", state["final_norm_D"]
    if not config.tied_embeddings:
        yield "lm_head.weight", state["separate_head_VD"]


def from_huggingface(config: schema.Model, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The Decoder's state dict from the class's, in the dtypes that it has."""
    C = shape(config).head_width
    state = {"embedding_VD": weights["model.embed_tokens.weight"], "final_norm_D": weights["model.norm.weight"]}
    if not config.tied_embeddings:
        state["separate_head_VD"] = weights["lm_head.weight"]
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        q_KGCD, k_K1CD, v_K1CD = (
            weights[f"{theirs}self_attn.{one}_proj.weight"].view(config.kv_heads, -1, C, config.width) for one in "qkv"
        )
        state[f"{ours}qkv_KXCD"] = torch.cat((q_KGCD, k_K1CD, v_K1CD), dim=1)
        gate_FD, up_FD = weights[f"{theirs}mlp.gate_proj.weight"], weights[f"{theirs}mlp.up_proj.weight"]
        state[f"{ours}gate_up_2FD"] = torch.stack((gate_FD, up_FD))
        state[f"{ours}attention_norm_D"] = weights[f"{theirs}input_layernorm.weight"]
        if config.qk_norm:
            state[f"{ours}query_norm_C"] = weights[f"{theirs}self_attn.q_norm.weight"]
            state[f"{ours}key_norm_C"] = weights[f"{theirs}self_attn.k_norm.weight"]
        state[f"{ours}out_DHC"] = weights[f"{theirs}self_attn.o_proj.weight"]
        state[f"{ours}feed_forward_norm_D"] = weights[f"{theirs}post_attention_layernorm.weight"]
        state[f"{ours}down_DF"] = weights[f"{theirs}mlp.down_proj.weight"]
    return state


def export_huggingface(
    folder: Path,
    config: schema.Model,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    *,
    dtype: torch.dtype = torch.float32,
    provenance: str = "",
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
    """Write a folder that `AutoModelForCausalLM` and `AutoTokenizer` load; gives its files.

    `state` is the Decoder's state dict; `provenance` a sentence for the model card. The folder appears whole or not at
    all. One that holds files is refused (UsageError) unless `force`: then the export replaces the model in it, and
    the rest stays. RunError when the disk is full, with what was there as it was.
    """
    name = architecture(config)
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not force)):
        raise UsageError(f"{folder}: is not empty; choose another folder, or add --force to replace the model in it")
    draft = folder.absolute().with_name(f".{folder.absolute().name}.{secrets.token_hex(6)}.tmp")
    try:
        draft.mkdir(parents=True)
        _write_weights(draft, to_huggingface(config, state), dtype, shard_bytes)
        for file, content in _documents(name, config, state, tokenizer, dtype, provenance).items():
            atomic_write(draft / file, content)
        written = sorted(path.name for path in draft.iterdir())
        if folder.exists() and any(folder.iterdir()):
            _replace(folder, draft)
        else:
            draft.rename(folder)
    except (OSError, SafetensorError) as error:
        raise write_failure(folder, error) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return [folder / name for name in written]


def load_huggingface(folder: Path) -> tuple[schema.Model, dict[str, Tensor]]:
    """The recipe's `model` section and the Decoder's state dict, in the file's dtypes, of a Llama or Qwen3 folder.

    UsageError where the folder holds another kind of model, RunError where its files are damaged.
    """
    config = read_model(folder)
    weights = _read_weights(folder)
    with torch.device("meta"):
        expected = dict(to_huggingface(config, Decoder(config).state_dict()))
    strange = [key for key in weights if key not in expected and not key.endswith(COMPUTED)]
    # A tied model's file may hold the head all the same.
    strange = [key for key in strange if not (config.tied_embeddings and key == "lm_head.weight")]
    for key, like in expected.items():
        if key not in weights:
            raise UsageError(f"{folder}: has no tensor {key!r}, which its config.json asks for")
        if weights[key].shape != like.shape:
            found, wanted = tuple(weights[key].shape), tuple(like.shape)
            raise UsageError(f"{folder}: {key!r} has the shape {found} where its config.json says {wanted}")
    if strange:
        raise UsageError(f"{folder}: holds {strange[0]!r}, which this decoder has no place for")
    return config, from_huggingface(config, weights)


def read_model(folder: Path) -> schema.Model:
    """The recipe's `model` section from a folder's config.json. UsageError where the decoder cannot express it."""
    file = folder / "config.json"
    found = read_json(file)
    if not isinstance(found, dict):
        raise UsageError(f"{file}: is missing; a Hugging Face folder holds config.json and model.safetensors")
    kind = found.get("model_type")
    if kind not in ("llama", "qwen3"):
        raise UsageError(f"{file}: model_type is {kind!r}; llama and qwen3 can be read")
    for key, only in PLAIN.items():
        if found.get(key, only) != only:
            raise UsageError(f"{file}: {key} = {found[key]!r} has no place in this decoder, which has {only!r}")
    rotary = found.get("rope_parameters") or {}
    scaling = found.get("rope_scaling") or rotary
    if (
        scaling.get("rope_type", scaling.get("type", "default")) != "default"
        or rotary.get("partial_rotary_factor", 1.0) != 1.0
    ):
        raise UsageError(f"{file}: its rotary embedding is scaled ({scaling}), which this decoder does not do")
    defaults = {
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048 if kind == "llama" else 32768,
    }
    found = {**defaults, **found}
    try:
        heads = int(found["num_attention_heads"])
        return schema.Model(
            layers=int(found["num_hidden_layers"]),
            width=int(found["hidden_size"]),
            heads=heads,
            kv_heads=int(found.get("num_key_value_heads") or heads),
            head_width=int(found.get("head_dim") or (128 if kind == "qwen3" else int(found["hidden_size"]) // heads)),
            hidden=int(found["intermediate_size"]),
            vocabulary=int(found["vocab_size"]),
            context=int(found["max_position_embeddings"]),
            tied_embeddings=bool(found["tie_word_embeddings"]),
            qk_norm=kind == "qwen3",
            rope_base=float(rotary.get("rope_theta") or found.get("rope_theta") or 10_000.0),
            softcap=0.0,
            norm_epsilon=float(found["rms_norm_eps"]),
        )
    except KeyError as error:
        raise UsageError(f"{file}: has no {error.args[0]!r}") from error


def _write_weights(folder: Path, tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype, shard_bytes: int) -> None:
    """One file, or shards with their index."""
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = held = 0

    def flush() -> None:
        path = folder / f"part-{len(shards)}"
        save_file(shard, path, metadata={"format": "pt"})
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        size = tensor.numel() * dtype.itemsize
        if shard and held + size > shard_bytes:
            flush()
            held = 0
        # A copy, since safetensors refuses tensors that share memory; one shard at a time stands twice in memory.
        shard[name] = tensor.detach().to("cpu", dtype, copy=True).contiguous()
        held += size
        total += size
    flush()
    if len(shards) == 1:
        (folder / "part-0").rename(folder / WEIGHTS)
        return
    files = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    for number, file in enumerate(files):
        (folder / f"part-{number}").rename(folder / file)
    places = {name: file for names, file in zip(shards, files, strict=True) for name in names}
    atomic_write(folder / INDEX, _json({"metadata": {"total_size": total}, "weight_map": places}))


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files, in their dtypes."""
    index = None if (folder / WEIGHTS).is_file() else read_json(folder / INDEX)
    if index is None and not (folder / WEIGHTS).is_file():
        raise UsageError(f"{folder}: has no {WEIGHTS}; weights in other formats are not read, since they can run code")
    files = [WEIGHTS] if index is None else sorted(set(index["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for name in files:
        try:
            with safe_open(folder / name, framework="pt") as file:
                weights |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise RunError(f"{folder / name}: is missing or damaged ({error}); fetch it again") from error
    return weights


def _replace(folder: Path, draft: Path) -> None:
    """Move the draft's files over a folder's. Until config.json lands, last of all, nothing there loads as a model."""
    for old in [folder / "config.json", *folder.glob("model*.safetensors"), folder / INDEX]:
        with suppress(FileNotFoundError):
            old.unlink()
    for new in sorted(draft.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(new, folder / new.name)


def _documents(
    name: str,
    config: schema.Model,
    state: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    provenance: str,
) -> dict[str, str]:
    """Every file but the weights, by name."""
    derived = shape(config)
    names = {id_: token for token, id_ in tokenizer.special.items()}
    specials = {
        "bos_token": names[tokenizer.begin],
        "eos_token": names[tokenizer.end],
        "pad_token": names[tokenizer.pad],
    }
    ids = {"bos_token_id": tokenizer.begin, "eos_token_id": tokenizer.end, "pad_token_id": tokenizer.pad}
    return {
        "config.json": _json(
            {
                "architectures": [name],
                "model_type": name.removesuffix("ForCausalLM").lower(),
                # Rows beyond the tokenizer's ids stay: they are the model's, and a product reads best at round sizes.
                "vocab_size": state["embedding_VD"].size(0),
                "hidden_size": config.width,
                "intermediate_size": derived.hidden,
                "num_hidden_layers": config.layers,
                "num_attention_heads": config.heads,
                "num_key_value_heads": config.kv_heads,
                "head_dim": derived.head_width,
                "max_position_embeddings": config.context,
                "tie_word_embeddings": config.tied_embeddings,
                "rms_norm_eps": config.norm_epsilon,
                # transformers before 5 reads the first two, since then the third.
                "rope_theta": config.rope_base,
                "rope_scaling": None,
                "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
                "hidden_act": "silu",
                "attention_bias": False,
                "attention_dropout": 0.0,
                "torch_dtype": str(dtype).removeprefix("torch."),
                **ids,
            }
        ),
        "generation_config.json": _json(ids),
        "tokenizer.json": _tokenizer_json(tokenizer),
        "tokenizer_config.json": _json(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **specials,
                "model_max_length": config.context,
                "clean_up_tokenization_spaces": False,
                # Text that spells a special token stays text, as in training.
                "split_special_tokens": True,
            }
        ),
        "special_tokens_map.json": _json(specials),
        "README.md": _card(name, config, state, specials, provenance),
    }


def _tokenizer_json(tokenizer: Tokenizer) -> str:
    """The tokenizer with a step that begins each text as every document in training began."""
    description = json.loads(tokenizer.to_json())
    begin = next(token for token, id_ in tokenizer.special.items() if id_ == tokenizer.begin)

    def piece(sequence: str, type_id: int) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": begin, "type_id": type_id}}, {"Sequence": {"id": sequence, "type_id": type_id}}]

    description["post_processor"] = {
        "type": "TemplateProcessing",
        "single": piece("A", 0),
        "pair": [*piece("A", 0), *piece("B", 1)],
        "special_tokens": {begin: {"id": begin, "ids": [tokenizer.begin], "tokens": [begin]}},
    }
    return _json(description)


def _card(
    name: str, config: schema.Model, state: Mapping[str, Tensor], specials: Mapping[str, str], provenance: str
) -> str:
    """A model card that says what is known, and no more."""
    count = sum(tensor.numel() for tensor in state.values())
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {count / 1e6:,.1f}M-parameter language model

{provenance or "Trained with calledshot."}

A base model: it continues text. `{name}`, {count:,} parameters, {config.layers} layers, width {config.width},
context {config.context} tokens.

Every document in training began with `{specials["bos_token"]}` and ended with `{specials["eos_token"]}`. The tokenizer
adds the first of the two; text that spells a special token is read as text.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=64)[0]))
```
"""


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
