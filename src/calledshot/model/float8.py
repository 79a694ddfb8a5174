"""Products in float8 with one scale a tensor, taken from its largest entry at the moment (Micikevicius et al. 2022,
arXiv 2209.05433): inputs and weights as e4m3, gradients, whose range is wider, as e5m2; sums and results as ever.

Shapes: N rows, I width in, O width out.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16
"""Sizes have to be multiples of so many entries for the kernels."""


def has_float8(device: torch.device) -> bool:
    """Whether it can pay: on GPUs from Ada and Hopper on (compute capability 8.9). CPUs have slow kernels."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def float8_linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """`F.linear` with the products in float8, forwards and backwards; in the tensors' own type where a size does not
    suit the kernels. Keeps one byte an entry of the inputs for the backward instead of two.
    """
    rows = x.numel() // x.size(-1)
    if any(size % ALIGNMENT for size in (rows, *weight_OI.shape)):
        return F.linear(x, weight_OI)
    return _Float8Linear.apply(x.reshape(-1, x.size(-1)), weight_OI).view(*x.shape[:-1], -1)


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`x` in a float8 type, scaled so that its largest entry is the type's, and what to multiply by to undo that."""
    largest = torch.finfo(dtype).max
    inverse = x.abs().amax().float().clamp(min=1e-12) / largest
    return (x.float() / inverse).clamp(-largest, largest).to(dtype), inverse


def _product(a: Tensor, b_transposed: Tensor, scale_a: Tensor, scale_b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b, b given transposed and contiguous, as the kernel wants it."""
    return torch._scaled_mm(a, b_transposed.t(), scale_a=scale_a, scale_b=scale_b, out_dtype=dtype)


class _Float8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NI, weight_OI):
        x8_NI, x_scale = quantize(x_NI, torch.float8_e4m3fn)
        weight8_OI, weight_scale = quantize(weight_OI, torch.float8_e4m3fn)
        ctx.save_for_backward(x8_NI, x_scale, weight8_OI, weight_scale)
        return _product(x8_NI, weight8_OI, x_scale, weight_scale, x_NI.dtype)

    @staticmethod
    def backward(ctx, g_NO):
        x8_NI, x_scale, weight8_OI, weight_scale = ctx.saved_tensors
        g8_NO, g_scale = quantize(g_NO, torch.float8_e5m2)
        g_NI = _product(g8_NO, weight8_OI.t().contiguous(), g_scale, weight_scale, g_NO.dtype)
        g_OI = _product(g8_NO.t().contiguous(), x8_NI.t().contiguous(), g_scale, x_scale, g_NO.dtype)
        return g_NI, g_OI
