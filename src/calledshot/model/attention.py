"""Attention over packed documents, one mask rule for training and decoding.

Shapes: B batch, T target length, S source length, H query heads, K key/value heads, G = H / K query heads a key head,
C head width.

The mask is data: a query sees a key iff both are in the same document and the key is not later.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCKED_CONTEXT_LIMIT = 2048
"""Longest sequence for which the score blocks are kept for the backward; past it, memory would grow with its square."""


def mask_BTS(documents_BT: Tensor) -> Tensor:
    """Who sees whom, as booleans (B, 1, T, T), from the document of each position (B, T)."""
    same_BTS = documents_BT[:, :, None] == documents_BT[:, None, :]
    return same_BTS.tril().unsqueeze(1)


def attend(q_BTKGC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, documents_BT: Tensor | None, *, blocked: bool) -> Tensor:
    """Causal attention inside documents; returns (B, T, K, G, C) in the dtype of `v`.

    `blocked` takes the CPU path: plain products on blocks of rows, which `torch.compile` fuses with scale, mask and
    softmax (on two AVX-512-BF16 cores, forward and backward together 2.9 times as fast as SDPA at 512 tokens).
    Otherwise SDPA, which is what GPUs and long sequences want. `documents_BT` None means one document a row.
    """
    if blocked and q_BTKGC.size(1) <= BLOCKED_CONTEXT_LIMIT:
        return _attend_in_blocks(q_BTKGC, k_BTKC, v_BTKC, documents_BT)
    B, T, K, G, C = q_BTKGC.shape
    q_BHTC = q_BTKGC.reshape(B, T, K * G, C).transpose(1, 2)
    k_BKTC, v_BKTC = k_BTKC.transpose(1, 2), v_BTKC.transpose(1, 2)
    if documents_BT is None:
        y_BHTC = F.scaled_dot_product_attention(q_BHTC, k_BKTC, v_BKTC, is_causal=True, enable_gqa=G > 1)
    else:
        y_BHTC = F.scaled_dot_product_attention(
            q_BHTC, k_BKTC, v_BKTC, attn_mask=mask_BTS(documents_BT), enable_gqa=G > 1
        )
    return y_BHTC.transpose(1, 2).reshape(B, T, K, G, C)


def _row_blocks(T: int) -> int:
    """How many blocks of rows: each skips the keys after it, so four do 5/8 of the square; small rows do not repay
    it.
    """
    for blocks in (4, 2):
        if T % blocks == 0 and T // blocks >= 64:
            return blocks
    return 1


class _BlockOfRows(torch.autograd.Function):
    """softmax(mask(q k^T)) v for one block of rows, keeping only the weights for the backward.

    N = B * K products; R = G * rows, the query heads of a key head being rows of one product. Left to itself the
    compiler keeps scores and weights both, and takes the exponential a second time.
    """

    @staticmethod
    def forward(ctx, q_NRC, k_NSC, v_NSC, hidden_BRS, groups, scale):
        N, S = len(k_NSC), k_NSC.size(1)
        B, rows = hidden_BRS.shape[:2]
        scores = torch.bmm(q_NRC, k_NSC.transpose(1, 2)).view(B, N // B, groups, rows, S).float() * scale
        scores = torch.where(hidden_BRS[:, None, None], float("-inf"), scores)
        weights_NRS = scores.softmax(-1).to(v_NSC.dtype).view(N, groups * rows, S)
        ctx.save_for_backward(q_NRC, k_NSC, v_NSC, weights_NRS)
        ctx.scale = scale
        return torch.bmm(weights_NRS, v_NSC)

    @staticmethod
    def backward(ctx, gradient_NRC):
        q_NRC, k_NSC, v_NSC, weights_NRS = ctx.saved_tensors
        slope_NRS = torch.bmm(gradient_NRC, v_NSC.transpose(1, 2)).float()
        weights = weights_NRS.float()
        mean_NR1 = (slope_NRS * weights).sum(-1, keepdim=True)
        slope_NRS = (weights * (slope_NRS - mean_NR1) * ctx.scale).to(q_NRC.dtype)
        q_gradient = torch.bmm(slope_NRS, k_NSC)
        k_gradient = torch.bmm(slope_NRS.transpose(1, 2), q_NRC)
        return q_gradient, k_gradient, torch.bmm(weights_NRS.transpose(1, 2), gradient_NRC), None, None, None


def _attend_in_blocks(q_BTKGC: Tensor, k_BTKC: Tensor, v_BTKC: Tensor, documents_BT: Tensor | None) -> Tensor:
    B, T, K, G, C = q_BTKGC.shape
    blocks = _row_blocks(T)
    rows = T // blocks
    q_BKGTC = q_BTKGC.permute(0, 2, 3, 1, 4)
    k_NSC = k_BTKC.transpose(1, 2).reshape(B * K, T, C)
    v_NSC = v_BTKC.transpose(1, 2).reshape(B * K, T, C)
    position_S = torch.arange(T, device=q_BTKGC.device, dtype=torch.int32)
    outputs = []
    for block in range(blocks):
        start, stop = block * rows, (block + 1) * rows
        hidden_BRS = (position_S[None, :stop] > position_S[start:stop, None])[None].expand(B, rows, stop)
        if documents_BT is not None:
            hidden_BRS = hidden_BRS | (documents_BT[:, start:stop, None] != documents_BT[:, None, :stop])
        q_NRC = q_BKGTC[:, :, :, start:stop].reshape(B * K, G * rows, C)
        output_NRC = _BlockOfRows.apply(q_NRC, k_NSC[:, :stop], v_NSC[:, :stop], hidden_BRS, G, 1.0 / math.sqrt(C))
        outputs.append(output_NRC.view(B, K, G, rows, C))
    return torch.cat(outputs, dim=3).permute(0, 3, 1, 2, 4)


def attend_cached(q_BTKGC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, bias_BTS: Tensor) -> Tensor:
    """Attention of new positions over a cache, (B, T, K, G, C); `bias_BTS` is float32, 0 where seen and -inf elsewhere.

    Plain products: on CPUs SDPA with one query a row took twice (float32) to five times (bfloat16) as long at 32 rows.
    """
    B, T, K, G, C = q_BTKGC.shape
    q_BKRC = q_BTKGC.transpose(1, 2).reshape(B, K, T * G, C)
    scores = (q_BKRC @ k_BKSC.transpose(2, 3)).float().view(B, K, T, G, -1) / math.sqrt(C)
    weights = (scores + bias_BTS[:, None, :, None]).softmax(-1).to(v_BKSC.dtype)
    return (weights.view(B, K, T * G, -1) @ v_BKSC).view(B, K, T, G, C).transpose(1, 2)


def rotary(positions_BT: Tensor, width: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, T, C / 2), float32, of RoPE (Su et al. 2021, arXiv 2104.09864) at integer positions."""
    exponents = torch.arange(0, width, 2, device=positions_BT.device, dtype=torch.float32) / width
    angles = positions_BT[..., None].float() * base**-exponents
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of the last axis against each other (the half-split layout of Llama's Hugging Face files).

    `x` is (B, T, ..., C); `cos` and `sin` are (B, T, C / 2).
    """
    shape = (*cos.shape[:2], *(1,) * (x.dim() - 3), cos.size(-1))
    cos, sin = cos.view(shape), sin.view(shape)
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
