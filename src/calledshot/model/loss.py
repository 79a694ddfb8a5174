"""Cross-entropy over the vocabulary in chunks, so that logits never stand whole in memory.

Shapes: N tokens, D width, V vocabulary.

The gradients are made while each chunk's logits are at hand (10 to 25 % over full logits on a CPU), so the backward
only scales them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

CHUNK_LOGITS = {"cpu": 2**23, "cuda": 2**28}
"""Most logits that stand in memory together, by kind of device. On a CPU 16 MiB in bfloat16: half of it is 3 % slower
(the head's gradient is added up more often), twice as much 16 % (caches). On a GPU enough to fill it."""


def chunk_tokens(head_VD: Tensor) -> int:
    """Tokens in a chunk."""
    return max(64, CHUNK_LOGITS.get(head_VD.device.type, 2**23) // head_VD.size(0))


def cap(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap), or the logits themselves for 0 (Gemma 2, arXiv 2408.00118)."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _chunk(
    logits_NV: Tensor, targets_N: Tensor, weights_N: Tensor, scale: Tensor, softcap: float, z_loss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss sum, z-loss sum, and gradient with respect to the logits (in their dtype, multiplied by `scale`)."""
    raw_NV = logits_NV.float()
    z_NV = cap(raw_NV, softcap)
    partition_N = torch.logsumexp(z_NV, -1)
    picked_N = z_NV.gather(1, targets_N[:, None])[:, 0]
    loss = ((partition_N - picked_N) * weights_N).sum()
    z_term = (partition_N.square() * weights_N).sum() * z_loss
    vocabulary_V = torch.arange(logits_NV.size(1), device=logits_NV.device)
    probabilities_NV = torch.exp(z_NV - partition_N[:, None])
    slope_N = 1.0 + 2.0 * z_loss * partition_N
    gradient_NV = probabilities_NV * slope_N[:, None] - (vocabulary_V[None] == targets_N[:, None]).float()
    gradient_NV = gradient_NV * (weights_N * scale)[:, None]
    if softcap:
        gradient_NV = gradient_NV * (1.0 - (z_NV / softcap).square())
    return loss, z_term, gradient_NV.to(logits_NV.dtype)


@functools.cache
def compiled_chunk() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Made on demand: asking for it imports the compiler, which takes as long as torch itself."""
    return torch.compile(_chunk, dynamic=False)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, head_VD, targets_N, weights_N, scale, softcap, z_loss, compiled):
        chunk = compiled_chunk() if compiled else _chunk
        gradient_ND = torch.empty_like(hidden_ND)
        gradient_VD: Tensor | None = None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        z_term = torch.zeros_like(loss)
        tokens = chunk_tokens(head_VD)
        for start in range(0, hidden_ND.size(0), tokens):
            part = slice(start, start + tokens)
            part_loss, part_z, gradient_NV = chunk(
                hidden_ND[part] @ head_VD.T, targets_N[part], weights_N[part], scale, softcap, z_loss
            )
            loss += part_loss
            z_term += part_z
            torch.mm(gradient_NV, head_VD, out=gradient_ND[part])
            part_VD = gradient_NV.T @ hidden_ND[part]
            # Sums over chunks are kept in float32: bfloat16 would lose the small ones.
            gradient_VD = part_VD if gradient_VD is None else gradient_VD.float().add_(part_VD)
        assert gradient_VD is not None
        ctx.save_for_backward(gradient_ND, gradient_VD.to(head_VD.dtype))
        return loss * scale, z_term * scale

    @staticmethod
    def backward(ctx, loss_gradient, z_gradient):
        # The two outputs are always added: the gradients made in the forward are those of their sum.
        gradient_ND, gradient_VD = ctx.saved_tensors
        factor = loss_gradient.to(gradient_ND.dtype)
        return gradient_ND * factor, gradient_VD * factor, None, None, None, None, None, None


def chunked_cross_entropy(
    hidden_ND: Tensor,
    head_VD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    *,
    scale: Tensor,
    softcap: float = 0.0,
    z_loss: float = 0.0,
    compiled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Weighted sums of cross-entropy and z-loss (nats, float32), each multiplied by `scale`.

    `hidden_ND` and `head_VD` share a dtype; `targets_N` int64; `weights_N` float32; `scale` a float32 scalar tensor,
    one over the weights of the whole batch, so that micro-batches add up to the batch's mean. Differentiate the sum of
    the two only.
    """
    return _ChunkedCrossEntropy.apply(hidden_ND, head_VD, targets_N, weights_N, scale, softcap, z_loss, compiled)


@torch.no_grad()
def token_losses(hidden_ND: Tensor, head_VD: Tensor, targets_N: Tensor, softcap: float = 0.0) -> Tensor:
    """Cross-entropy of each token in nats, float32 (N,), without gradients and without the whole logits."""
    losses = []
    tokens = chunk_tokens(head_VD)
    for start in range(0, hidden_ND.size(0), tokens):
        part = slice(start, start + tokens)
        z_NV = cap((hidden_ND[part] @ head_VD.T).float(), softcap)
        losses.append(torch.logsumexp(z_NV, -1) - z_NV.gather(1, targets_N[part, None])[:, 0])
    return torch.cat(losses)
