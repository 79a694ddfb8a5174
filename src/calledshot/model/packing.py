"""Matrices kept as oneDNN's products want them, which otherwise bring them into that order at each product.

These are the operators that `torch.compile` uses for frozen weights; they have no public name.
"""

from __future__ import annotations

import platform

import torch
from torch import Tensor


def can_pack(weight: Tensor) -> bool:
    """Whether products with such a weight are known to gain: x86 CPUs, float32, and bfloat16 where they have it."""
    if weight.device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def pack(weight_ND: Tensor) -> Tensor:
    """An opaque copy for `packed_linear`."""
    return torch.ops.mkldnn._reorder_linear_weight(weight_ND.detach().contiguous())


def packed_linear(x: Tensor, packed: Tensor) -> Tensor:
    """`F.linear` without bias; `x` (..., D) in the weight's dtype."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
