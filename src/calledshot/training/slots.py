"""Parameters as the optimizer sees them: what the model computes with, the float32 truth, and who keeps which part.

Where several ranks hold a weight whole, each keeps the float32 master and the optimizer's state of some of its rows and
updates those (ZeRO stage 1, Rajbhandari et al. 2020, arXiv 1910.02054); under FSDP2 a rank holds nothing else anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from calledshot.training.pieces import Piece
from calledshot.training.world import World


@dataclass
class Slot:
    """One parameter, or this rank's piece of it."""

    name: str
    group: str
    """One of `recipe.transfer.GROUPS`."""
    working: nn.Parameter
    """What the model computes with: all of this rank's part, or under FSDP the piece itself, as a DTensor."""
    master: Tensor
    """float32."""
    piece: Piece
    """Which part of the parameter the master is."""
    copies: int = 1
    """Ranks that keep the same piece."""
    gradient: Tensor | None = None
    """Of the present step: of all of the part until it is exchanged, then of the piece."""
    state: dict[str, Tensor] = field(default_factory=dict)

    @property
    def sharded(self) -> bool:
        """Whether FSDP shares it out."""
        return isinstance(self.working, DTensor)

    def rows(self) -> Tensor:
        """The piece's elements of the working copy, flat."""
        if isinstance(self.working, DTensor):
            return self.working.detach().to_local().view(-1)
        width = self.piece.width
        return self.working.data.view(-1)[self.piece.start * width : self.piece.stop * width]

    def flat(self) -> tuple[Tensor, Tensor]:
        """Working copy and master, flat; one tensor where the parameter is its own master, since the compiler takes no
        two views of one memory.
        """
        master, rows = self.master.view(-1), self.rows()
        return (master if rows.data_ptr() == master.data_ptr() else rows), master

    def collect(self) -> None:
        """Take over the gradient that a backward pass left; the second and later micro-batches add up in float32."""
        gradient, self.working.grad = self.working.grad, None
        if gradient is None:
            if not self.piece.numel:
                self.gradient = self.master
                return
            raise RuntimeError(f"{self.name} got no gradient")
        if isinstance(gradient, DTensor):
            self.gradient = gradient.to_local()
        elif self.gradient is None:
            self.gradient = gradient
        else:
            if self.gradient.dtype != torch.float32:
                self.gradient = self.gradient.float()
            self.gradient.add_(gradient)


MATRICES = ("matrix", "encoder_matrix")
"""Groups that weights decay in, and that Muon is for."""


def group_of(name: str) -> str:
    """Group of learning rates that a parameter of the trunk belongs to."""
    kind = name.rpartition(".")[2]
    if kind == "embedding_VD":
        return "encoder_embedding" if name.startswith("encoder.") else "embedding"
    if kind == "separate_head_VD":
        return "head"
    # A table of positions adds to scores as it is: its rate must not fall with the width, as that of a matrix.
    if kind.endswith(("norm_D", "norm_C", "relative_bias_HR")):
        return "vector"
    return "encoder_matrix" if name.startswith("encoder.") or kind == "cross_key_value_K2CD" else "matrix"


def is_matrix(name: str, shape: Sequence[int]) -> bool:
    """Whether Muon is for it: a matrix of the blocks with one row or column has no orthogonalisation worth its name."""
    return group_of(name) in MATRICES and min(shape[-2:]) > 1


def own(whole: Tensor, piece: Piece) -> Tensor:
    """A piece of a whole tensor, in the piece's local shape; a view where it can be."""
    part = whole if piece.axis is None else whole.chunk(piece.parts, piece.axis)[piece.part]
    if (piece.start, piece.stop) == (0, piece.height):
        return part
    part = part.reshape(-1, piece.width) if part.dim() > 1 else part
    return part[piece.start : piece.stop]


def divide(parts: Mapping[str, Piece], ranks: int) -> dict[str, list[tuple[int, int]]]:
    """Rows of each parameter that each rank keeps, about equally many elements each; a rank's rows of what Muon
    orthogonalises are whole matrices.

    What Muon updates, which costs far more, is divided apart from the rest.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for muon in (True, False):
        names = [name for name, part in parts.items() if is_matrix(name, part.shape) == muon]
        total = sum(parts[name].numel for name in names)
        bounds, before = [0] * (ranks - 1), {}
        elements = rows = 0
        for name in names:
            part, unit = parts[name], parts[name].part_shape[-2] if muon else 1
            before[name] = rows
            for number in range(ranks - 1):
                inside = total * (number + 1) // ranks - elements
                if 0 <= inside <= part.numel:
                    bounds[number] = rows + min(part.height, round(inside / part.width / unit) * unit)
            elements, rows = elements + part.numel, rows + part.height
        for name in names:
            height = parts[name].height
            places = [min(max(bound - before[name], 0), height) for bound in (0, *bounds, rows)]
            found[name] = list(pairwise(places))
    return found


class Exchange:
    """What the ranks of a group, which all hold the same weights, send each other each step: gradients to the rank that
    updates a row, and the updated rows back.

    Gradients travel in the type that they were made in and are added up in float32, always in the order of the ranks,
    so that the same ranks give the same bits. One all-to-all is, over gloo, a quarter of a reduce-scatter's time and
    half of an all-reduce's.
    """

    def __init__(self, group: dist.ProcessGroup, slots: Sequence[Slot], cuts: Mapping[str, list[tuple[int, int]]]):
        self.group, self.slots, self.cuts = group, list(slots), cuts
        self.size = dist.get_world_size(group)

    def reduce(self) -> None:
        """From each slot's own gradient of the whole part to the sum over the ranks of that of its piece."""
        kinds: dict[torch.dtype, list[Slot]] = {}
        for slot in self.slots:
            assert slot.gradient is not None
            kinds.setdefault(slot.gradient.dtype, []).append(slot)
        for slots in kinds.values():
            own = sum(slot.piece.numel for slot in slots)
            flat = [slot.gradient.reshape(-1) for slot in slots]  # ty: ignore
            segments = [
                [each[start * slot.piece.width : stop * slot.piece.width] for slot, each, (start, stop) in row]
                for row in (
                    [(slot, each, self.cuts[slot.name][rank]) for slot, each in zip(slots, flat, strict=True)]
                    for rank in range(self.size)
                )
            ]
            sent = torch.cat([each for row in segments for each in row])
            sizes = [sum(len(each) for each in row) for row in segments]
            received = sent.new_empty(self.size * own)
            dist.all_to_all_single(received, sent, [own] * self.size, sizes, group=self.group)
            parts = received.view(self.size, own)
            total = parts[0].float() if parts.dtype != torch.float32 else parts[0]
            for part in parts[1:]:
                total.add_(part)
            for slot, piece in zip(slots, total.split([slot.piece.numel for slot in slots]), strict=True):
                slot.gradient = piece.view(slot.master.shape)

    def share(self) -> None:
        """The rows that each rank updated, into everybody's working copies."""
        kinds: dict[torch.dtype, list[Slot]] = {}
        for slot in self.slots:
            kinds.setdefault(slot.working.dtype, []).append(slot)
        for slots in kinds.values():
            sizes = [
                [(stop - start) * slot.piece.width for slot in slots for start, stop in [self.cuts[slot.name][rank]]]
                for rank in range(self.size)
            ]
            longest = max(map(sum, sizes))
            sent = torch.cat([slot.rows() for slot in slots])
            sent = torch.cat([sent, sent.new_empty(longest - len(sent))])
            received = sent.new_empty(self.size * longest)
            dist.all_gather_into_tensor(received, sent, group=self.group)
            for rank, segment in enumerate(received.view(self.size, longest)):
                pieces = segment[: sum(sizes[rank])].split(sizes[rank])
                for slot, piece in zip(slots, pieces, strict=True):
                    start = self.cuts[slot.name][rank][0] * slot.piece.width
                    slot.working.data.view(-1)[start : start + len(piece)].copy_(piece)


def make_slots(model: nn.Module, masters: Mapping[str, Tensor]) -> list[Slot]:
    """Slots of a model that is all here; where the working dtype is float32, the parameter is its own master."""
    slots = []
    for name, parameter in model.named_parameters():
        master = parameter.data if parameter.dtype == torch.float32 else masters[name]
        slots.append(Slot(name, group_of(name), parameter, master, Piece.whole(tuple(master.shape))))
    return slots


def shared_slots(
    model: nn.Module,
    parts: Mapping[str, Piece],
    world: World,
    apart: Iterable[str],
    dtype: torch.dtype,
    draw: Callable[[str, Tensor], None],
) -> tuple[list[Slot], list[Exchange]]:
    """Slots of a model whose parameters are empty and float32, and what ranks that hold the same ones exchange.

    `draw` fills a parameter, given whole, in the order of `named_parameters`; the values become the masters. The
    parameters then are in `dtype`, but for those that stay float32 by themselves and FSDP's, which FSDP casts as it
    gathers them. `parts` says which part of each parameter this rank has, and `apart` which belong to experts that
    other ranks do not have.
    """
    apart = set(apart)
    named = dict(model.named_parameters())
    replicated = [name for name, parameter in named.items() if not isinstance(parameter, DTensor)]
    groups: list[tuple[dist.ProcessGroup, list[str]]] = []
    cuts: dict[str, list[tuple[int, int]]] = {}
    pieces = dict(parts)
    for group, names in (
        (world.dense, [name for name in replicated if name not in apart]),
        (world.expert_dense, [name for name in replicated if name in apart]),
    ):
        if group is not None and names:
            cuts |= divide({name: parts[name] for name in names}, dist.get_world_size(group))
            groups.append((group, names))
            pieces |= {name: parts[name].rows(*cuts[name][dist.get_rank(group)]) for name in names}
    masters: dict[str, Tensor] = {}
    for name, parameter in named.items():
        if isinstance(parameter, DTensor):
            assert world.mesh is not None
            ranks, rank = world.mesh.size(-1), world.mesh.get_local_rank(world.mesh.ndim - 1)
            height, rows = parts[name].height, -(-parts[name].height // ranks)
            pieces[name] = parts[name].rows(min(rank * rows, height), min((rank + 1) * rows, height))
            local = parameter.detach().to_local()
        else:
            local = parameter.data
        if local.shape == parts[name].shape:
            draw(name, local)
        else:
            whole = local.new_empty(parts[name].shape)
            draw(name, whole)
            local.copy_(own(whole, pieces[name] if isinstance(parameter, DTensor) else parts[name]).view_as(local))
        masters[name] = local if isinstance(parameter, DTensor) else _rows(local, pieces[name])
    if len(replicated) < len(named):
        for name in replicated:
            if not name.endswith("router_ED"):
                named[name].data = named[name].data.to(dtype)
    else:
        model.to(dtype)
    slots = []
    for name, parameter in model.named_parameters():
        master, piece = masters[name], pieces[name]
        if isinstance(parameter, DTensor):
            pass
        elif parameter.dtype == torch.float32:
            master = _rows(parameter.data, piece)
        elif piece != parts[name]:
            master = master.clone()  # as a view it would keep all of the float32 part in memory
        copies = 1 if name in apart or piece.axis is not None else world.layout.tensor
        if isinstance(parameter, DTensor):
            copies *= world.layout.replicate
        slots.append(Slot(name, group_of(name), parameter, master, piece, copies))
    by_name = {slot.name: slot for slot in slots}
    return slots, [Exchange(group, [by_name[name] for name in names], cuts) for group, names in groups]


def _rows(part: Tensor, piece: Piece) -> Tensor:
    """A view of a piece in the part that it belongs to."""
    return own(part, Piece.cut(piece.part_shape).rows(piece.start, piece.stop))
