"""The Noam decoder: RMSNorm, SwiGLU, grouped-query attention with QK-norm, RoPE, no biases.

Shapes, as suffixes: B batch, T target length, S source length, D width, H query heads, K key/value heads, G = H / K,
C head width, F hidden, V vocabulary.

Parameters are stored so that the last two axes are always one matrix and the axes before it a batch of independent ones
(heads, the two halves of the gate): Muon orthogonalises the last two axes, tensor parallelism shards the first.

| parameter | shape | initialised |
|---|---|---|
| embedding_VD | (V, D) | normal, 1 (tied: D ** -0.75) |
| blocks.N.qkv_KXCD | (K, G + 2, C, D) | normal, 1 / sqrt(D); per key head its G query heads, then key, then value |
| blocks.N.out_DHC | (D, H * C) | zero |
| blocks.N.gate_up_2FD | (2, F, D) | normal, 1 / sqrt(D) |
| blocks.N.down_DF | (D, F) | zero |
| head_VD, unless tied | (V, D) | zero |
| gains | (D,) or (C,) | one |

Zero at the ends of the branches and at a head of its own makes the first logits uniform at every width and depth, and
leaves the growth to the learning rates, which transfer (`recipe.transfer`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calledshot.model.attention import attend, attend_cached, rotary, rotate
from calledshot.model.loss import cap, chunked_cross_entropy, token_losses
from calledshot.model.packing import can_pack, pack, packed_linear
from calledshot.recipe import schema, shape


@dataclass(frozen=True)
class Cache:
    """Keys and values of what was read so far: per layer (B, K, S, C). A row holds positions 0, 1, 2, ... in order.

    What lies behind a row's last written position is never seen, since a query sees positions up to its own.
    """

    keys: list[Tensor]
    values: list[Tensor]

    @property
    def rows(self) -> int:
        return self.keys[0].size(0)

    @property
    def capacity(self) -> int:
        return self.keys[0].size(2)

    def part(self, rows: slice, capacity: int) -> Cache:
        """A view of some rows, up to `capacity` positions of each."""
        keys, values = ([each[rows, :, :capacity] for each in layers] for layers in (self.keys, self.values))
        return Cache(keys, values)

    def copy_from(self, other: Cache) -> None:
        """Take over what `other` holds, as far as both reach."""
        rows, capacity = min(self.rows, other.rows), min(self.capacity, other.capacity)
        for mine, theirs in zip((*self.keys, *self.values), (*other.keys, *other.values), strict=True):
            mine[:rows, :, :capacity] = theirs[:rows, :, :capacity]


def rms_norm(x: Tensor, gain: Tensor, epsilon: float) -> Tensor:
    """Root-mean-square normalisation over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467), in float32
    inside.
    """
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon) * gain.float()).to(x.dtype)


class Block(nn.Module):
    """Attention and feed-forward, each normalised before and added to the stream."""

    def __init__(self, config: schema.Model) -> None:
        super().__init__()
        derived = shape(config)
        D, K, C, hidden = config.width, config.kv_heads, derived.head_width, derived.hidden
        self.groups, self.epsilon = config.heads // K, config.norm_epsilon
        self.blocked_attention = True
        self.packed: dict[str, Tensor] | None = None
        self.attention_norm_D = nn.Parameter(torch.empty(D))
        self.qkv_KXCD = nn.Parameter(torch.empty(K, self.groups + 2, C, D))
        self.query_norm_C = nn.Parameter(torch.empty(C)) if config.qk_norm else None
        self.key_norm_C = nn.Parameter(torch.empty(C)) if config.qk_norm else None
        self.out_DHC = nn.Parameter(torch.empty(D, config.heads * C))
        self.feed_forward_norm_D = nn.Parameter(torch.empty(D))
        self.gate_up_2FD = nn.Parameter(torch.empty(2, hidden, D))
        self.down_DF = nn.Parameter(torch.empty(D, hidden))

    def forward(
        self,
        x_BTD: Tensor,
        cos: Tensor,
        sin: Tensor,
        documents_BT: Tensor | None = None,
        cache: tuple[Tensor, Tensor, Tensor, Tensor | None] | None = None,
    ) -> Tensor:
        """(B, T, D) to (B, T, D). `cache` is this layer's keys and values, where to write, and the bias of the scores
        over them (B, T, S); without a bias the rows begin here, and see no more than themselves.
        """
        B, T, _ = x_BTD.shape
        K, X, C, _ = self.qkv_KXCD.shape
        h_BTD = rms_norm(x_BTD, self.attention_norm_D, self.epsilon)
        qkv_BTKXC = self._linear(h_BTD, "qkv_KXCD").view(B, T, K, X, C)
        q, k, v = qkv_BTKXC.split((self.groups, 1, 1), dim=3)
        k, v = k.squeeze(3), v.squeeze(3)
        if self.query_norm_C is not None and self.key_norm_C is not None:
            q = rms_norm(q, self.query_norm_C, self.epsilon)
            k = rms_norm(k, self.key_norm_C, self.epsilon)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        bias_BTS = None
        if cache is not None:
            keys_BKSC, values_BKSC, positions_BT, bias_BTS = cache
            rows_B1 = torch.arange(B, device=x_BTD.device)[:, None]
            keys_BKSC[rows_B1, :, positions_BT] = k
            values_BKSC[rows_B1, :, positions_BT] = v
        if cache is None or bias_BTS is None:
            y = attend(q, k, v, documents_BT, blocked=self.blocked_attention)
        else:
            y = attend_cached(q, keys_BKSC, values_BKSC, bias_BTS)
        x_BTD = x_BTD + self._linear(y.reshape(B, T, -1), "out_DHC")
        h_BTD = rms_norm(x_BTD, self.feed_forward_norm_D, self.epsilon)
        gate_BTF, up_BTF = self._linear(h_BTD, "gate_up_2FD").chunk(2, -1)
        return x_BTD + self._linear(F.silu(gate_BTF) * up_BTF, "down_DF")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        """`x` by a parameter, whose axes before the last are its rows."""
        if self.packed is not None:
            return packed_linear(x, self.packed[name])
        weight = getattr(self, name)
        return F.linear(x, weight.view(-1, weight.size(-1)))


class Decoder(nn.Module):
    """The decoder as `recipe.model` describes it, made on the default device, not yet initialised (`initialise`)."""

    def __init__(self, config: schema.Model) -> None:
        super().__init__()
        self.config, self.derived = config, shape(config)
        self.embedding_VD = nn.Parameter(torch.empty(self.derived.vocabulary, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm_D = nn.Parameter(torch.empty(config.width))
        self.separate_head_VD = (
            None if config.tied_embeddings else nn.Parameter(torch.empty(self.derived.vocabulary, config.width))
        )
        self.compiled = False
        self.packed_head: Tensor | None = None

    @property
    def head_VD(self) -> Tensor:
        return self.embedding_VD if self.separate_head_VD is None else self.separate_head_VD

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Fill all parameters in place, in float32, from one generator on their device (table at the top of the
        file).
        """
        for name, parameter in self.named_parameters():
            kind = name.rpartition(".")[2]
            if kind == "embedding_VD":
                scale = self.config.width**-0.75 if self.config.tied_embeddings else 1.0
                parameter.normal_(0.0, scale, generator=generator)
            elif kind in ("qkv_KXCD", "gate_up_2FD"):
                parameter.normal_(0.0, self.config.width**-0.5, generator=generator)
            elif kind in ("out_DHC", "down_DF", "separate_head_VD"):
                parameter.zero_()
            else:
                parameter.fill_(1.0)

    def compile_blocks(self) -> None:
        """Compile each block (one graph serves all) and the loss. Whole-model compilation took 58 to 115 s here, this
        20 to 45.
        """
        for block in self.blocks:
            block.compile(dynamic=False)
        self.compiled = True

    def hidden_states(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Normalised states (B, T, D) before the head. `tokens_BT` int; positions default to 0, 1, 2, ...

        With a cache, the new keys and values are written at `positions_BT` and everything up to a token's own position
        is seen; without positions its rows begin anew. `documents_BT` must be None then.
        """
        begins = positions_BT is None
        if positions_BT is None:
            positions_BT = torch.arange(tokens_BT.size(1), device=tokens_BT.device)[None].expand_as(tokens_BT)
        x_BTD = F.embedding(tokens_BT, self.embedding_VD)
        cos, sin = rotary(positions_BT, self.derived.head_width, self.config.rope_base)
        if cache is None:
            # Compiled code is for training: without gradients each new shape would be compiled once more.
            for block in self.blocks:
                x_BTD = (block if torch.is_grad_enabled() else block.forward)(x_BTD, cos, sin, documents_BT)
        else:
            bias_BTS = None
            if not begins:
                position_S = torch.arange(cache.capacity, device=tokens_BT.device)
                bias_BTS = torch.zeros_like(cos[..., :1]).where(position_S <= positions_BT[..., None], -torch.inf)
            for block, keys, values in zip(self.blocks, cache.keys, cache.values, strict=True):
                x_BTD = block.forward(x_BTD, cos, sin, None, (keys, values, positions_BT, bias_BTS))
        return rms_norm(x_BTD, self.final_norm_D, self.config.norm_epsilon)

    @torch.no_grad()
    def packed(self) -> Decoder:
        """A copy for generation on x86 CPUs, which shares the parameters and holds each matrix once more, in the order
        that oneDNN's products want; elsewhere the model itself.

        Later changes of the parameters do not reach it. With one row a product takes half as long as from the
        parameter, with 32 rows 0.8 (bfloat16) or 0.4 (float32) of its time.
        """
        if not can_pack(self.embedding_VD):
            return self
        with torch.device("meta"):
            twin = Decoder(self.config)
        twin.load_state_dict(self.state_dict(), assign=True)
        twin.requires_grad_(False).eval()
        for block, original in zip(twin.blocks, self.blocks, strict=True):
            block.blocked_attention = original.blocked_attention
            matrices = {name: each for name, each in block.named_parameters() if each.dim() > 1}
            block.packed = {name: pack(each.view(-1, each.size(-1))) for name, each in matrices.items()}
        twin.packed_head = pack(twin.head_VD)
        return twin

    @torch.no_grad()
    def activation_scales(self, tokens_BT: Tensor, positions_BT: Tensor, documents_BT: Tensor) -> dict[str, float]:
        """Root mean square of the embedding's, each block's and the last norm's output on these tokens."""
        scales: dict[str, float] = {}

        def note(name: str, x_BTD: Tensor) -> Tensor:
            scales[name] = float(x_BTD.float().square().mean().sqrt())
            return x_BTD

        x_BTD = note("embedding", F.embedding(tokens_BT, self.embedding_VD))
        cos, sin = rotary(positions_BT, self.derived.head_width, self.config.rope_base)
        for number, block in enumerate(self.blocks):
            x_BTD = note(f"blocks.{number}", block.forward(x_BTD, cos, sin, documents_BT))
        note("final", rms_norm(x_BTD, self.final_norm_D, self.config.norm_epsilon))
        return scales

    def logits(self, hidden_BTD: Tensor) -> Tensor:
        """Logits (..., V) of `hidden_states`' result, float32, softcap applied."""
        if self.packed_head is not None:
            logits = packed_linear(hidden_BTD, self.packed_head)
        else:
            logits = F.linear(hidden_BTD, self.head_VD)
        return cap(logits.float(), self.config.softcap)

    def loss(
        self,
        inputs_BT: Tensor,
        targets_BT: Tensor,
        weights_BT: Tensor,
        scale: Tensor,
        z_loss: float,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Weighted cross-entropy and z-loss times `scale` (nats; see `chunked_cross_entropy`)."""
        hidden_BTD = self.hidden_states(inputs_BT, positions_BT, documents_BT)
        return chunked_cross_entropy(
            hidden_BTD.flatten(0, 1), self.head_VD, targets_BT.flatten(), weights_BT.flatten(),
            scale=scale, softcap=self.config.softcap, z_loss=z_loss, compiled=self.compiled,
        )  # fmt: skip

    @torch.no_grad()
    def token_losses(
        self,
        inputs_BT: Tensor,
        targets_BT: Tensor,
        *,
        positions_BT: Tensor | None = None,
        documents_BT: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy of every target in nats, float32 (B, T)."""
        hidden_BTD = self.hidden_states(inputs_BT, positions_BT, documents_BT)
        flat_N = token_losses(hidden_BTD.flatten(0, 1), self.head_VD, targets_BT.flatten(), self.config.softcap)
        return flat_N.view(targets_BT.shape)

    def new_cache(self, batch: int, capacity: int) -> Cache:
        """An empty cache for `batch` rows of up to `capacity` positions, in the model's dtype."""
        size = (batch, self.config.kv_heads, capacity, self.derived.head_width)
        like = self.embedding_VD
        empty = [torch.zeros(size, dtype=like.dtype, device=like.device) for _ in range(2 * self.config.layers)]
        return Cache(empty[::2], empty[1::2])
