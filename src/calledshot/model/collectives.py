"""What ranks that compute one model together tell each other, in ways that autograd and the compiler understand.

The sums and gatherings are PyTorch's functional collectives, which a compiled block holds as they are; rows of experts,
whose numbers are only known by then, go through operators of our own.

Shapes, as suffixes: P ranks, E experts of all ranks, L = E / P experts of one, D width, A choices of this rank's tokens
sorted by expert, R rows that this rank's experts get, sorted by expert and padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.distributed.distributed_c10d import _resolve_process_group

_collective = torch.ops._c10d_functional


@dataclass(frozen=True)
class Group:
    """A process group, by what compiled code may hold of it."""

    name: str
    rank: int
    """This process's place in it."""
    size: int

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Group:
        """Of a group that this process is in."""
        return cls(group.group_name, group.rank(), group.size())


def sum_over(x: Tensor, group: Group) -> Tensor:
    """The sum of all ranks' `x`, on each of them; without a gradient."""
    return _collective.wait_tensor(_collective.all_reduce(x.contiguous(), "sum", group.name))


def gather_over(x: Tensor, group: Group, dim: int) -> Tensor:
    """All ranks' `x` one after another along `dim`; without a gradient."""
    gathered = _collective.wait_tensor(_collective.all_gather_into_tensor(x.contiguous(), group.size, group.name))
    return gathered.unflatten(0, (group.size, -1)).movedim(0, dim).flatten(dim, dim + 1)


class _Copy(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return sum_over(gradients[0], ctx.group), None


class _Reduce(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return sum_over(x, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return gather_over(x, group, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        group, dim = ctx.group, ctx.dim
        by_rank = gradients[0].unflatten(dim, (group.size, -1)).movedim(dim, 0).flatten(0, 1).contiguous()
        mine = _collective.reduce_scatter_tensor(by_rank, "sum", group.size, group.name)
        return _collective.wait_tensor(mine), None, None


def copy_to(x: Tensor, group: Group | None) -> Tensor:
    """`x`, which all ranks of the group have alike, on its way to where each does something else with it: its gradient
    is the sum of theirs. (Shoeybi et al. 2019, arXiv 1909.08053: "f".)
    """
    return x if group is None else _Copy.apply(x, group)


def reduce_from(x: Tensor, group: Group | None) -> Tensor:
    """The sum of the ranks' parts, which all go on with alike (the same paper's "g")."""
    return x if group is None else _Reduce.apply(x, group)


def gather_from(x: Tensor, group: Group | None, dim: int) -> Tensor:
    """The ranks' parts one after another along `dim`; each part's gradient is the sum of what all ranks made of it."""
    return x if group is None else _Gather.apply(x, group, dim)


# Rows of experts


@torch.library.custom_op("calledshot::exchange_plan", mutates_args=())
def exchange_plan(counts_E: Tensor, group: str, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Who gets how many rows from whom, from the choices that this rank's tokens made of each expert.

    Returns where each of this rank's rows (R,) stands among those that arrive, rank by rank, or their number where it
    is padding; the ends (L,) of its experts' rows, int32, each a multiple of `tile`; and the rows that it sends to and
    gets from each rank, both (P,) and on the CPU.
    """
    process_group = _resolve_process_group(group)
    P, device = process_group.size(), counts_E.device
    arriving_E = torch.empty_like(counts_E)
    dist.all_to_all_single(arriving_E, counts_E, group=process_group)
    # One wait for the device, here, serves the exchanges there and back and those of the gradients.
    sent_PL, arriving_PL = torch.stack((counts_E, arriving_E)).view(2, P, -1).cpu()
    padded_L = (arriving_PL.sum(0) + tile - 1) // tile * tile
    ends_L = padded_L.cumsum(0)
    total = int(arriving_PL.sum())
    # A group of a rank and an expert arrives whole; within its expert it stands behind those of the ranks before.
    begin_PL = (ends_L - padded_L) + arriving_PL.cumsum(0) - arriving_PL
    sizes_G = arriving_PL.flatten()
    shift_G = begin_PL.flatten() - (sizes_G.cumsum(0) - sizes_G)
    place_A = torch.arange(total) + shift_G.repeat_interleave(sizes_G)
    # Never empty: kernels need not know products of no rows.
    source_R = torch.full((max(int(ends_L[-1]), tile),), total)
    source_R[place_A] = torch.arange(total)
    return source_R.to(device), ends_L.int().to(device), sent_PL.sum(1), arriving_PL.sum(1)


@exchange_plan.register_fake
def _(counts_E: Tensor, group: str, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    P = _resolve_process_group(group).size()
    rows = torch.library.get_ctx().new_dynamic_size()
    ends_L = counts_E.new_empty(counts_E.size(0) // P, dtype=torch.int32)
    sent_P, arriving_P = (torch.empty(P, dtype=torch.int64, device="cpu") for _ in range(2))
    return counts_E.new_empty(rows), ends_L, sent_P, arriving_P


@torch.library.custom_op("calledshot::send_rows", mutates_args=())
def send_rows(x_AD: Tensor, source_R: Tensor, sent_P: Tensor, arriving_P: Tensor, group: str) -> Tensor:
    """Each choice's row to the rank of its expert; returns what this rank's experts got (R, D), zero where padded."""
    sent, arriving = sent_P.tolist(), arriving_P.tolist()
    total = sum(arriving)
    arrived_AD = x_AD.new_empty(total + 1, x_AD.size(1))
    arrived_AD[total] = 0
    process_group = _resolve_process_group(group)
    dist.all_to_all_single(arrived_AD[:total], x_AD.contiguous(), arriving, sent, process_group)
    return arrived_AD.index_select(0, source_R)


@send_rows.register_fake
def _(x_AD: Tensor, source_R: Tensor, sent_P: Tensor, arriving_P: Tensor, group: str) -> Tensor:
    return x_AD.new_empty(source_R.size(0), x_AD.size(1))


@torch.library.custom_op("calledshot::return_rows", mutates_args=())
def return_rows(y_RD: Tensor, source_R: Tensor, sent_P: Tensor, arriving_P: Tensor, group: str, choices: int) -> Tensor:
    """The way back of `send_rows`: what the experts made of each choice's row, (A, D)."""
    sent, arriving = sent_P.tolist(), arriving_P.tolist()
    total = sum(arriving)
    # Padding goes to one row more, which stays here.
    leaving_AD = y_RD.new_empty(total + 1, y_RD.size(1)).index_copy_(0, source_R, y_RD)
    y_AD = y_RD.new_empty(choices, y_RD.size(1))
    dist.all_to_all_single(y_AD, leaving_AD[:total], sent, arriving, _resolve_process_group(group))
    return y_AD


@return_rows.register_fake
def _(y_RD: Tensor, source_R: Tensor, sent_P: Tensor, arriving_P: Tensor, group: str, choices: int) -> Tensor:
    return y_RD.new_empty(choices, y_RD.size(1))


def _keep_plan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:4])
    ctx.group, ctx.choices = inputs[4], inputs[0].size(0)


send_rows.register_autograd(
    lambda ctx, g_RD: (return_rows(g_RD, *ctx.saved_tensors, ctx.group, ctx.choices), None, None, None, None),
    setup_context=_keep_plan,
)
return_rows.register_autograd(
    lambda ctx, g_AD: (send_rows(g_AD, *ctx.saved_tensors, ctx.group), None, None, None, None, None),
    setup_context=_keep_plan,
)
