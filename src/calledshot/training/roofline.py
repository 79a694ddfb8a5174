"""What a step has to do at least, by part: FLOPs of its products, and bytes of what only moves through memory.

The two limits of a part are the roofline's (Williams et al. 2009): the matmul peak and the memory's bandwidth, both
probed. FLOPs are `recipe.cost`'s. Bytes count each tensor once as it is read and once as it is written by a pass that
fuses all it can, so that caches may do better than the memory's bandwidth, and nothing that does more can look good.

Of a block with D width, (H + K) C queries and keys and F hidden, for each position: norms, rotation, residual sums and
gate read and write 9 D + 2 (H + K) C + 3 F numbers forward and 8 D + 3 (H + K) C + 5 F backward (2 F and 3 F where the
feed-forward has no gate, no queries and keys where they are neither normalized nor rotated).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from calledshot.recipe.cost import Matmul, flops_per_token, matmuls, pooled
from calledshot.recipe.derived import GATED, Shape, Stack
from calledshot.training.engine import Engine
from calledshot.training.optimizer import NEWTON_SCHULZ_STEPS, Muon
from calledshot.training.slots import Slot
from calledshot.training.timeline import Place

WIDE = 4
"""Bytes of a float32."""


@dataclass(frozen=True)
class Work:
    """What a part does in one step of one rank."""

    amount: float
    unit: Literal["FLOP", "B"]


@dataclass(frozen=True)
class Row:
    """One part of a step beside what the hardware could do."""

    part: str
    direction: str
    seconds: float
    """Of one step."""
    share: float
    """Of the step."""
    unit: str = ""
    """FLOP or B, and empty for what has no work of its own."""
    achieved: float | None = None
    """Of the unit, a second."""
    limit: float | None = None
    """The same at the most, as probed."""
    gain_seconds: float | None = None
    """What a step would save if this ran at the limit, or if what has no work were not there; None for `other`."""

    @property
    def of_limit(self) -> float | None:
        """Share of the limit; above 1 the limit is not this part's: its numbers stay in caches."""
        return None if self.achieved is None or not self.limit else self.achieved / self.limit


def row(place: Place, seconds: float, step: float, work: Work | None, flops: float, bandwidth: float) -> Row:
    """A part that takes `seconds` of a step of `step`, on hardware that does so many FLOP/s and bytes a second."""
    if work is None or not work.amount:
        gain = None if place.part == "other" else seconds
        return Row(*place, seconds, seconds / step, gain_seconds=gain)
    limit = flops if work.unit == "FLOP" else bandwidth
    gain = max(0.0, seconds - work.amount / limit)
    return Row(*place, seconds, seconds / step, work.unit, work.amount / seconds, limit, gain)


def works(engine: Engine) -> dict[Place, Work]:
    """What each part of a step of this rank does."""
    model, layout = engine.model.derived, engine.world.layout
    rows = engine.rows[1] - engine.rows[0]
    tokens = rows * model.row_positions / (layout.context * layout.tensor)
    size = 2 if engine.chosen.dtype == "bfloat16" else 4

    def flops(amount: float, part: str, passes: tuple[str, ...] = ("forward", "backward")) -> dict[Place, Work]:
        # The backward makes gradients of the activations and of the parameters.
        return {Place(part, each): Work((1 + (each == "backward")) * amount, "FLOP") for each in passes}

    by_kind = {"matmul": 0.0, "experts": 0.0, "head": 0.0}
    for one in matmuls(model):
        by_kind[_kind(one)] += 2 * one.used * one.size * one.share * tokens
    found = flops(by_kind["matmul"], "matmul") | flops(by_kind["experts"], "experts")
    found |= flops(flops_per_token(model).attention / 3 * tokens, "attention")
    # Its gradients are made in the forward.
    found[Place("head")] = Work(3 * by_kind["head"], "FLOP")
    targets = rows * model.context / (layout.context * layout.tensor)
    found[Place("cross-entropy")] = Work(2 * targets * model.vocabulary * size, "B")
    for direction, numbers in zip(("forward", "backward"), _elementwise(model, layout.tensor), strict=True):
        amount = numbers * rows / layout.context
        if direction == "backward":
            amount += engine.micro_batches * model.vocabulary * model.width
        found[Place("elementwise", direction)] = Work(amount * size, "B")
    muon = {slot.name for part in engine.optimizer.parts if isinstance(part, Muon) for slot in part.slots}
    slots = engine.optimizer.slots
    moved = sum(_moved(slot, size, slot.name in muon, engine.micro_batches) for slot in slots)
    found[Place("optimizer")] = Work(moved, "B")
    found[Place("orthogonalisation")] = Work(sum(newton_schulz(slot) for slot in slots if slot.name in muon), "FLOP")
    return found


def _kind(one: Matmul) -> str:
    return "head" if one.head else "experts" if ".expert." in one.name else "matmul"


def _elementwise(model: Shape, tensor: int) -> tuple[float, float]:
    """Numbers that a row's positions read and write besides products, attention and loss, forward and backward."""
    forward = backward = 0.0
    across = pooled(model)
    for stack in model.stacks:
        lengths = [model.context] * stack.layers if stack.ordered else across
        for number, length in enumerate(lengths):
            sparse = model.experts > 0 and number >= model.dense_layers
            there, back = _of_block(model, stack, sparse, tensor)
            forward, backward = forward + length * there, backward + length * back
        # The embedding's rows, and the last norm.
        forward, backward = forward + 4 * stack.width * lengths[-1], backward + 5 * stack.width * lengths[-1]
    return forward, backward


def _of_block(model: Shape, stack: Stack, sparse: bool, tensor: int) -> tuple[float, float]:
    D, F = stack.width, 0 if sparse else stack.hidden / tensor
    turned = (stack.heads + stack.kv_heads) * model.head_width / tensor
    if not model.qk_norm and model.positions != "rope":
        turned = 0
    gated = model.feed_forward in GATED
    norms = 4 * D if stack.cross_width else 0
    return 9 * D + norms + 2 * turned + (3 if gated else 2) * F, 8 * D + norms + 3 * turned + (5 if gated else 3) * F


def _moved(slot: Slot, size: int, muon: bool, passes: int) -> float:
    """Bytes that one parameter's update moves: its gradient, twice (the norm and the update), its state and its master
    there and back, the working copy, and Muon's direction to be made orthogonal and back.
    """
    gradient = WIDE if passes > 1 or slot.sharded else slot.working.element_size()
    added = (passes - 1) * (size + 2 * WIDE) if not slot.sharded else 0
    own_master = slot.working.element_size() == WIDE
    states = sum(1 for each in slot.state.values() if each.shape == slot.master.shape)
    each = 2 * gradient + added + 2 * WIDE * (states + 1) + (0 if own_master else size) + (2 * size if muon else 0)
    return each * slot.master.numel()


def newton_schulz(slot: Slot) -> float:
    """FLOPs of making a parameter's matrices, those that this rank works on, orthogonal."""
    height, width = sorted(slot.piece.shape[-2:])
    # A matrix that ranks have parts of is made orthogonal by each of them.
    cut = slot.piece.axis is not None and slot.piece.axis >= len(slot.piece.shape) - 2
    matrices = slot.master.numel() * (slot.piece.parts if cut else 1) / math.prod((height, width))
    return matrices * NEWTON_SCHULZ_STEPS * (4 * height**2 * width + 2 * height**3)
