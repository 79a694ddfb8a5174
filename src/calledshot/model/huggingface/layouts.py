"""Where each tensor of a Hugging Face class stands in the Decoder's parameters, for both directions.

Shapes: K key/value heads, G query heads a key head, X = G + 2, H = K * G, C head width, D width, F hidden, E experts,
V vocabulary.

| ours | Llama, Qwen3, Qwen3-MoE, Mixtral | T5 |
|---|---|---|
| qkv_KXCD[:, :G], [:, G], [:, G + 1] | self_attn.q_proj, k_proj, v_proj | SelfAttention.q times sqrt(C), k, v |
| out_DHC | self_attn.o_proj | SelfAttention.o |
| cross_query_KGCD; cross_key_value_K2CD[:, 0], [:, 1] | | EncDecAttention.q times sqrt(C); k, v |
| gate_up_2FD[0], [1]; down_DF | mlp.gate_proj, up_proj; down_proj | DenseReluDense.wi_0, wi_1; wo |
| experts.router_ED | mlp.gate; Mixtral: block_sparse_moe.gate | |
| experts.gate_up_E2FD[e, 0], [e, 1] | mlp.experts.e.gate_proj, up_proj; experts.e.w1, w3 | |
| experts.down_EDF[e] | mlp.experts.e.down_proj; experts.e.w2 | |
| relative_bias_HR | | relative_attention_bias of layer 0, transposed |

Rows of q are those of query head k * G + g, and the rotary halves are laid out alike in both, so that but for T5's
queries nothing is computed and a round trip gives the same bytes. T5 does not divide its scores by sqrt(C): its queries
hold that, which is exact where C is a power of 4.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from calledshot.model.decoder import Decoder
from calledshot.recipe import schema, shape
from calledshot.recipe.derived import GATED
from calledshot.recipe.export import export_kind


@dataclass(frozen=True)
class Place:
    """One tensor of theirs."""

    theirs: str
    ours: str
    index: tuple[int | slice, ...] = ()
    """Of its part in our parameter."""
    scale: float = 1.0
    """What ours is multiplied by."""
    transposed: bool = False

    def part(self, parameter: Tensor) -> Tensor:
        """The view of our parameter that corresponds to theirs."""
        part = parameter[self.index]
        return part.T if self.transposed else part


def to_huggingface(config: schema.Model, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the class's state dict, from the Decoder's, one after the other; some are views."""
    for place in places(config):
        part = place.part(state[place.ours])
        matrix = part.flatten(0, -2) if part.dim() > 2 else part
        yield place.theirs, matrix if place.scale == 1.0 else matrix * place.scale
    if config.tied_embeddings and config.topology == "encoder-decoder":
        yield "lm_head.weight", state["embedding_VD"]  # transformers 5 takes its own for lost otherwise


def from_huggingface(config: schema.Model, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The Decoder's state dict from the class's, in the dtypes that it has; T5's queries in float32."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Decoder(config).state_dict().items()}
    parts: dict[str, list[Place]] = {}
    for place in places(config):
        parts.setdefault(place.ours, []).append(place)
    state = {}
    for ours, found in parts.items():
        first = weights[found[0].theirs]
        if len(found) == 1 and found[0] == Place(found[0].theirs, ours):
            state[ours] = first.view(shapes[ours])
            continue
        # What is scaled may have no value in the file's own dtype.
        dtype = torch.float32 if any(place.scale != 1.0 for place in found) else first.dtype
        whole = torch.empty(shapes[ours], dtype=dtype, device=first.device)
        for place in found:
            part = place.part(whole)
            part.copy_(weights[place.theirs].view(part.shape))
            if place.scale != 1.0:
                part.div_(place.scale)
        state[ours] = whole
    return state


def places(config: schema.Model) -> Iterator[Place]:
    """Every tensor of the class that the model fits, in the order of its files. UsageError where it fits none."""
    kind = export_kind(config)
    yield from _t5(config) if kind == "t5" else _decoder(config, kind)


def _decoder(config: schema.Model, kind: str) -> Iterator[Place]:
    groups = config.heads // config.kv_heads
    yield Place("model.embed_tokens.weight", "embedding_VD")
    for layer in range(config.layers):
        ours, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        yield Place(f"{theirs}input_layernorm.weight", f"{ours}attention_norm_D")
        for name, part in (("q", slice(groups)), ("k", groups), ("v", groups + 1)):
            yield Place(f"{theirs}self_attn.{name}_proj.weight", f"{ours}qkv_KXCD", (slice(None), part))
        if config.qk_norm:
            yield Place(f"{theirs}self_attn.q_norm.weight", f"{ours}query_norm_C")
            yield Place(f"{theirs}self_attn.k_norm.weight", f"{ours}key_norm_C")
        yield Place(f"{theirs}self_attn.o_proj.weight", f"{ours}out_DHC")
        yield Place(f"{theirs}post_attention_layernorm.weight", f"{ours}feed_forward_norm_D")
        if config.experts and layer >= config.dense_layers:
            yield from _experts(config, kind, f"{theirs}{'block_sparse_moe' if kind == 'mixtral' else 'mlp'}.", ours)
        else:
            yield Place(f"{theirs}mlp.gate_proj.weight", f"{ours}gate_up_2FD", (0,))
            yield Place(f"{theirs}mlp.up_proj.weight", f"{ours}gate_up_2FD", (1,))
            yield Place(f"{theirs}mlp.down_proj.weight", f"{ours}down_DF")
    yield Place("model.norm.weight", "final_norm_D")
    if not config.tied_embeddings:
        yield Place("lm_head.weight", "separate_head_VD")


def _experts(config: schema.Model, kind: str, theirs: str, ours: str) -> Iterator[Place]:
    gate, up, down = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    yield Place(f"{theirs}gate.weight", f"{ours}experts.router_ED")
    for expert in range(config.experts):
        yield Place(f"{theirs}experts.{expert}.{gate}.weight", f"{ours}experts.gate_up_E2FD", (expert, 0))
        yield Place(f"{theirs}experts.{expert}.{up}.weight", f"{ours}experts.gate_up_E2FD", (expert, 1))
        yield Place(f"{theirs}experts.{expert}.{down}.weight", f"{ours}experts.down_EDF", (expert,))


def _t5(config: schema.Model) -> Iterator[Place]:
    found = shape(config)
    scale = 1.0 / math.sqrt(found.head_width)
    every = slice(None)
    yield Place("shared.weight", "embedding_VD")
    for stack, layers, prefix in (("encoder", found.encoder_layers, "encoder."), ("decoder", found.layers, "")):
        for layer in range(layers):
            ours, theirs = f"{prefix}blocks.{layer}.", f"{stack}.block.{layer}.layer."
            attention = f"{theirs}0.SelfAttention."
            yield Place(f"{attention}q.weight", f"{ours}qkv_KXCD", (every, slice(1)), scale)
            yield Place(f"{attention}k.weight", f"{ours}qkv_KXCD", (every, 1))
            yield Place(f"{attention}v.weight", f"{ours}qkv_KXCD", (every, 2))
            yield Place(f"{attention}o.weight", f"{ours}out_DHC")
            if layer == 0:
                bias = f"{attention}relative_attention_bias.weight"
                yield Place(bias, f"{prefix}relative_bias_HR", transposed=True)
            yield Place(f"{theirs}0.layer_norm.weight", f"{ours}attention_norm_D")
            if stack == "decoder":
                attention = f"{theirs}1.EncDecAttention."
                yield Place(f"{attention}q.weight", f"{ours}cross_query_KGCD", (), scale)
                yield Place(f"{attention}k.weight", f"{ours}cross_key_value_K2CD", (every, 0))
                yield Place(f"{attention}v.weight", f"{ours}cross_key_value_K2CD", (every, 1))
                yield Place(f"{attention}o.weight", f"{ours}cross_out_DHC")
                yield Place(f"{theirs}1.layer_norm.weight", f"{ours}cross_norm_D")
            last = f"{theirs}{1 if stack == 'encoder' else 2}."
            if config.feed_forward in GATED:
                yield Place(f"{last}DenseReluDense.wi_0.weight", f"{ours}gate_up_2FD", (0,))
                yield Place(f"{last}DenseReluDense.wi_1.weight", f"{ours}gate_up_2FD", (1,))
            else:
                yield Place(f"{last}DenseReluDense.wi.weight", f"{ours}up_FD")
            yield Place(f"{last}DenseReluDense.wo.weight", f"{ours}down_DF")
            yield Place(f"{last}layer_norm.weight", f"{ours}feed_forward_norm_D")
        yield Place(f"{stack}.final_layer_norm.weight", f"{prefix}final_norm_D")
    if not config.tied_embeddings:
        yield Place("lm_head.weight", "separate_head_VD")
