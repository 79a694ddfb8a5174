"""Whole matrices out of what several ranks keep of them, for an optimizer that has to see them whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from calledshot.training.slots import Slot
from calledshot.training.world import World


class Matrices:
    """Slots whose matrices (last two axes) have one shape, up to transposition."""

    def __init__(self, slots: Sequence[Slot], world: World) -> None:
        """Either all of them are FSDP's or none."""
        self.slots, self.tensor = list(slots), world.tensor
        self.shards: dist.ProcessGroup | None = None
        if self.slots and self.slots[0].sharded:
            assert world.mesh is not None
            self.shards = world.mesh.get_group(world.mesh.ndim - 1)

    def map(self, function: Callable[[Tensor], Tensor], flats: Sequence[Tensor]) -> list[Tensor]:
        """`function` of all matrices, stacked as (N, rows, columns), of which rows are not more than columns.

        `flats` hold each slot's piece, flat, and so does the result. Each matrix is worked on by one rank of those that
        share it by FSDP.
        """
        parts = self._gathered(flats) if self.shards is not None else list(map(_as_matrices, self.slots, flats))
        whole = self._joined(parts)
        turned = [each.mT if each.size(-2) > each.size(-1) else each for each in whole]
        stacked = torch.cat(turned)
        if len(stacked):
            stacked = function(stacked) if self.shards is None else self._spread(function, stacked)
        results = []
        for slot, each, before in zip(self.slots, stacked.split([len(one) for one in turned]), whole, strict=True):
            matrices = each.mT if before.size(-2) > before.size(-1) else each
            if (axis := _cut_axis(slot)) is not None:
                matrices = matrices.chunk(slot.piece.parts, axis)[slot.piece.part]
            flat = matrices.contiguous().view(-1)
            if self.shards is not None:
                flat = flat[slot.piece.start * slot.piece.width : slot.piece.stop * slot.piece.width]
            results.append(flat)
        return results

    def _gathered(self, flats: Sequence[Tensor]) -> list[Tensor]:
        """Each slot's part with all its rows, of which FSDP gave every rank equally many until there were no more."""
        ranks = dist.get_world_size(self.shards)
        sizes = [-(-slot.piece.height // ranks) * slot.piece.width for slot in self.slots]
        padded = [torch.cat([flat, flat.new_zeros(size - len(flat))]) for flat, size in zip(flats, sizes, strict=True)]
        sent = torch.cat(padded)
        received = sent.new_empty(ranks * len(sent))
        dist.all_gather_into_tensor(received, sent, group=self.shards)
        segments = received.view(ranks, -1).split(sizes, 1)
        return [
            segment.reshape(-1)[: slot.piece.height * slot.piece.width].view(-1, *slot.piece.part_shape[-2:])
            for slot, segment in zip(self.slots, segments, strict=True)
        ]

    def _joined(self, parts: list[Tensor]) -> list[Tensor]:
        """Matrices that the tensor's group cut, put together again."""
        cut = [number for number, slot in enumerate(self.slots) if _cut_axis(slot) is not None]
        if not cut:
            return parts
        ranks = dist.get_world_size(self.tensor)
        sent = torch.cat([parts[number].reshape(-1) for number in cut])
        received = sent.new_empty(ranks * len(sent))
        dist.all_gather_into_tensor(received, sent, group=self.tensor)
        segments = received.view(ranks, -1).split([parts[number].numel() for number in cut], 1)
        for number, segment in zip(cut, segments, strict=True):
            pieces = [row.view(parts[number].shape) for row in segment]
            parts[number] = torch.cat(pieces, _cut_axis(self.slots[number]) or -1)
        return parts

    def _spread(self, function: Callable[[Tensor], Tensor], stacked: Tensor) -> Tensor:
        """`function`, each matrix on one of the ranks that all have them."""
        ranks, rank = dist.get_world_size(self.shards), dist.get_rank(self.shards)
        share = -(-len(stacked) // ranks)
        mine = stacked[rank * share : (rank + 1) * share]
        done = torch.zeros_like(stacked[:1]).expand(share, -1, -1).contiguous()
        if len(mine):
            done[: len(mine)] = function(mine)
        received = done.new_empty(ranks * share, *stacked.shape[1:])
        dist.all_gather_into_tensor(received, done, group=self.shards)
        return received[: len(stacked)]


def _as_matrices(slot: Slot, flat: Tensor) -> Tensor:
    shape = slot.piece.part_shape[-2:]
    return flat.view(len(flat) // math.prod(shape), *shape)


def _cut_axis(slot: Slot) -> int | None:
    """Axis of its matrices, -2 or -1, that a tensor's group cuts a slot along; None for none of them."""
    axis = slot.piece.axis
    return axis - len(slot.piece.shape) if axis is not None and axis >= len(slot.piece.shape) - 2 else None
