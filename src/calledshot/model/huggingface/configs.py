"""config.json of the classes, in and out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from calledshot.model.positions import (
    LLAMA3_FAST,
    LLAMA3_SLOW,
    RELATIVE_BUCKETS,
    RELATIVE_DISTANCE,
    YARN_FAST,
    YARN_SLOW,
    raised_base,
    yarn_attention,
)
from calledshot.recipe import UsageError, schema, shape
from calledshot.recipe.export import CLASSES, T5_FEED_FORWARDS, export_kind
from calledshot.rundir import read_json

OWN: dict[str, dict[str, Any]] = {
    "yarn": {"beta_fast": YARN_FAST, "beta_slow": YARN_SLOW, "truncate": True, "mscale": None},
    "llama3": {"low_freq_factor": LLAMA3_SLOW, "high_freq_factor": LLAMA3_FAST},
}
"""Ways of scaling RoPE that are the same there and here, with the settings that are fixed here."""

KINDS = {"llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3-moe", "mixtral": "mixtral", "t5": "t5"}
"""Ours by `model_type`."""

PLAIN: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "pretraining_tp": 1,
    "decoder_sparse_step": 1,
    "relative_attention_num_buckets": RELATIVE_BUCKETS,
    "relative_attention_max_distance": RELATIVE_DISTANCE,
}
"""What a configuration that says otherwise describes is not this decoder."""

COUNTS = (
    *("hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "num_experts", "num_local_experts", "num_experts_per_tok", "vocab_size"),
    *("max_position_embeddings", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads"),
    "n_positions",
)
"""Keys of a configuration that count something."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "qwen3": {"max_position_embeddings": 32768, "head_dim": 128},
    "qwen3-moe": {
        "max_position_embeddings": 32768, "num_key_value_heads": 4, "num_local_experts": 128, "num_experts_per_tok": 8,
        "moe_intermediate_size": 768, "norm_topk_prob": False,
    },
    "mixtral": {
        "max_position_embeddings": 131072, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    },
    "t5": {"d_kv": 64, "n_positions": 512, "feed_forward_proj": "relu", "layer_norm_epsilon": 1e-6},
}  # fmt: skip
"""What the classes take where config.json says nothing."""


def written_config(
    config: schema.Model, vocabulary: int, ids: Mapping[str, int], begin: int, dtype: torch.dtype
) -> dict[str, Any]:
    """config.json of the class that a model fits, with `vocabulary` rows and the `ids` of special tokens."""
    kind, derived = export_kind(config), shape(config)
    name = CLASSES[kind]
    common = {
        "architectures": [name],
        "model_type": next(theirs for theirs, ours in KINDS.items() if ours == kind),
        # Rows beyond the tokenizer's ids stay: they are the model's, and a product reads best at round sizes.
        "vocab_size": vocabulary,
    }
    closing = {"torch_dtype": str(dtype).removeprefix("torch."), **ids}
    if kind == "t5":
        return {
            **common,
            "d_model": config.width,
            "d_kv": derived.head_width,
            "d_ff": derived.hidden,
            "num_layers": derived.encoder_layers,
            "num_decoder_layers": config.layers,
            "num_heads": config.heads,
            "n_positions": config.context,
            "relative_attention_num_buckets": RELATIVE_BUCKETS,
            "relative_attention_max_distance": RELATIVE_DISTANCE,
            "feed_forward_proj": T5_FEED_FORWARDS[config.feed_forward],
            "layer_norm_epsilon": config.norm_epsilon,
            "dropout_rate": 0.0,
            "is_encoder_decoder": True,
            # With true, transformers would divide the logits by the root of the width.
            "tie_word_embeddings": False,
            "decoder_start_token_id": begin,
            # Its cache has as many layers as the encoder (transformers 5.23): a deeper decoder would crash with it.
            "use_cache": config.layers <= derived.encoder_layers,
            **closing,
        }
    rotary = _rotary(config, derived.head_width)
    sparse: dict[str, Any] = {}
    if kind == "qwen3-moe":
        sparse = {
            "num_experts": config.experts,
            "num_experts_per_tok": config.top_k,
            "moe_intermediate_size": derived.expert_hidden,
            "norm_topk_prob": config.renormalize,
            "decoder_sparse_step": 1,
            "mlp_only_layers": list(range(config.dense_layers)),
        }
    elif kind == "mixtral":
        sparse = {"num_local_experts": config.experts, "num_experts_per_tok": config.top_k, "sliding_window": None}
    if config.experts:
        sparse["router_aux_loss_coef"] = config.balance_weight if config.balance == "auxiliary" else 0.0
    return {
        **common,
        "hidden_size": config.width,
        "intermediate_size": derived.expert_hidden if kind == "mixtral" else derived.hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": derived.head_width,
        **sparse,
        "max_position_embeddings": config.context,
        "tie_word_embeddings": config.tied_embeddings,
        "rms_norm_eps": config.norm_epsilon,
        # transformers before 5 reads the first two, since then the third.
        "rope_theta": rotary["rope_theta"],
        "rope_scaling": None
        if rotary["rope_type"] == "default"
        else {key: value for key, value in rotary.items() if key != "rope_theta"},
        "rope_parameters": rotary,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        **closing,
    }


def _rotary(config: schema.Model, width: int) -> dict[str, Any]:
    """`rope_parameters`. Their "dynamic" changes with the length at hand, ours does not: as NTK it is a base."""
    theta = raised_base(config, width)
    if config.rope_scaling not in OWN:
        return {"rope_type": "default", "rope_theta": theta}
    written = {
        "rope_type": config.rope_scaling,
        "rope_theta": theta,
        "factor": config.rope_factor,
        "original_max_position_embeddings": config.rope_original_context,
    }
    return written | (OWN["llama3"] if config.rope_scaling == "llama3" else {})


def read_model(folder: Path) -> schema.Model:
    """The recipe's `model` section from a folder's config.json. UsageError where the trunk cannot express it.

    Whether T5's head is tied only its weights say (`load_huggingface`).
    """
    file = folder / "config.json"
    found = read_config(folder)
    kind = KINDS.get(str(found.get("model_type")))
    if kind is None:
        raise UsageError(f"{file}: model_type is {found.get('model_type')!r}; {', '.join(KINDS)} can be read")
    for key, only in PLAIN.items():
        if found.get(key, only) != only:
            raise UsageError(f"{file}: {key} = {found[key]!r} has no place in this trunk, which has {only!r}")
    found = {**DEFAULTS[kind], **{key: value for key, value in found.items() if value is not None}}
    for key in COUNTS:
        if key in found and not (type(found[key]) is int and found[key] > 0):
            raise UsageError(f"{file}: {key} = {found[key]!r} is not a whole number above 0")
    try:
        return _t5(file, found) if kind == "t5" else _decoder(file, found, kind)
    except KeyError as error:
        raise UsageError(f"{file}: has no {error.args[0]!r}") from error
    except (TypeError, ValueError) as error:
        raise UsageError(f"{file}: a value is not what it should be ({error})") from error


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json. UsageError where there is none."""
    found = read_json(folder / "config.json")
    if not isinstance(found, dict):
        what = "is missing" if found is None else "is no JSON object"
        raise UsageError(
            f"{folder / 'config.json'}: {what}; a Hugging Face folder holds config.json and model.safetensors"
        )
    return found


def _decoder(file: Path, found: Mapping[str, Any], kind: str) -> schema.Model:
    heads, width = int(found["num_attention_heads"]), int(found["hidden_size"])
    if found.get("sliding_window") and kind == "mixtral":
        raise UsageError(f"{file}: sliding_window = {found['sliding_window']} has no place in this trunk")
    sparse: dict[str, Any] = {}
    rotary = _read_rotary(file, found)
    if kind == "qwen3-moe":
        dense = sorted(found.get("mlp_only_layers", []))
        if dense != list(range(len(dense))):
            raise UsageError(f"{file}: mlp_only_layers = {dense}: dense layers have a place at the beginning alone")
        sparse = {
            # transformers 5 calls them local, as Mixtral does.
            "experts": int(found.get("num_experts", found["num_local_experts"])),
            "top_k": int(found["num_experts_per_tok"]),
            "expert_hidden": int(found["moe_intermediate_size"]),
            "renormalize": bool(found["norm_topk_prob"]),
            "dense_layers": len(dense),
        }
    elif kind == "mixtral":
        sparse = {
            "experts": int(found["num_local_experts"]),
            "top_k": int(found["num_experts_per_tok"]),
            "expert_hidden": int(found["intermediate_size"]),
        }
    if sparse:
        weight = float(found.get("router_aux_loss_coef", 1e-3))
        sparse |= {"balance_weight": weight} if weight else {"balance": "none"}
    return schema.Model(
        layers=int(found["num_hidden_layers"]),
        width=width,
        heads=heads,
        kv_heads=int(found.get("num_key_value_heads", heads)),
        head_width=int(found.get("head_dim", width // heads)),
        hidden=int(found["intermediate_size"]),
        vocabulary=int(found["vocab_size"]),
        # What is "dynamic" there is fixed here, and computes the same up to where theirs begins to change.
        context=rotary["rope_original_context"]
        if rotary.get("rope_scaling") == "dynamic"
        else int(found["max_position_embeddings"]),
        tied_embeddings=bool(found.get("tie_word_embeddings", False)),
        qk_norm=kind.startswith("qwen3"),
        norm_epsilon=float(found.get("rms_norm_eps", 1e-6)),
        **rotary,
        **sparse,
    )


def _read_rotary(file: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's keys. Up to the length that it was trained at, "dynamic" is RoPE as it is, here and there."""
    rotary = found.get("rope_scaling") or found.get("rope_parameters") or {}
    if not isinstance(rotary, dict):
        raise UsageError(f"{file}: the settings of its rotary embedding are {rotary!r}, not a table")
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    base = float(rotary.get("rope_theta", found.get("rope_theta", 10_000.0)))
    if kind not in ("default", "dynamic", *OWN) or rotary.get("partial_rotary_factor", 1.0) != 1.0:
        raise UsageError(
            f"{file}: its rotary embedding ({rotary}) has no place in this trunk, which knows {' and '.join(OWN)}"
        )
    if kind == "default":
        return {"rope_base": base}
    context = int(found["max_position_embeddings"])
    original = int(rotary.get("original_max_position_embeddings") or context)
    factor = context / original if rotary.get("factor") is None else float(rotary["factor"])
    if not factor >= 1.0:
        raise UsageError(f"{file}: factor = {factor:g} of its {kind} stretches nothing: it must be at least 1")
    scaled = {"rope_base": base, "rope_scaling": kind, "rope_factor": factor, "rope_original_context": original}
    if kind == "dynamic":
        return scaled
    attention = yarn_attention(factor) if kind == "yarn" else 1.0
    if not math.isclose(float(rotary.get("attention_factor") or attention), attention):
        raise UsageError(f"{file}: attention_factor = {rotary['attention_factor']} of its {kind} has no place here")
    for key, only in OWN[kind].items():
        if rotary.get(key) not in (None, only):
            raise UsageError(f"{file}: {key} = {rotary[key]!r} of its {kind} has no place in this trunk, only {only!r}")
    return scaled


def _t5(file: Path, found: Mapping[str, Any]) -> schema.Model:
    feed_forwards = {theirs: ours for ours, theirs in T5_FEED_FORWARDS.items()}
    kind = found["feed_forward_proj"]
    if kind not in feed_forwards:
        raise UsageError(
            f"{file}: feed_forward_proj = {kind!r} has no place in this trunk, which has {', '.join(feed_forwards)}; "
            "T5 1.1 and later have the first"
        )
    layers, heads = int(found["num_layers"]), int(found["num_heads"])
    decoder_layers = int(found.get("num_decoder_layers", layers))
    return schema.Model(
        topology="encoder-decoder",
        layers=decoder_layers,
        encoder_layers=0 if decoder_layers == layers else layers,
        width=int(found["d_model"]),
        heads=heads,
        kv_heads=heads,
        head_width=int(found["d_kv"]),
        hidden=int(found["d_ff"]),
        feed_forward=feed_forwards[kind],
        vocabulary=int(found["vocab_size"]),
        context=int(found["n_positions"]),
        positions="t5",
        qk_norm=False,
        norm_epsilon=float(found["layer_norm_epsilon"]),
    )


def scales_logits(found: Mapping[str, Any]) -> bool:
    """Whether T5 divides the decoder's output by the root of its width, as the first T5 did. transformers 5 writes down
    that it ties, always, and the truth beside it."""
    return bool(found.get("scale_decoder_outputs", found.get("tie_word_embeddings", True)))
