"""Which experts a token goes to, with which weights, and how evenly that uses them.

Shapes, as suffixes: N tokens, E experts, K experts a token, D width, R rows sorted by expert.

All experts' rows stand in one buffer, each expert's padded to a multiple of `tile` rows: oneDNN plans a product for
each number of rows that it has not met, which can take longer than the product, and few multiples are soon all met.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from calledshot.model.collectives import Group, sum_over

LARGEST_TILE = 64


class Auxiliary(NamedTuple):
    """What a layer of experts says beside its output. Where ranks share the positions of rows, what all say is the sum
    over them.
    """

    loss: Tensor
    """Balance loss and router z-loss with their weights, nats, float32 scalar; a mean over the tokens seen."""
    load_E: Tensor
    """Share of the tokens' choices that each expert got, float32, summing to 1."""


def load_figures(load_E: Tensor) -> dict[str, float]:
    """`max_over_mean` (1 is even, E is all on one) and `entropy` (nats; log E is even) of a load, and `dropped`, the
    share of choices that found no room: none, ever.
    """
    share_E = load_E.double()
    entropy = -torch.special.xlogy(share_E, share_E).sum()
    return {"max_over_mean": float(share_E.max() * len(share_E)), "entropy": float(entropy), "dropped": 0.0}


def choose(
    logits_NE: Tensor, bias_E: Tensor | None, top_k: int, kind: str, renormalize: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (N, E), and the weights and experts (N, K) of each token, best first.

    `kind` is `softmax` over all experts (Mixtral, Qwen3-MoE) or `sigmoid` of each (DeepSeek-V3, arXiv 2412.19437).
    `bias_E` takes part in choosing and not in the weights. Float32 throughout.
    """
    scores_NE = logits_NE.softmax(-1) if kind == "softmax" else logits_NE.sigmoid()
    if bias_E is None:
        weights_NK, experts_NK = scores_NE.topk(top_k, -1)
    else:
        experts_NK = (scores_NE.detach() + bias_E).topk(top_k, -1).indices
        weights_NK = scores_NE.gather(1, experts_NK)
    if renormalize:
        weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)  # as DeepSeek-V3: sigmoids may all be 0
    return scores_NE, weights_NK, experts_NK


def auxiliary(
    logits_NE: Tensor,
    scores_NE: Tensor,
    experts_NK: Tensor,
    real_N: Tensor | None,
    balance: float,
    z_loss: float,
    context: Group | None = None,
) -> Auxiliary:
    """Losses weighted by `balance` and `z_loss`, and the load, over the tokens that `real_N` (boolean) marks, or all;
    those of all ranks of `context` count, and this rank says its own tokens' part.

    Balance: E * sum_e f_e p_e, with f_e the share of tokens that chose e and p_e their mean probability of it: top_k
    when even (flaxformer's routing.py; Fedus et al. 2021, arXiv 2101.03961). Sigmoid scores are first divided by their
    sum over the experts (DeepSeek-V3, section 2.1.2). Router z-loss: the mean of logsumexp(logits)^2 (Zoph et al. 2022,
    arXiv 2202.08906).
    """
    N, E = logits_NE.shape
    K = experts_NK.size(1)
    real = torch.ones(N, device=logits_NE.device) if real_N is None else real_N.float()
    tokens = real.sum()
    counts_E = torch.zeros(E, device=logits_NE.device)
    counts_E = counts_E.scatter_add(0, experts_NK.flatten(), real[:, None].expand(N, K).flatten())
    own_E = counts_E
    if context is not None:
        # One sum serves both: each token makes K choices. (Put side by side for it, inductor would sum them in place.)
        counts_E = sum_over(counts_E, context)
        tokens = counts_E.sum() / K
    tokens = tokens.clamp(min=1.0)
    chosen_E, share_N = counts_E / tokens, real / tokens
    probability_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
    loss = z_loss * (logits_NE.logsumexp(-1).square() * share_N).sum()
    if balance:
        loss = loss + balance * E * (chosen_E * (probability_NE * share_N[:, None]).sum(0)).sum()
    return Auxiliary(loss, own_E / tokens / K)


def tile_rows(choices: int, experts: int) -> int:
    """Rows that an expert's share is padded to a multiple of: a power of two, a 32nd of the mean share or less, so that
    padding is less than 2 % of an even load, and a few dozen numbers of rows are met.
    """
    return min(LARGEST_TILE, 1 << max(0, (choices // (32 * experts)).bit_length() - 1))


def _rows(choices: int, experts: int, tile: int) -> int:
    return choices + min(choices, experts) * (tile - 1)


@torch.library.custom_op("calledshot::arrange", mutates_args=())
def arrange(weights_NK: Tensor, experts_NK: Tensor, experts: int, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sorts choices by expert. Returns the weight of each row (R,), its token (R,), the row of each choice (N, K), and
    the ends of the experts' rows (E,), int32.

    Rows of padding have weight 0 and some token. Opaque to `torch.compile`, which would work the sorting out anew for
    each element that depends on it.
    """
    N, K = experts_NK.shape
    chosen_A, order_A = experts_NK.flatten().sort(stable=True)
    counts_E = torch.zeros(experts, dtype=torch.int64, device=chosen_A.device)
    counts_E.scatter_add_(0, chosen_A, torch.ones_like(chosen_A))
    padded_E = counts_E if tile == 1 else (counts_E + (tile - 1)) // tile * tile
    ends_E = padded_E.cumsum(0)
    shift_E = ends_E - padded_E - counts_E.cumsum(0) + counts_E
    place_A = torch.arange(N * K, device=chosen_A.device) + shift_E[chosen_A]
    weights_R = weights_NK.new_zeros(_rows(N * K, experts, tile))
    weights_R[place_A] = weights_NK.flatten()[order_A]
    tokens_R = torch.zeros(len(weights_R), dtype=torch.int64, device=chosen_A.device)
    tokens_R[place_A] = order_A // K
    rows_NK = torch.empty_like(order_A)
    rows_NK[order_A] = place_A
    return weights_R, tokens_R, rows_NK.view(N, K), ends_E.int()


@arrange.register_fake
def _(weights_NK: Tensor, experts_NK: Tensor, experts: int, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    R = _rows(experts_NK.numel(), experts, tile)
    ends_E = experts_NK.new_empty(experts, dtype=torch.int32)
    return weights_NK.new_empty(R), experts_NK.new_empty(R), torch.empty_like(experts_NK), ends_E


def _keep_rows(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[2])
    ctx.mark_non_differentiable(*output[1:])


def _weight_gradient(ctx, g_R, *_):
    (rows_NK,) = ctx.saved_tensors
    return g_R[rows_NK], None, None, None


arrange.register_autograd(_weight_gradient, setup_context=_keep_rows)


def _gather(y_RD: Tensor, rows_NK: Tensor) -> Tensor:
    """Sum of each token's rows, (N, D), added up in float32 at least. Indexing and a sum, which `torch.compile` does
    not vectorise from 8 rows a token on, took up to sixty times as long on a CPU.
    """
    return F.embedding_bag(rows_NK, y_RD, mode="sum")


class Dispatch(Function):
    """Each row's token, (R, D). Its gradient gathers; autograd's own would add row by row."""

    @staticmethod
    def forward(ctx, x_ND, tokens_R, rows_NK):
        ctx.save_for_backward(rows_NK)
        return x_ND.index_select(0, tokens_R)

    @staticmethod
    def backward(ctx, g_RD):
        (rows_NK,) = ctx.saved_tensors
        return _gather(g_RD, rows_NK), None, None


class Combine(Function):
    """Sum of each token's rows, (N, D). Rows of padding get some token's gradient, which their weight 0 ends."""

    @staticmethod
    def forward(ctx, y_RD, tokens_R, rows_NK):
        ctx.save_for_backward(tokens_R)
        return _gather(y_RD, rows_NK)

    @staticmethod
    def backward(ctx, g_ND):
        (tokens_R,) = ctx.saved_tensors
        return g_ND.index_select(0, tokens_R), None, None
