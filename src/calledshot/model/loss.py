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
) -> tuple[Tensor, Tensor]:
    """Loss sum and z-loss sum; the logits become the gradient with respect to them, multiplied by `scale`."""
    raw_NV = logits_NV.float()
    z_NV = cap(raw_NV, softcap)
    partition_N = torch.logsumexp(z_NV, -1)
    picked_N = z_NV.gather(1, targets_N[:, None])[:, 0]
    loss = ((partition_N - picked_N) * weights_N).sum()
    z_term = (partition_N.square() * weights_N).sum() * z_loss
    slope_N, factor_N = 1.0 + 2.0 * z_loss * partition_N, weights_N * scale

    def gradient(z_NV: Tensor, is_target: float) -> Tensor:
        gradient_NV = (torch.exp(z_NV - partition_N[:, None]) * slope_N[:, None] - is_target) * factor_N[:, None]
        if softcap:
            gradient_NV = gradient_NV * (1.0 - (z_NV / softcap).square())
        return gradient_NV.to(logits_NV.dtype)

    at_target_N1 = gradient(picked_N[:, None], 1.0)
    logits_NV.copy_(gradient(z_NV, 0.0))
    # Apart: comparing each column with the target would take longer than the rest.
    logits_NV.scatter_(1, targets_N[:, None], at_target_N1)
    return loss, z_term


@functools.cache
def compiled_chunk() -> Callable[..., tuple[Tensor, Tensor]]:
    """Made on demand: asking for it imports the compiler, which takes as long as torch itself."""
    return torch.compile(_chunk, dynamic=False)


def _total(total: Tensor, part: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums over chunks are kept in float32: bfloat16 would lose the small ones."""
    return (total.float() + part.float()).to(dtype)


@functools.cache
def _compiled_total() -> Callable[..., Tensor]:
    return torch.compile(_total, dynamic=False)


@functools.lru_cache(maxsize=1)
def _workspace(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The memory in which chunks of logits are made, kept from step to step: on a CPU, asking the system for it anew
    (16,000 page faults a step at 10M parameters) cost 4 % of the step.
    """
    return torch.empty(rows, columns, dtype=dtype, device=device)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, head_VD, targets_N, weights_N, scale, softcap, z_loss, compiled):
        chunk, total = (compiled_chunk(), _compiled_total()) if compiled else (_chunk, _total)
        gradient_ND = torch.empty_like(hidden_ND)
        gradient_VD: Tensor | None = None
        loss = torch.zeros((), dtype=torch.float32, device=hidden_ND.device)
        z_term = torch.zeros_like(loss)
        tokens = min(chunk_tokens(head_VD), hidden_ND.size(0))
        workspace_NV = _workspace(tokens, head_VD.size(0), head_VD.dtype, head_VD.device)
        for start in range(0, hidden_ND.size(0), tokens):
            part = slice(start, start + tokens)
            logits_NV = workspace_NV[: len(hidden_ND[part])]
            torch.mm(hidden_ND[part], head_VD.T, out=logits_NV)
            part_loss, part_z = chunk(logits_NV, targets_N[part], weights_N[part], scale, softcap, z_loss)
            loss += part_loss
            z_term += part_z
            torch.mm(logits_NV, head_VD, out=gradient_ND[part])
            part_VD = logits_NV.T @ hidden_ND[part]
            dtype = head_VD.dtype if start + tokens >= hidden_ND.size(0) else torch.float32
            gradient_VD = part_VD if gradient_VD is None else total(gradient_VD, part_VD, dtype)
        assert gradient_VD is not None
        ctx.save_for_backward(gradient_ND, gradient_VD)
        return loss * scale, z_term * scale

    @staticmethod
    def backward(ctx, loss_gradient, z_gradient):
        # The two outputs are always added: the gradients made in the forward are those of their sum.
        gradient_ND, gradient_VD = ctx.saved_tensors
        factor = loss_gradient.to(gradient_ND.dtype)
        if factor.device.type != "cpu" or factor != 1.0:  # asking a GPU would wait for it
            gradient_ND, gradient_VD = gradient_ND * factor, gradient_VD * factor
        return gradient_ND, gradient_VD, None, None, None, None, None, None


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
