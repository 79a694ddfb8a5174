"""One block of a stack: attention to its own tokens, perhaps to the encoder's, and a feed-forward.

Shapes, as suffixes: B batch, T target length, S source length, D width, H query heads, K key/value heads, G = H / K,
C head width, F hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from calledshot.model.activation import activate
from calledshot.model.attention import Seen, attend, attend_cached
from calledshot.model.collectives import Group, copy_to, gather_from, reduce_from
from calledshot.model.experts import Experts
from calledshot.model.float8 import float8_linear
from calledshot.model.packing import packed_linear
from calledshot.model.positions import rotate
from calledshot.model.routing import Auxiliary
from calledshot.recipe.derived import GATED, Shape, Stack

TENSOR_AXES = {
    "qkv_KXCD": 0, "out_DHC": 1, "cross_query_KGCD": 0, "cross_key_value_K2CD": 0, "cross_out_DHC": 1,
    "gate_up_2FD": 1, "up_FD": 0, "down_DF": 1,
}  # fmt: skip
"""Axes along which ranks of tensor parallelism share the parameters: each has some key heads with their query heads,
and a part of the hidden width. Those that are not named, each has whole."""


@dataclass(frozen=True)
class LayerCache:
    """What one layer reads and writes while it decodes."""

    keys_BKSC: Tensor
    values_BKSC: Tensor
    positions_BT: Tensor
    """Where the new keys and values go."""
    bias_BTS: Tensor | None = None
    """Of the scores over the cache; None where the rows begin here, and see no more than themselves."""
    head_bias_BHTS: Tensor | None = None
    """T5's."""


@dataclass(frozen=True)
class Crossing:
    """What a decoder's layer sees of the encoder: its output with a mask, or keys and values that are kept, where the
    output comes with them only to be kept.
    """

    encoded_BSD: Tensor | None = None
    seen: Seen | None = None
    keys_BKSC: Tensor | None = None
    values_BKSC: Tensor | None = None
    bias_BTS: Tensor | None = None


def keep_products() -> tuple[Any, Any]:
    """For `checkpoint`: what matrices, fused attention and other ranks gave is kept, and the rest computed again."""
    from torch._higher_order_ops.flex_attention import flex_attention

    aten, ours, group = torch.ops.aten, torch.ops.calledshot, torch.ops._c10d_functional
    kept = [
        aten.mm, aten._scaled_mm, ours.grouped_linear, aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention, group.all_reduce, group.all_gather_into_tensor, group.wait_tensor,
        ours.exchange_plan, ours.send_rows, ours.return_rows,
    ]  # fmt: skip
    return create_selective_checkpoint_contexts([flex_attention, *(each.default for each in kept)])


def normalize(x: Tensor, gain: Tensor, epsilon: float, kind: str) -> Tensor:
    """`rmsnorm` (Zhang and Sennrich 2019, arXiv 1910.07467) or `layernorm` (Ba et al. 2016, arXiv 1607.06450, without
    bias) over the last axis, in float32 inside.
    """
    wide = x.float()
    if kind == "layernorm":
        wide = wide - wide.mean(-1, keepdim=True)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * gain.float()).to(x.dtype)


class Block(nn.Module):
    """Branches, each normalized before and added to the stream, or as `norm_placement` has it."""

    def __init__(self, model: Shape, stack: Stack, *, sparse: bool = False) -> None:
        """`sparse` puts experts in the place of the feed-forward."""
        super().__init__()
        D, K, C, hidden = stack.width, stack.kv_heads, model.head_width, stack.hidden
        self.model, self.groups, self.epsilon = model, stack.heads // K, model.norm_epsilon
        self.kv_heads, self.head_width = K, C
        self.packed: dict[str, Tensor] | None = None
        self.checkpointing = "none"
        """What the backward computes again (`Decoder.checkpoint_blocks`)."""
        self.float8 = False
        """Whether the matrices are multiplied in float8 where gradients are taken."""
        self.tensor: Group | None = None
        """Ranks that have other parts of the matrices, for the same tokens."""
        self.context: Group | None = None
        """Ranks that have other tokens of the same rows."""
        sandwich = model.norm_placement == "sandwich"

        def gains(size: int, wanted: bool = True) -> nn.Parameter | None:
            return nn.Parameter(torch.empty(size)) if wanted else None

        self.attention_norm_D = nn.Parameter(torch.empty(D))
        self.qkv_KXCD = nn.Parameter(torch.empty(K, self.groups + 2, C, D))
        self.query_norm_C, self.key_norm_C = gains(C, model.qk_norm), gains(C, model.qk_norm)
        self.out_DHC = nn.Parameter(torch.empty(D, stack.heads * C))
        self.attention_post_norm_D = gains(D, sandwich)
        if stack.cross_width:
            self.cross_norm_D = nn.Parameter(torch.empty(D))
            self.cross_query_KGCD = nn.Parameter(torch.empty(K, self.groups, C, D))
            self.cross_key_value_K2CD = nn.Parameter(torch.empty(K, 2, C, stack.cross_width))
            self.cross_query_norm_C, self.cross_key_norm_C = gains(C, model.qk_norm), gains(C, model.qk_norm)
            self.cross_out_DHC = nn.Parameter(torch.empty(D, stack.heads * C))
            self.cross_post_norm_D = gains(D, sandwich)
        self.feed_forward_norm_D = nn.Parameter(torch.empty(D))
        self.experts = Experts(model, D) if sparse else None
        if not sparse and model.feed_forward in GATED:
            self.gate_up_2FD = nn.Parameter(torch.empty(2, hidden, D))
        elif not sparse:
            self.up_FD = nn.Parameter(torch.empty(hidden, D))
        if not sparse:
            self.down_DF = nn.Parameter(torch.empty(D, hidden))
        self.feed_forward_post_norm_D = gains(D, sandwich)

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        seen: Seen | None,
        crossing: Crossing | None = None,
        cache: LayerCache | None = None,
        real_BT: Tensor | None = None,
    ) -> tuple[Tensor, Auxiliary | None]:
        """(B, T, D) to (B, T, D), and what experts say beside it. `seen` may be None where the cache brings a bias;
        `real_BT` marks the tokens that experts' losses are of.
        """
        inputs = x_BTD, cos, sin, seen, crossing, cache, real_BT
        if self.checkpointing == "none" or not torch.is_grad_enabled():
            return self._branches(*inputs)
        selective = {"context_fn": keep_products} if self.checkpointing == "selective" else {}
        return checkpoint(self._branches, *inputs, use_reentrant=False, preserve_rng_state=False, **selective)

    def _branches(
        self,
        x_BTD: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        seen: Seen | None,
        crossing: Crossing | None,
        cache: LayerCache | None,
        real_BT: Tensor | None,
    ) -> tuple[Tensor, Auxiliary | None]:
        h_BTD = self._before(x_BTD, self.attention_norm_D)
        x_BTD = self._add(x_BTD, self._attention(h_BTD, cos, sin, seen, cache), "attention")
        if crossing is not None:
            h_BTD = self._before(x_BTD, self.cross_norm_D)
            x_BTD = self._add(x_BTD, self._cross_attention(h_BTD, crossing), "cross")
        h_BTD = self._before(x_BTD, self.feed_forward_norm_D)
        y_BTD, record = self._feed_forward(h_BTD) if self.experts is None else self.experts(h_BTD, real_BT)
        return self._add(x_BTD, y_BTD, "feed_forward"), record

    def _before(self, x_BTD: Tensor, gain_D: Tensor) -> Tensor:
        if self.model.norm_placement == "post":
            return x_BTD
        return normalize(x_BTD, gain_D, self.epsilon, self.model.norm)

    def _add(self, x_BTD: Tensor, branch_BTD: Tensor, name: str) -> Tensor:
        if self.model.norm_placement == "post":
            return normalize(x_BTD + branch_BTD, getattr(self, f"{name}_norm_D"), self.epsilon, self.model.norm)
        if self.model.norm_placement == "sandwich":
            branch_BTD = normalize(branch_BTD, getattr(self, f"{name}_post_norm_D"), self.epsilon, self.model.norm)
        return x_BTD + branch_BTD

    def _attention(
        self, h_BTD: Tensor, cos: Tensor | None, sin: Tensor | None, seen: Seen | None, cache: LayerCache | None
    ) -> Tensor:
        B, T, _ = h_BTD.shape
        qkv = self._linear(copy_to(h_BTD, self.tensor), "qkv_KXCD")
        q, k, v = qkv.view(B, T, self.kv_heads, -1, self.head_width).split((self.groups, 1, 1), dim=3)
        k, v = k.squeeze(3), v.squeeze(3)
        query_norm_C, key_norm_C = self._gains(self.query_norm_C, self.key_norm_C)
        if query_norm_C is not None and key_norm_C is not None:
            q = normalize(q, query_norm_C, self.epsilon, "rmsnorm")
            k = normalize(k, key_norm_C, self.epsilon, "rmsnorm")
        if cos is not None and sin is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            rows_B1 = torch.arange(B, device=h_BTD.device)[:, None]
            cache.keys_BKSC[rows_B1, :, cache.positions_BT] = k
            cache.values_BKSC[rows_B1, :, cache.positions_BT] = v
        elif self.context is not None:
            k, v = gather_from(torch.stack((k, v)), self.context, 2).unbind()
        if cache is not None and cache.bias_BTS is not None:
            y = attend_cached(q, cache.keys_BKSC, cache.values_BKSC, cache.bias_BTS, cache.head_bias_BHTS)
        else:
            assert seen is not None
            y = attend(q, k, v, seen)
        return reduce_from(self._linear(y.reshape(B, T, -1), "out_DHC"), self.tensor)

    def _gains(self, query_norm_C: Tensor | None, key_norm_C: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Gains of queries and keys, on their way to the heads of this rank."""
        if self.tensor is None or query_norm_C is None or key_norm_C is None:
            return query_norm_C, key_norm_C
        query_norm_C, key_norm_C = copy_to(torch.stack((query_norm_C, key_norm_C)), self.tensor).unbind()
        return query_norm_C, key_norm_C

    def _cross_attention(self, h_BTD: Tensor, crossing: Crossing) -> Tensor:
        B, T, _ = h_BTD.shape
        q = self._linear(copy_to(h_BTD, self.tensor), "cross_query_KGCD")
        q = q.view(B, T, self.kv_heads, self.groups, self.head_width)
        if self.cross_query_norm_C is not None:
            q = normalize(q, copy_to(self.cross_query_norm_C, self.tensor), self.epsilon, "rmsnorm")
        if crossing.bias_BTS is not None:
            assert crossing.keys_BKSC is not None and crossing.values_BKSC is not None
            if crossing.encoded_BSD is not None:
                k, v = self._cross_keys_values(crossing.encoded_BSD)
                S = k.size(1)
                crossing.keys_BKSC[:, :, :S], crossing.values_BKSC[:, :, :S] = k.transpose(1, 2), v.transpose(1, 2)
            y = attend_cached(q, crossing.keys_BKSC, crossing.values_BKSC, crossing.bias_BTS)
        else:
            assert crossing.encoded_BSD is not None and crossing.seen is not None
            k, v = self._cross_keys_values(crossing.encoded_BSD)
            y = attend(q, k, v, crossing.seen)
        return reduce_from(self._linear(y.reshape(B, T, -1), "cross_out_DHC"), self.tensor)

    def _cross_keys_values(self, encoded_BSD: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, S, K, C) of what the encoder gave."""
        kv = self._linear(copy_to(encoded_BSD, self.tensor), "cross_key_value_K2CD")
        k, v = kv.view(*encoded_BSD.shape[:2], self.kv_heads, 2, self.head_width).unbind(3)
        if self.cross_key_norm_C is not None:
            k = normalize(k, copy_to(self.cross_key_norm_C, self.tensor), self.epsilon, "rmsnorm")
        return k, v

    def _feed_forward(self, h_BTD: Tensor) -> tuple[Tensor, None]:
        kind = self.model.feed_forward
        first = "gate_up_2FD" if kind in GATED else "up_FD"
        inner_BTF = activate(self._linear(copy_to(h_BTD, self.tensor), first), kind)
        return reduce_from(self._linear(inner_BTF, "down_DF"), self.tensor), None

    def _linear(self, x: Tensor, name: str) -> Tensor:
        """`x` by a parameter, whose axes before the last are its rows; a sharded one may come as (rows, last axis)."""
        if self.packed is not None:
            return packed_linear(x, self.packed[name])
        weight = getattr(self, name)
        weight = weight.view(-1, weight.size(-1))
        return float8_linear(x, weight) if self.float8 and torch.is_grad_enabled() else F.linear(x, weight)


def stacked(model: Shape, stack: Stack) -> nn.ModuleList:
    """All blocks of a stack, in order."""
    sparse = [model.experts > 0 and number >= model.dense_layers for number in range(stack.layers)]
    return nn.ModuleList(Block(model, stack, sparse=each) for each in sparse)
