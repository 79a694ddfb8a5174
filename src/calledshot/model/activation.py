"""What stands between the matrices of a feed-forward, dense or sparse."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from calledshot.recipe.derived import GATED


def activate(x: Tensor, kind: str) -> Tensor:
    """(..., F) to the same, or from (..., 2 F) where `kind` is gated: gate and up side by side (Shazeer 2020, arXiv
    2002.05202). GELU is the tanh form, as T5 1.1's. Squared ReLU is So et al. 2021, arXiv 2109.08668.
    """
    if kind in GATED:
        gate, up = x.chunk(2, -1)
        return (F.silu(gate) if kind == "swiglu" else F.gelu(gate, approximate="tanh")) * up
    return F.gelu(x, approximate="tanh") if kind == "gelu" else F.relu(x).square()
