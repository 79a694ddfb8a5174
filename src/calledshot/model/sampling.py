"""Choosing the next token from logits, row by row, each row by its own rules and its own random numbers.

Shapes: B rows, R of them, V vocabulary, W the likeliest of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from calledshot.data import Tokenizer
from calledshot.recipe import UsageError

WINDOW = 128
"""Entries that are sorted first: they hold the whole of most truncated distributions, and sorting all 8,192 of a
vocabulary takes fifteen times as long."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Truncations apply together, after the temperature."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Keep so many of the likeliest; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest until they hold so much of the probability (Holtzman et al. 2020, arXiv 1904.09751)."""
    min_p: float = 0.0
    """Keep those at least so likely relative to the likeliest (Nguyen et al. 2024, arXiv 2407.01082)."""
    seed: int | None = None
    """Of the random numbers; None takes fresh ones."""
    stream: int = 0
    """Which of several completions under one seed this is."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UsageError(f"temperature {self.temperature:g}: must be 0 or more")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k}: must be 0 or more")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p:g}: must be more than 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p {self.min_p:g}: must be between 0 and 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def truncated(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


def banned_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that a model is not to write when text goes on: the special ones but the end. A young model has hardly seen
    them, and gives each of some 270 as much as any rare token; one that learned to fill gaps would open another.
    """
    return tokenizer.reserved


def choose(logits_BV: Tensor, rules: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """Token ids (B,), int64. `logits_BV` is float32; `uniforms` in [0, 1), one a row: the same number draws the same
    token from the same logits, whatever the other rows are.
    """
    if all(rule.greedy for rule in rules):
        return logits_BV.argmax(-1)
    chosen_B = torch.empty(len(rules), dtype=torch.int64, device=logits_BV.device)
    for kind in (_likeliest, _drawn, _drawn_truncated):
        rows = [row for row, rule in enumerate(rules) if _kind(rule) is kind]
        if len(rows) == len(rules):
            return kind(logits_BV, rules, _column(uniforms, logits_BV))
        if rows:
            some = [rules[row] for row in rows]
            chosen_B[rows] = kind(logits_BV[rows], some, _column([uniforms[row] for row in rows], logits_BV))
    return chosen_B


def _kind(rule: Sampling) -> Callable[[Tensor, Sequence[Sampling], Tensor], Tensor]:
    return _likeliest if rule.greedy else _drawn_truncated if rule.truncated else _drawn


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _probabilities(logits_RV: Tensor, rules: Sequence[Sampling]) -> Tensor:
    # The greatest becomes 0 first, so that no temperature can make two infinities of them.
    temperatures_R1 = _column([max(rule.temperature, 1e-6) for rule in rules], logits_RV)
    return ((logits_RV - logits_RV.amax(-1, keepdim=True)) / temperatures_R1).softmax(-1)


def _draw(weights_RW: Tensor, uniforms_R1: Tensor) -> Tensor:
    """Column (R, 1) in which a share `uniforms` of each row's sum is passed; never one of weight 0."""
    sums_RW = weights_RW.cumsum(-1)
    total_R1 = sums_RW[:, -1:]
    target_R1 = torch.minimum(uniforms_R1 * total_R1, torch.nextafter(total_R1, torch.zeros_like(total_R1)))
    return torch.searchsorted(sums_RW, target_R1, right=True).clamp_(max=weights_RW.size(1) - 1)


def _likeliest(logits_RV: Tensor, rules: Sequence[Sampling], uniforms_R1: Tensor) -> Tensor:
    del rules, uniforms_R1
    return logits_RV.argmax(-1)


def _drawn(logits_RV: Tensor, rules: Sequence[Sampling], uniforms_R1: Tensor) -> Tensor:
    return _draw(_probabilities(logits_RV, rules), uniforms_R1)[:, 0]


def _drawn_truncated(logits_RV: Tensor, rules: Sequence[Sampling], uniforms_R1: Tensor) -> Tensor:
    vocabulary = logits_RV.size(1)
    probabilities_RV = _probabilities(logits_RV, rules)
    top_k_R1 = _column([min(rule.top_k or vocabulary, vocabulary) for rule in rules], logits_RV)
    top_p_R1 = _column([rule.top_p for rule in rules], logits_RV)
    min_p_R1 = _column([rule.min_p for rule in rules], logits_RV)

    def pick(rows: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Ids (R,), and where more than `width` entries would have been kept."""
        sorted_RW, ids_RW = probabilities_RV[rows].topk(width)
        rank_W = torch.arange(width, device=logits_RV.device)
        before_RW = sorted_RW.cumsum(-1) - sorted_RW
        kept_RW = (rank_W < top_k_R1[rows]) & (sorted_RW >= min_p_R1[rows] * sorted_RW[:, :1])
        # A whole distribution is kept whole, although rounded sums may pass 1 too early.
        kept_RW &= (before_RW < top_p_R1[rows]) | (top_p_R1[rows] >= 1)
        kept_RW[:, 0] = True
        return ids_RW.gather(1, _draw(sorted_RW * kept_RW, uniforms_R1[rows]))[:, 0], kept_RW[:, -1]

    every_R = torch.arange(len(rules), device=logits_RV.device)
    chosen_R, more_R = pick(every_R, min(WINDOW, vocabulary))
    if vocabulary > WINDOW and bool(more_R.any()):
        rest = every_R[more_R]
        chosen_R[rest] = pick(rest, vocabulary)[0]
    return chosen_R
