"""Attention with one mask rule, for training and decoding, inside a stack and from decoder to encoder.

Shapes: B batch, T target length, S source length, H query heads, K key/value heads, G = H / K query heads a key head,
C head width, R rows of a block.

The mask is data (`Mask`): a query sees a key if and only if both are in the same document, and the key is not later,
or in the same region above 0. Regions make a prefix seen both ways; an encoder and the attention over what it encoded
know no "later".
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from calledshot.model.positions import relative_bias

BLOCKED_CONTEXT_LIMIT = 2048
"""Longest sequence for which the score blocks are kept for the backward; past it, memory would grow with its square."""
MASK_ENTRIES = 2**26
"""Entries of a mask that stand in memory together where it has to be written out."""


@dataclass(frozen=True)
class Mask:
    """Who sees whom: documents and regions of the queries and of the keys, (B, T) and (B, S)."""

    queries: int
    """T."""
    keys: int
    """S."""
    ordered: bool = True
    """Whether a key may be too late to be seen."""
    documents_BT: Tensor | None = None
    """None where each row is one document."""
    key_documents_BS: Tensor | None = None
    """None where they are the queries' own."""
    regions_BT: Tensor | None = None
    """None where all is causal."""
    key_regions_BS: Tensor | None = None
    """None where they are the queries' own."""
    first: int = 0
    """Place of the first query among the keys, where the queries are a part of a row."""

    @property
    def causal(self) -> bool:
        """Whether no key is seen before its time."""
        return self.ordered and self.regions_BT is None

    @property
    def plainly_causal(self) -> bool:
        """Whether nothing but the order counts."""
        return self.ordered and self.documents_BT is None and self.regions_BT is None

    @property
    def across(self) -> bool:
        """Whether queries and keys are of two stacks, so that a query may see nothing: inside one it sees itself."""
        return not self.ordered and self.key_documents_BS is not None

    @property
    def open(self) -> bool:
        """Whether all see all."""
        return not self.ordered and self.documents_BT is None and self.regions_BT is None

    def allowed(self, start: int, stop: int, keys: int) -> Tensor:
        """Booleans (B or 1, stop - start, keys): whether the queries from `start` see the first `keys` keys."""
        like = self.documents_BT if self.documents_BT is not None else self.regions_BT
        device = None if like is None else like.device
        seen = torch.ones(1, stop - start, keys, dtype=torch.bool, device=device)
        if self.ordered:
            position_S = torch.arange(keys, device=device)
            seen = (position_S <= torch.arange(self.first + start, self.first + stop, device=device)[:, None])[None]
        if self.regions_BT is not None:
            keys_BS = self.regions_BT if self.key_regions_BS is None else self.key_regions_BS
            region_BT1, region_B1S = self.regions_BT[:, start:stop, None], keys_BS[:, None, :keys]
            seen = seen | ((region_BT1 == region_B1S) & (region_BT1 > 0))
        if self.documents_BT is not None:
            keys_BS = self.documents_BT if self.key_documents_BS is None else self.key_documents_BS
            seen = seen & (self.documents_BT[:, start:stop, None] == keys_BS[:, None, :keys])
        return seen

    def reach(self, stop: int) -> int:
        """Keys that the queries before `stop` may see, the first so many."""
        return self.first + stop if self.causal else self.keys

    def head_bias(self, table_HR: Tensor, start: int, stop: int, keys: int) -> Tensor:
        """T5's bias (H, stop - start, keys) of the queries from `start` on the first `keys` keys."""
        return relative_bias(table_HR, self.first + start, self.first + stop, keys, ordered=self.ordered)

    def row_blocks(self) -> Iterator[tuple[int, int, int]]:
        """(first query, end, keys) of the blocks that the CPU works on. Where a mask is causal each block leaves out
        the keys after it, so that four do 5/8 of the square; small rows do not repay it.
        """
        blocks = next((n for n in (4, 2) if self.queries % n == 0 and self.queries // n >= 64), 1)
        rows = self.queries // blocks
        for start in range(0, self.queries, rows):
            yield start, start + rows, self.reach(start + rows)

    def biases(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """What is added to the scores of each row block, (B or 1, R, S): 0 where seen and -inf elsewhere."""
        biases = []
        for start, stop, keys in self.row_blocks():
            seen = self.allowed(start, stop, keys)
            biases.append(torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf))
        return tuple(biases)

    def block_mask(self) -> Any:
        """The same as a FlexAttention `BlockMask` (Dong et al. 2024, arXiv 2412.05496), for GPUs."""
        from torch.nn.attention.flex_attention import create_block_mask

        like = self.documents_BT if self.documents_BT is not None else self.regions_BT
        assert like is not None
        return create_block_mask(self.rule(), like.size(0), None, self.queries, self.keys, device=str(like.device))

    def rule(self) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """The mask as a function of (row, head, query, key)."""
        documents_BT, regions_BT = self.documents_BT, self.regions_BT
        keys_BS = documents_BT if self.key_documents_BS is None else self.key_documents_BS
        key_regions_BS = regions_BT if self.key_regions_BS is None else self.key_regions_BS

        def seen(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
            allowed = t + self.first >= s if self.ordered else t == t
            if regions_BT is not None and key_regions_BS is not None:
                allowed = allowed | ((regions_BT[b, t] == key_regions_BS[b, s]) & (regions_BT[b, t] > 0))
            if documents_BT is not None and keys_BS is not None:
                allowed = allowed & (documents_BT[b, t] == keys_BS[b, s])
            return allowed

        return seen


@dataclass(frozen=True)
class Seen:
    """A mask made ready for the attention of all layers of a stack."""

    mask: Mask
    biases: tuple[Tensor, ...] = ()
    """Of the blocks of rows, (B or 1, R, S), where the CPU path is taken."""
    block_mask: Any = None
    """For FlexAttention, where that is taken."""
    head_biases: tuple[Tensor, ...] = ()
    """T5's bias by head, (H, R, S): of the blocks of rows on the CPU path, else of all rows."""
    table_HR: Tensor | None = None
    """What T5's bias is made of, where all of it at once would take too much memory."""

    @property
    def biased(self) -> bool:
        """Whether each head adds a bias of its own."""
        return bool(self.head_biases) or self.table_HR is not None


def ready(
    mask: Mask, device: torch.device, dtype: torch.dtype, *, blocked: bool, table_HR: Tensor | None = None
) -> Seen:
    """Chooses the path: blocks of plain products for CPUs that compile (`blocked`), FlexAttention on GPUs, or SDPA.

    `table_HR` makes T5's bias.
    """

    def heads(blocks: Iterable[tuple[int, int, int]]) -> tuple[Tensor, ...]:
        return () if table_HR is None else tuple(mask.head_bias(table_HR, *block) for block in blocks)

    if blocked and max(mask.queries, mask.keys) <= BLOCKED_CONTEXT_LIMIT:
        return Seen(mask, biases=mask.biases(dtype), head_biases=heads(mask.row_blocks()))
    whole = [(0, mask.queries, mask.keys)]
    if device.type == "cuda" and not (mask.plainly_causal or mask.open):
        return Seen(mask, block_mask=mask.block_mask(), head_biases=heads(whole))
    if table_HR is not None and len(table_HR) * mask.queries * mask.keys > MASK_ENTRIES:
        return Seen(mask, table_HR=table_HR)
    return Seen(mask, head_biases=heads(whole))


def attend(q_BTKGC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, seen: Seen) -> Tensor:
    """softmax(q k^T / sqrt(C) + bias) v under a mask; returns (B, T, K, G, C) in the dtype of `v`."""
    if seen.biases:
        return _attend_in_blocks(q_BTKGC, k_BSKC, v_BSKC, seen)
    B, T, K, G, C = q_BTKGC.shape
    q_BHTC = q_BTKGC.reshape(B, T, K * G, C).transpose(1, 2)
    k_BKSC, v_BKSC = k_BSKC.transpose(1, 2), v_BSKC.transpose(1, 2)
    mask = seen.mask
    if seen.block_mask is not None:
        y_BHTC = _flex(q_BHTC, k_BKSC, v_BKSC, seen)
    elif not seen.biased and (mask.plainly_causal or mask.open):
        # Exact, since a mask in order has as many keys as queries.
        y_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BKSC, v_BKSC, is_causal=mask.ordered, enable_gqa=G > 1)
    else:
        y_BHTC = _attend_in_parts(q_BHTC, k_BKSC, v_BKSC, seen)
    return y_BHTC.transpose(1, 2).reshape(B, T, K, G, C)


def _attend_in_parts(q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, seen: Seen) -> Tensor:
    """SDPA with the mask written out for so many queries at a time as `MASK_ENTRIES` allows, (B, H, T, C)."""
    mask, table_HR = seen.mask, seen.table_HR

    def part(q_BHRC: Tensor, start: int, stop: int, keys: int) -> Tensor:
        bias: Tensor = mask.allowed(start, stop, keys).unsqueeze(1).to(q_BHRC.device)
        bias_HRS = seen.head_biases[0][:, start:stop, :keys] if seen.head_biases else None
        if table_HR is not None:
            bias_HRS = mask.head_bias(table_HR, start, stop, keys)
        if bias_HRS is not None:
            bias = bias_HRS.to(q_BHRC.dtype).masked_fill(~bias, -torch.inf)
        k_BKUC, v_BKUC = k_BKSC[:, :, :keys], v_BKSC[:, :, :keys]
        return F.scaled_dot_product_attention(q_BHRC, k_BKUC, v_BKUC, attn_mask=bias, enable_gqa=k_BKSC.size(1) < H)

    B, H, T, _ = q_BHTC.shape
    rows = max(1, MASK_ENTRIES // (B * mask.keys * (H if seen.biased else 1)))
    if rows >= T:
        return part(q_BHTC, 0, T, mask.reach(T))
    parts = []
    for start in range(0, T, rows):
        stop = min(start + rows, T)
        # Otherwise the backward would keep each part's mask, and so the whole of it, once a layer.
        rows_BHRC = q_BHTC[:, :, start:stop]
        parts.append(
            checkpoint(part, rows_BHRC, start, stop, mask.reach(stop), use_reentrant=False, preserve_rng_state=False)
        )
    return torch.cat(parts, 2)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _flex(q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, seen: Seen) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    def add_bias(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return score + seen.head_biases[0][h, t, s]

    run = flex_attention if torch.compiler.is_compiling() or q_BHTC.device.type == "cpu" else _compiled_flex()
    return run(
        q_BHTC, k_BKSC, v_BKSC, block_mask=seen.block_mask, score_mod=add_bias if seen.head_biases else None,
        enable_gqa=q_BHTC.size(1) != k_BKSC.size(1),
    )  # fmt: skip


class _BlockOfRows(torch.autograd.Function):
    """softmax(q k^T * scale + bias) v for one block of rows, keeping only the weights for the backward.

    N = B * K products; R = G * rows, the query heads of a key head being rows of one product. Left to itself the
    compiler keeps scores and weights both, and takes the exponential a second time. A bias that was written out is
    added in half the time that comparing documents and positions takes.
    """

    @staticmethod
    def forward(ctx, q_NRC, k_NSC, v_NSC, bias_BRS, head_bias_KGRS, groups, scale, some_blind):
        N, S = len(k_NSC), k_NSC.size(1)
        B, rows = bias_BRS.shape[:2]
        scores = torch.bmm(q_NRC, k_NSC.transpose(1, 2)).view(B, N // B, groups, rows, S).float() * scale
        scores = scores + bias_BRS[:, None, None].float()
        if head_bias_KGRS is not None:
            scores = scores + head_bias_KGRS.float()
        weights = scores.softmax(-1)
        if some_blind:  # what sees nothing gives zero, as in SDPA and FlexAttention, and not 0 / 0
            weights = weights.masked_fill((bias_BRS == -torch.inf).all(-1, keepdim=True)[:, None, None], 0.0)
        weights_NRS = weights.to(v_NSC.dtype).view(N, groups * rows, S)
        ctx.save_for_backward(q_NRC, k_NSC, v_NSC, weights_NRS)
        ctx.scale, ctx.head_bias = scale, None if head_bias_KGRS is None else head_bias_KGRS.shape
        return torch.bmm(weights_NRS, v_NSC)

    @staticmethod
    def backward(ctx, gradient_NRC):
        q_NRC, k_NSC, v_NSC, weights_NRS = ctx.saved_tensors
        slope_NRS = torch.bmm(gradient_NRC, v_NSC.transpose(1, 2)).float()
        weights = weights_NRS.float()
        mean_NR1 = (slope_NRS * weights).sum(-1, keepdim=True)
        bias_gradient = None
        if ctx.head_bias is not None:
            bias_gradient = (weights * (slope_NRS - mean_NR1)).view(-1, *ctx.head_bias).sum(0)
        slope_NRS = (weights * (slope_NRS - mean_NR1) * ctx.scale).to(q_NRC.dtype)
        q_gradient = torch.bmm(slope_NRS, k_NSC)
        k_gradient = torch.bmm(slope_NRS.transpose(1, 2), q_NRC)
        v_gradient = torch.bmm(weights_NRS.transpose(1, 2), gradient_NRC)
        return q_gradient, k_gradient, v_gradient, None, bias_gradient, None, None, None


def _attend_in_blocks(q_BTKGC: Tensor, k_BSKC: Tensor, v_BSKC: Tensor, seen: Seen) -> Tensor:
    B, _, K, G, C = q_BTKGC.shape
    S = k_BSKC.size(1)
    q_BKGTC = q_BTKGC.permute(0, 2, 3, 1, 4)
    k_NSC = k_BSKC.transpose(1, 2).reshape(B * K, S, C)
    v_NSC = v_BSKC.transpose(1, 2).reshape(B * K, S, C)
    outputs = []
    start = 0
    for number, bias in enumerate(seen.biases):
        stop, keys = start + bias.size(1), bias.size(2)
        q_NRC = q_BKGTC[:, :, :, start:stop].reshape(B * K, G * (stop - start), C)
        bias_BRS = bias.expand(B, -1, -1)
        head_bias_KGRS = seen.head_biases[number].unflatten(0, (K, G)) if seen.head_biases else None
        output_NRC = _BlockOfRows.apply(
            q_NRC, k_NSC[:, :keys], v_NSC[:, :keys], bias_BRS, head_bias_KGRS, G, 1.0 / math.sqrt(C), seen.mask.across
        )
        outputs.append(output_NRC.view(B, K, G, stop - start, C))
        start = stop
    return torch.cat(outputs, dim=3).permute(0, 3, 1, 2, 4)


def attend_cached(
    q_BTKGC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, bias_BTS: Tensor, head_bias_BHTS: Tensor | None = None
) -> Tensor:
    """Attention of new positions over a cache, (B, T, K, G, C); `bias_BTS` is float32, 0 where seen and -inf elsewhere.

    Plain products: on CPUs SDPA with one query a row took twice (float32) to five times (bfloat16) as long at 32 rows.
    """
    B, T, K, G, C = q_BTKGC.shape
    q_BKRC = q_BTKGC.transpose(1, 2).reshape(B, K, T * G, C)
    scores = (q_BKRC @ k_BKSC.transpose(2, 3)).float().view(B, K, T, G, -1) / math.sqrt(C)
    scores = scores + bias_BTS[:, None, :, None]
    if head_bias_BHTS is not None:
        scores = scores + head_bias_BHTS.unflatten(1, (K, G)).transpose(2, 3).float()
    weights = scores.softmax(-1).to(v_BKSC.dtype)
    return (weights.view(B, K, T * G, -1) @ v_BKSC).view(B, K, T, G, C).transpose(1, 2)
