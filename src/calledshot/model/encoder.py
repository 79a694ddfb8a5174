"""The stack that reads both ways, and how it gets shorter on the way.

Shapes, as suffixes: B batch, S source length, D width, H query heads, R buckets of a table, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calledshot.model.block import stacked
from calledshot.recipe.derived import Shape, Stack


@dataclass(frozen=True)
class EncoderInputs:
    """What the encoder reads, all (B, S)."""

    tokens_BS: Tensor
    positions_BS: Tensor | None = None
    """0, 1, 2, ... where None."""
    documents_BS: Tensor | None = None
    """-1 on padding; one document a row where None."""


class Encoder(nn.Module):
    """The stack that reads both ways."""

    def __init__(self, model: Shape, stack: Stack) -> None:
        super().__init__()
        own = stack.width != model.width
        self.embedding_VD = nn.Parameter(torch.empty(model.vocabulary, stack.width)) if own else None
        self.blocks = stacked(model, stack)
        self.final_norm_D = None if model.norm_placement == "post" else nn.Parameter(torch.empty(stack.width))
        self.relative_bias_HR = nn.Parameter(torch.empty(stack.heads, 32)) if model.positions == "t5" else None


def pool(x_BSD: Tensor, positions_BS: Tensor, documents_BS: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Neighbours averaged in pairs: states, positions and documents of half the length (Funnel, arXiv 2006.03236).

    A pair stands where its first token does and belongs to that one's document; a second token of another document
    counts for nothing, so documents must begin at even places (`objective` sees to it).
    """
    if x_BSD.size(1) % 2:
        x_BSD, positions_BS = F.pad(x_BSD, (0, 0, 0, 1)), F.pad(positions_BS, (0, 1))
        if documents_BS is None:
            documents_BS = torch.zeros_like(positions_BS)
            documents_BS[:, -1] = -1
        else:
            documents_BS = F.pad(documents_BS, (0, 1), value=-1)
    if documents_BS is None:
        return x_BSD.unflatten(1, (-1, 2)).mean(2), positions_BS[:, ::2], None
    first, second = documents_BS[:, ::2], documents_BS[:, 1::2]
    together = (first == second).to(x_BSD.dtype).unsqueeze(-1)
    mean = (x_BSD[:, ::2] + x_BSD[:, 1::2] * together) / (1 + together)
    return mean, positions_BS[:, ::2], first
