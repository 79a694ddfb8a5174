"""Products of rows sorted by expert with the matrix of each row's expert.

Shapes, as suffixes: R rows, I width in, O width out, E experts. Rows of expert e are those from ends[e - 1] to ends[e];
what lies behind the last end belongs to nobody.

Both products are opaque to `torch.compile`: their shapes are fixed, so a compiled block holds them as calls.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNMENT = 16
"""Bytes that PyTorch's grouped product wants addresses and rows to be multiples of."""


def _has_kernel(*operands: Tensor) -> bool:
    """Whether `F.grouped_mm` takes these. It asks CUDA devices for bfloat16 and compute capability 8."""
    like = operands[0]
    if like.device.type == "cpu":
        known = like.dtype in (torch.bfloat16, torch.float32)
    elif like.device.type == "cuda":
        known = like.dtype == torch.bfloat16 and torch.cuda.get_device_capability(like.device) >= (8, 0)
    else:
        known = False
    strides = {stride for each in operands for stride in each.stride() if stride != 1}
    offsets = [stride * like.element_size() for stride in strides] + [each.data_ptr() for each in operands]
    return known and all(offset % ALIGNMENT == 0 for offset in offsets)


@torch.library.custom_op("calledshot::grouped_linear", mutates_args=())
def grouped_linear(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    """Each row by the transpose of its expert's matrix, (R, O); rows of nobody are zero. `ends_E` is int32."""
    weight_EIO = weight_EOI.transpose(1, 2)
    if _has_kernel(x_RI, weight_EIO):
        y_RO = F.grouped_mm(x_RI, weight_EIO, offs=ends_E)
        if x_RI.device.type == "cpu":
            y_RO[int(ends_E[-1]) :] = 0  # elsewhere reading the end would wait for the device
        return y_RO
    y_RO = x_RI.new_empty(x_RI.size(0), weight_EOI.size(1))
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        if end > start:
            torch.mm(x_RI[start:end], weight_EIO[expert], out=y_RO[start:end])
        start = end
    y_RO[start:] = 0
    return y_RO


@torch.library.custom_op("calledshot::grouped_outer", mutates_args=())
def grouped_outer(g_RO: Tensor, x_RI: Tensor, ends_E: Tensor) -> Tensor:
    """Sum over each expert's rows of their outer products, (E, O, I); exactly zero for an expert without rows."""
    if _has_kernel(g_RO, x_RI):
        return F.grouped_mm(g_RO.T, x_RI, offs=ends_E)
    sums_EOI = x_RI.new_empty(len(ends_E), g_RO.size(1), x_RI.size(1))
    start = 0
    for expert, end in enumerate(ends_E.tolist()):
        torch.mm(g_RO[start:end].T, x_RI[start:end], out=sums_EOI[expert])
        start = end
    return sums_EOI


@grouped_linear.register_fake
def _(x_RI: Tensor, weight_EOI: Tensor, ends_E: Tensor) -> Tensor:
    del ends_E
    return x_RI.new_empty(x_RI.size(0), weight_EOI.size(1))


@grouped_outer.register_fake
def _(g_RO: Tensor, x_RI: Tensor, ends_E: Tensor) -> Tensor:
    return x_RI.new_empty(ends_E.size(0), g_RO.size(1), x_RI.size(1))


def _keep(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx, g_RO):
    x_RI, weight_EOI, ends_E = ctx.saved_tensors
    g_RO = g_RO.contiguous()
    g_RI = grouped_linear(g_RO, weight_EOI.transpose(1, 2), ends_E) if ctx.needs_input_grad[0] else None
    g_EOI = grouped_outer(g_RO, x_RI, ends_E) if ctx.needs_input_grad[1] else None
    return g_RI, g_EOI, None


grouped_linear.register_autograd(_gradients, setup_context=_keep)
