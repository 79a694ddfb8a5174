"""A sparse feed-forward: each token goes to the few experts that a router chooses for it, and none is dropped.

Shapes, as suffixes: N tokens, D width, E experts, K experts a token, F hidden width of an expert, R rows sorted by
expert.

| parameter | shape | |
|---|---|---|
| router_ED | (E, D) | float32 whatever the model is cast to |
| gate_up_E2FD, or up_EFD where not gated | (E, 2, F, D), (E, F, D) | |
| down_EDF | (E, D, F) | |
| shared_gate_up_2FD, or shared_up_FD; shared_down_DF | as a dense feed-forward's | only with a shared expert |
| bias_E | (E,) | buffer, float32, from zero; only where `balance` is `bias` |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calledshot.model.activation import activate
from calledshot.model.collectives import Group, copy_to, exchange_plan, reduce_from, return_rows, send_rows
from calledshot.model.grouped import grouped_linear
from calledshot.model.routing import Auxiliary, Combine, Dispatch, arrange, auxiliary, choose, tile_rows
from calledshot.recipe.derived import GATED, Shape

TENSOR_AXES = {
    "gate_up_E2FD": 2, "up_EFD": 1, "down_EDF": 2, "shared_gate_up_2FD": 1, "shared_up_FD": 0, "shared_down_DF": 1,
}  # fmt: skip
"""Axes along which ranks of tensor parallelism share the parameters; those that are not named, each has whole."""
EXPERT_AXES = {"gate_up_E2FD": 0, "up_EFD": 0, "down_EDF": 0}
"""The same for ranks of expert parallelism."""
FEW_CHOICES = 16
"""Choices of experts in a pass without gradients up to which sorting does not repay itself."""


class Experts(nn.Module):
    """Token-choice mixture of experts (Shazeer et al. 2017, arXiv 1701.06538) without capacity: tokens are sorted by
    expert and multiplied group by group (MegaBlocks: Gale et al. 2022, arXiv 2211.15841).
    """

    def __init__(self, model: Shape, width: int) -> None:
        super().__init__()
        E, hidden, shared = model.experts, model.expert_hidden, model.shared_expert_hidden
        self.model, self.width, self.local = model, width, E
        self.tensor: Group | None = None
        """Ranks that have other parts of each expert."""
        self.expert: Group | None = None
        """Ranks that have other experts: `local` are here, and rows go to where their experts are."""
        self.context: Group | None = None
        """Ranks that have other tokens of the same rows."""
        gated = model.feed_forward in GATED
        self.router_ED = nn.Parameter(torch.empty(E, width))
        if gated:
            self.gate_up_E2FD = nn.Parameter(torch.empty(E, 2, hidden, width))
        else:
            self.up_EFD = nn.Parameter(torch.empty(E, hidden, width))
        self.down_EDF = nn.Parameter(torch.empty(E, width, hidden))
        if shared and gated:
            self.shared_gate_up_2FD = nn.Parameter(torch.empty(2, shared, width))
        elif shared:
            self.shared_up_FD = nn.Parameter(torch.empty(shared, width))
        if shared:
            self.shared_down_DF = nn.Parameter(torch.empty(width, shared))
        self.register_buffer("bias_E", torch.zeros(E) if model.balance == "bias" else None)

    def forward(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, Auxiliary | None]:
        """(..., D) to (..., D), and what the router says beside it; None where no gradients are taken.

        `real` (...), boolean, marks the tokens that losses and load are of; padding is left out of them.
        """
        model, x_ND = self.model, x.flatten(0, -2)
        wide = torch.promote_types(x.dtype, torch.float32)
        logits_NE = F.linear(x_ND.to(wide), self.router_ED.to(wide))
        scores_NE, weights_NK, experts_NK = choose(logits_NE, self.bias_E, model.top_k, model.router, model.renormalize)
        # The router stands before the ranks of tensor parallelism part: all of them choose alike.
        x_ND, weights_NK = copy_to(x_ND, self.tensor), copy_to(weights_NK, self.tensor)
        few = not torch.is_grad_enabled() and x.device.type == "cpu" and experts_NK.numel() <= FEW_CHOICES
        if self.expert is not None:
            y_ND = self._elsewhere(x_ND, weights_NK, experts_NK, self.expert)
        else:
            y_ND = (self._few if few else self._sorted)(x_ND, weights_NK, experts_NK)
        if model.shared_expert_hidden:
            y_ND = y_ND + self._shared(x_ND)
        y_ND = reduce_from(y_ND, self.tensor)
        record = None
        if torch.is_grad_enabled():
            balance = model.balance_weight if model.balance == "auxiliary" else 0.0
            real_N = None if real is None else real.flatten()
            record = auxiliary(logits_NE, scores_NE, experts_NK, real_N, balance, model.router_z_loss, self.context)
        return y_ND.view(x.shape), record

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """Up (E, F or 2 F, D) and down (E, D, F); sharded parameters may come as (rows, last axis)."""
        up = self.gate_up_E2FD if self.model.feed_forward in GATED else self.up_EFD
        return up.view(self.local, -1, self.width), self.down_EDF.view(self.local, self.width, -1)

    def _sorted(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> Tensor:
        model, (up_EFD, down_EDF) = self.model, self._matrices()
        tile = tile_rows(experts_NK.numel(), model.experts)
        weights_R, tokens_R, rows_NK, ends_E = arrange(weights_NK, experts_NK, model.experts, tile)
        inner = grouped_linear(Dispatch.apply(x_ND, tokens_R, rows_NK), up_EFD, ends_E)
        # Weighted here, where a pass over the rows is made anyhow.
        inner_RF = (activate(inner, model.feed_forward) * weights_R[:, None]).to(x_ND.dtype)
        return Combine.apply(grouped_linear(inner_RF, down_EDF, ends_E), tokens_R, rows_NK)

    def _elsewhere(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor, group: Group) -> Tensor:
        """By the experts of all ranks: rows go to where theirs is and come back, so that weights can stay here."""
        model, (up_LFD, down_LDF), choices = self.model, self._matrices(), experts_NK.numel()
        weights_A, tokens_A, rows_NK, ends_E = arrange(weights_NK, experts_NK, model.experts, 1)
        counts_E = ends_E.diff(prepend=ends_E.new_zeros(1)).long()
        tile = tile_rows(choices * group.size, model.experts)
        source_R, ends_L, *both = exchange_plan(counts_E, group.name, tile)
        x_RD = send_rows(Dispatch.apply(x_ND, tokens_A, rows_NK), source_R, *both, group.name)
        inner_RF = activate(grouped_linear(x_RD, up_LFD, ends_L), model.feed_forward)
        y_RD = grouped_linear(inner_RF, down_LDF, ends_L)
        y_AD = return_rows(y_RD, source_R, *both, group.name, choices)
        return Combine.apply((y_AD * weights_A[:, None]).to(x_ND.dtype), tokens_A, rows_NK)

    def _few(self, x_ND: Tensor, weights_NK: Tensor, experts_NK: Tensor) -> Tensor:
        """For decoding on a CPU: each choice by itself, without sorting."""
        up_EFD, down_EDF = self._matrices()
        rows = []
        for x_D, weights, chosen in zip(x_ND, weights_NK.tolist(), experts_NK.tolist(), strict=True):
            y_D = torch.zeros_like(x_D, dtype=torch.float32)
            for weight, expert in zip(weights, chosen, strict=True):
                inner_F = activate(torch.mv(up_EFD[expert], x_D), self.model.feed_forward)
                y_D.add_(torch.mv(down_EDF[expert], inner_F), alpha=weight)
            rows.append(y_D)
        return torch.stack(rows).to(x_ND.dtype)

    def _shared(self, x_ND: Tensor) -> Tensor:
        up = self.shared_gate_up_2FD if self.model.feed_forward in GATED else self.shared_up_FD
        return F.linear(activate(F.linear(x_ND, up.view(-1, self.width)), self.model.feed_forward), self.shared_down_DF)

    @torch.no_grad()
    def update_bias(self, load_E: Tensor) -> None:
        """Moves the bias of each expert by `balance_weight` against its load of the whole step (DeepSeek-V3: down where
        overloaded, up where under, 0.001 a step). To be called after the optimizer's step.
        """
        assert self.bias_E is not None
        mean = load_E.float().mean()
        self.bias_E.add_(torch.sign(mean - load_E.float()), alpha=self.model.balance_weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Experts:
        """Casts everything but the router and its bias, which stay as wide as they are."""
        wide = [tensor for tensor in (self.router_ED, self.bias_E) if tensor is not None]

        def cast(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            narrow = changed.is_floating_point() and changed.element_size() < 4
            return tensor.to(changed.device) if narrow and any(tensor is each for each in wide) else changed

        return super()._apply(cast, recurse)
