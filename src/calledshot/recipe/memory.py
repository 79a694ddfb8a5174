"""What a rank of a run holds at the fullest moment of a step, by arithmetic, and what to set so that it fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .activations import Part, Setting, chunk_tokens, fullest, passing
from .cost import DTYPE_BYTES, checked_shape, gains, matmuls
from .derived import Shape
from .layout import Layout
from .schema import Recipe

TOKEN_BYTES = 28
"""Of a batch on a GPU: inputs and targets int64; weights, positions and documents of 4 bytes each."""
NEWTON_SCHULZ_ENTRIES = 128 * 2**20
"""Most entries of matrices that Muon orthogonalises together (`training.optimizer`)."""


@dataclass(frozen=True)
class Footprint:
    """Bytes of the tensors that live on one rank at the fullest moment of a step."""

    moment: str
    """`pass` (forward and backward), `exchange` (of gradients between ranks) or `optimizer`."""
    weights: int
    """Copy of the parameters in the type of the matmuls."""
    master: int
    """float32 parameters."""
    optimizer: int
    """float32: Muon one moment for each matrix, AdamW two for everything else."""
    gradients: int
    """Those that stand from one micro-batch to the next, or after the last."""
    activations: int
    """What is kept for the backward, what the work takes, and the gradients that it has made; the batch."""
    work: int
    """Of the exchange or the optimizer."""

    @property
    def state(self) -> int:
        """What stands between two steps, but for the batch."""
        return self.weights + self.master + self.optimizer

    @property
    def peak(self) -> int:
        """All together."""
        return self.state + self.gradients + self.activations + self.work


def setting(recipe: Recipe, device: str = "cuda") -> Setting:
    """How a rank computes; in bfloat16 and compiled where the recipe leaves that open."""
    parallel = recipe.parallel
    return Setting(device, DTYPE_BYTES[parallel.dtype], parallel.compile != "off", parallel.activation_checkpointing)


@dataclass(frozen=True)
class Weight:
    """Parameters of one kind, on one rank and before FSDP; entries."""

    all: int
    """Of all blocks."""
    one: int
    """Of one parameter."""
    apart: bool = False
    """Of experts that other ranks do not have."""
    shape: tuple[int, int] = (0, 0)
    """Of the matrices that Muon updates, whole, the longer side last; zeros where it updates none."""
    parts: int = 1
    """That tensor parallelism cut each matrix into."""

    @property
    def orthogonal(self) -> bool:
        """Whether Muon updates it: matrices of one row or column it leaves to AdamW."""
        return self.shape[0] > 1


def weights(model: Shape, layout: Layout) -> list[Weight]:
    """All parameters."""
    tables = [model.vocabulary * model.width] * (1 if model.tied_embeddings else 2)
    if model.encoder_width not in (0, model.width):
        tables.append(model.vocabulary * model.encoder_width)
    found = [Weight(table, table) for table in tables] + [Weight(gains(model), model.width)]
    for one in matmuls(model):
        if one.head:
            continue
        kind = one.name.rpartition(".")[2]
        expert = ".expert." in one.name
        parts = 1 if kind == "router" else layout.tensor
        copies = model.experts // layout.expert if expert else 1
        stored = one.stored // layout.expert if expert else one.stored
        # As they lie in the parameter: queries, keys and values by head, gate and up side by side.
        by_head = kind in ("w_qkv", "w_query", "w_key_value")
        rows = model.head_width if by_head else one.outputs // (2 if kind == "w_gate_up" else 1)
        size, cut = sorted((rows, one.inputs)), 1 if by_head else parts
        found.append(
            Weight(
                stored * one.size // parts, copies * one.size // parts, expert and layout.expert > 1, tuple(size), cut
            )
        )
    return found


def footprint(recipe: Recipe, layout: Layout, micro_tokens: int, how: Setting) -> Footprint:
    """Of one rank, with micro-batches of so many tokens at most."""
    model, e = checked_shape(recipe), how.dtype_bytes
    share = -(-recipe.batch.tokens // model.row_positions // layout.data)
    rows = min(micro_tokens // model.row_positions, share)
    micro_batches = -(-share // rows)
    held, muon = weights(model, layout), recipe.optimizer.name == "muon"
    # FSDP gives a rank some rows of a parameter, in float32. Others it has whole; where several have them, each keeps
    # the optimizer's state of the rows that it updates, and their float32 truth where that is no parameter itself.
    cut = sum(one.all / _group(one, layout) for one in held if _sharded(one, layout))
    kept = [one for one in held if not _sharded(one, layout)]
    whole = sum(one.all for one in kept)
    updated = sum(one.all / _group(one, layout) for one in kept)
    state = {
        "weights": int(e * whole if e < 4 else 0),
        "master": int(4 * cut + 4 * (updated if e < 4 else whole)),
        "optimizer": int(
            sum(4 * (1 if muon and one.orthogonal else 2) * one.all / _group(one, layout) for one in held)
        ),
    }
    standing = chunk_tokens(model, rows * model.context / layout.context, layout, how) * model.vocabulary * e
    if how.device == "cuda":
        standing += share * model.row_positions / layout.context * TOKEN_BYTES
    parts = passing(model, rows, layout, how)
    # A second micro-batch finds the first one's gradients as they were made, a third their sum in float32.
    before = {1: 0, 2: e}.get(micro_batches, 4) * whole + (4 * cut if micro_batches > 1 else 0)
    moments = [("pass", before, _pass(parts, cut, layout, how), 0.0)]
    bytes_each = e if micro_batches == 1 else 4
    several = [one for one in kept if _group(one, layout) > 1]
    if several:
        # Gradients once more, in the order of the ranks, what came from them, and its sum in float32; on a CPU, what is
        # added to that is made float32 first.
        sent = bytes_each * sum(one.all for one in several)
        summed = sum(one.all / _group(one, layout) for one in several) if bytes_each < 4 else 0
        summed *= 8 if how.device == "cpu" else 4
        moments.append(("exchange", 4 * cut + bytes_each * whole, 0.0, 2 * sent + summed))
    left = sum((4 if one in several else bytes_each) * one.all / _group(one, layout) for one in kept)
    moments.append(("optimizer", 4 * cut + left, 0.0, _update(held, muon, layout, how)))
    found = [
        Footprint(name, **state, gradients=int(gradients), activations=int(standing + most), work=int(work))
        for name, gradients, most, work in moments
    ]
    return max(found, key=lambda one: one.peak)


def _sharded(one: Weight, layout: Layout) -> bool:
    """Whether FSDP cuts it."""
    return layout.shard > 1 and not one.apart


def _group(one: Weight, layout: Layout) -> int:
    """Ranks that share its update."""
    together = layout.replicate * layout.shard * layout.context
    if one.apart:
        return together // layout.expert
    return layout.shard * layout.context if layout.shard > 1 else together


def _pass(parts: list[Part], cut: float, layout: Layout, how: Setting) -> float:
    """Bytes of a forward and backward pass at its fullest, with what FSDP gathers of what belongs to no block."""
    if layout.shard == 1:
        return fullest(parts)
    e, root = how.dtype_bytes, sum(part.parameters for part in parts if not part.block)
    # Its gradients go last: as they were made, and in float32 for their sum, which gloo copies.
    return max(e * root + fullest(parts), 4 * cut + root * (e + 4 + (4 if how.device == "cpu" else 0)))


def _update(held: list[Weight], muon: bool, layout: Layout, how: Setting) -> float:
    """Bytes that the optimizer takes for a while."""
    # Eager AdamW makes five float32 tensors of a parameter's size; compiled, it makes none.
    others = [20 * one.one / _group(one, layout) for one in held if not (muon and one.orthogonal)]
    most = 0.0 if how.compiled else max(others)
    alike: dict[tuple[tuple[int, int], bool], list[Weight]] = {}
    for one in held:
        if muon and one.orthogonal:
            alike.setdefault((one.shape, _sharded(one, layout)), []).append(one)
    for ((short, long), cut), those in alike.items():
        # What is taken together is counted whole under FSDP, else by what this rank updates.
        entries = max(_batches(those, [1 if cut else _group(one, layout) for one in those]))
        whole = entries * max(one.parts for one in those)
        mine = whole / (layout.shard * layout.context) if cut else whole
        # Two iterates and the two small products of an iteration; directions as they come, put together, and stacked.
        iterating = mine * (2 + 2 * short / long)
        if cut:
            copies = 2 if how.device == "cpu" else 1  # gloo's own
            taken = mine + 2 * whole + max(iterating, mine + copies * whole)
        else:
            taken = entries + whole + iterating + (whole if whole > entries else 0)
        most = max(most, how.dtype_bytes * taken)
    return most


def _batches(those: list[Weight], ranks: list[int]) -> Iterator[float]:
    """Entries of the batches that Muon makes of parameters, as they come layer by layer, each divided among `ranks`."""
    taken = 0.0
    for layer in range(max(one.all // one.one for one in those)):
        for one, divided in zip(those, ranks, strict=True):
            if layer * one.one >= one.all:
                continue
            if taken and taken + one.one / divided > NEWTON_SCHULZ_ENTRIES:
                yield taken
                taken = 0.0
            taken += one.one / divided
    yield taken
