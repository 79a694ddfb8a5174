"""What computes: a model, its optimizer and one update, on one rank or on this one of many."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from calledshot.data import Tokenizer
from calledshot.model import BatchTensors, Decoder, batch_nats, continuing
from calledshot.model.float8 import has_float8
from calledshot.objective import Batch
from calledshot.recipe import Recipe, UsageError, shape
from calledshot.training import state
from calledshot.training.optimizer import Optimizer
from calledshot.training.parallelize import apart, parallelize
from calledshot.training.pieces import Piece
from calledshot.training.probe import Machine
from calledshot.training.slots import shared_slots
from calledshot.training.world import World


@dataclass(frozen=True)
class Updated:
    """What came of a step, the same on all ranks."""

    loss: float
    """Nats per weighted token."""
    z_loss: float
    gradient_norm: float
    squares: Mapping[str, float] | None
    """The updates' squared norms by parameter; None where something was not finite and nothing was updated."""
    flags: tuple[bool, ...] = ()
    """Whether some rank said so."""
    load_LE: Tensor | None = None
    """Share of the choices that each expert of each layer got."""

    @property
    def update_norm(self) -> float | None:
        """Of all parameters together."""
        return None if self.squares is None else math.sqrt(sum(self.squares.values()))


class Engine:
    """The training state of a run on this rank, and its step."""

    def __init__(self, recipe: Recipe, chosen: Machine, world: World, tokenizer: Tokenizer, folder: Path) -> None:
        """`recipe` is resolved; `folder` is the run's, where code of the user's own lies."""
        self.recipe, self.chosen, self.world = recipe, chosen, world
        self.rows_per_batch = recipe.batch.tokens // shape(recipe.model).row_positions
        """Of all ranks, once the batch has its full size."""
        self.micro_rows, self.micro_batches = self.passes(self.rows_per_batch)
        self.tokenizer, self.folder = tokenizer, folder
        self.build()

    def passes(self, rows: int) -> tuple[int, int]:
        """Rows of a forward pass, and passes, of each rank where a global batch has so many rows."""
        share = -(-rows // self.world.layout.data)
        together = min(self.chosen.micro_tokens // shape(self.recipe.model).row_positions, share)
        return together, -(-share // together)

    def share(self, rows: int) -> tuple[int, int]:
        """Which rows of so many in a global batch are this rank's."""
        number, total = self.world.data_rank, self.world.layout.data
        return rows * number // total, rows * (number + 1) // total

    @property
    def rows(self) -> tuple[int, int]:
        """Rows of a batch of full size that are this rank's."""
        return self.share(self.rows_per_batch)

    def build(self) -> None:
        """A freshly initialised model with its masters and optimizer: the same weights for any number of ranks."""
        recipe, world, device = self.recipe, self.world, self.world.device
        dtype = getattr(torch, self.chosen.dtype)
        with torch.device("meta"):
            model = Decoder(recipe.model)
        mode = recipe.parallel.activation_checkpointing
        parts = parallelize(model, world, dtype=dtype, checkpointing=mode, compiled=self.chosen.compile)
        model.to_empty(device=device)
        generator = torch.Generator(device).manual_seed(recipe.seed)

        def draw(name: str, whole: Tensor) -> None:
            model.initial(name, whole, generator)

        slots, exchanges = shared_slots(model, parts, world, apart(model, world), dtype, draw)
        for buffer in model.buffers():
            buffer.zero_()
        model.reading = continuing(recipe, self.tokenizer)
        model.blocked_attention = device.type == "cpu" and self.chosen.compile
        if recipe.parallel.float8:
            if not has_float8(device):
                raise UsageError(f"parallel.float8 = true: {device} has no quick float8; set parallel.float8=false")
            for block in model.all_blocks:
                block.float8 = True
        self.model = model
        self.optimizer = Optimizer(
            slots, recipe, compiled=self.chosen.compile, folder=self.folder, world=world, exchanges=exchanges,
            dtype=dtype,
        )  # fmt: skip

    def masters(self) -> dict[str, tuple[Tensor, Piece]]:
        """The float32 truth by name, buffers with it, and which part of it is here."""
        buffers = {name: (each, Piece.whole(tuple(each.shape))) for name, each in self.model.named_buffers()}
        return {slot.name: (slot.master, slot.piece) for slot in self.optimizer.slots} | buffers

    def restore(self, folder: Path, *, with_optimizer: bool) -> None:
        """Takes this rank's part of a checkpoint, whatever number of ranks wrote it."""
        masters = self.masters()
        if unknown := sorted(set(state.stored(folder, state.MODEL)) - set(masters)):
            raise UsageError(
                f"{folder}: holds {unknown[0]} and {len(unknown) - 1} more that the recipe's model has no place for; "
                "fork with the model section of the run it comes from"
            )
        wanted = {name: piece for name, (_, piece) in masters.items()}
        for name, tensor in state.read_pieces(folder, state.MODEL, wanted, self.world.device).items():
            masters[name][0].copy_(tensor.view_as(masters[name][0]))
        with torch.no_grad():
            for slot in self.optimizer.slots:
                slot.rows().copy_(slot.master.view(-1))
            for exchange in self.optimizer.exchanges:
                exchange.share()
        if with_optimizer:
            wanted = self.optimizer.wanted(state.stored(folder, state.OPTIMIZER))
            self.optimizer.load_state(state.read_pieces(folder, state.OPTIMIZER, wanted, self.world.device))

    def update(
        self, batch: Batch, number: int, factor: float, flags: Iterable[bool] = (), rows: int | None = None
    ) -> Updated:
        """Update `number` (from 1) on this rank's rows, at `factor` of the peak learning rates; `rows` is how many the
        global batch has, where it has not its full size. Gradients stay until `optimizer.clear`.
        """
        micro_rows, micro_batches = self.passes(self.rows_per_batch if rows is None else rows)
        world, device, optimizer = self.world, self.world.device, self.optimizer
        tensors = BatchTensors.of(batch, device)
        total = tensors.weights.sum()
        rows_weights = tensors.weights  # of the whole rows, where this rank has some of their positions
        if world.size > 1:
            tensors, rows_weights = self._share(tensors, micro_rows * micro_batches)
            total = tensors.weights.sum()
            if world.dense is not None:
                dist.all_reduce(total, group=world.dense)
        scale = 1.0 / total.clamp(min=1.0)
        loss = torch.zeros((), device=device)
        z_loss = torch.zeros((), device=device)
        loads: list[Tensor] = []
        for start in range(0, micro_rows * micro_batches, micro_rows):
            part = tensors.rows(start, start + micro_rows)
            micro_loss, micro_z = self.model.loss(
                part.inputs, part.targets, part.weights, scale, self.recipe.objective.z_loss, **part.reading
            )
            whole = micro_loss + micro_z
            if self.model.records:
                share = rows_weights[start : start + micro_rows].sum() * scale
                whole = whole + self.model.auxiliary_loss() * share
                loads.append(torch.stack([record.load_E for record in self.model.records]) * share)
            whole.backward()
            loss += micro_loss.detach()
            z_loss += micro_z.detach()
            last = start + micro_rows == micro_rows * micro_batches
            for slot in optimizer.slots:
                if last or not slot.sharded:  # FSDP adds up by itself
                    slot.collect()
        load_LE = torch.stack(loads).sum(0) if loads else None
        if world.size == 1:
            norm = optimizer.gradient_norm()
            values = [*torch.stack((loss, z_loss, norm)).tolist(), *flags]
        else:
            if load_LE is not None and world.dense is not None:
                dist.all_reduce(load_LE, group=world.dense)
            optimizer.exchange()
            asked = (torch.tensor(float(each), device=device) for each in flags)
            alike = world.layout.tensor  # ranks that know of the same loss
            said = torch.stack((loss / alike, z_loss / alike, optimizer.squares(), *asked))
            dist.all_reduce(said)
            norm = said[2].sqrt()
            values = said.tolist()
            values[2] = math.sqrt(values[2]) if values[2] >= 0 else values[2]
        answers = tuple(value > 0 for value in values[3:])
        if not all(map(math.isfinite, values[:3])):
            return Updated(values[0], values[1], values[2], None, answers, None)
        squares = optimizer.step(number, norm, factor)
        if load_LE is not None and self.recipe.model.balance == "bias":
            sparse = [block.experts for block in self.model.all_blocks if block.experts is not None]
            for experts, load_E in zip(sparse, load_LE, strict=True):
                experts.update_bias(load_E)
        return Updated(values[0], values[1], values[2], self.summed(squares), answers, load_LE)

    def nats(self, batch: Batch) -> np.ndarray:
        """Cross-entropy of every target of a batch in nats, float32 (B, T), which all ranks of one place compute
        together.
        """
        return batch_nats(self.model, batch)

    @contextmanager
    def generating(self) -> Iterator[Decoder]:
        """The model, for decoding: all ranks do the same. Under FSDP what is not of a block is gathered meanwhile."""
        if isinstance(self.model, FSDPModule):
            self.model.unshard()
        try:
            yield self.model
        finally:
            if isinstance(self.model, FSDPModule):
                self.model.reshard()

    def summed(self, squares: Mapping[str, Tensor]) -> dict[str, float]:
        """Squared norms of whole parameters from those of this rank's pieces."""
        if self.world.size == 1:
            return dict(zip(squares, torch.stack(list(squares.values())).tolist(), strict=True))
        nothing = torch.zeros((), device=self.world.device)
        slots = self.optimizer.slots
        found = torch.stack([squares.get(slot.name, nothing) / slot.copies for slot in slots])
        dist.all_reduce(found)
        return dict(zip([slot.name for slot in slots], found.tolist(), strict=True))

    def gradient_norms(self) -> dict[str, float]:
        """Norm of each parameter's gradient."""
        squares = {
            slot.name: slot.gradient.float().square().sum()
            for slot in self.optimizer.slots
            if slot.gradient is not None
        }
        return {name: math.sqrt(square) for name, square in self.summed(squares).items()}

    def _share(self, tensors: BatchTensors, rows: int) -> tuple[BatchTensors, Tensor]:
        """This rank's rows, filled up with rows that count for nothing to `rows`, as many as every rank has, and of
        them the positions that are this rank's; and the weights of all positions.
        """
        missing = rows - len(tensors.inputs)
        if missing:
            tensors = _padded(tensors, missing)
        layout, weights = self.world.layout, tensors.weights
        if layout.context > 1:
            tensors = tensors.columns(self.world.context_rank, layout.context)
        return tensors, weights


def _padded(tensors: BatchTensors, missing: int) -> BatchTensors:
    """A batch with so many rows more, copies of its first one that count for nothing."""

    def more(each: Tensor) -> Tensor:
        return torch.cat([each, each[:1].expand(missing, *each.shape[1:])])

    cut = {name: more(each) for name, each in vars(tensors).items() if isinstance(each, Tensor)}
    if tensors.encoder is not None:
        encoder = {name: None if each is None else more(each) for name, each in vars(tensors.encoder).items()}
        cut["encoder"] = replace(tensors.encoder, **encoder)
    padded = replace(tensors, **cut)
    padded.weights[-missing:] = 0.0
    if tensors.encoder is None:
        padded.documents[-missing:] = -1  # what experts count as padding
    return padded
