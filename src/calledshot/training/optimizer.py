"""AdamW and Muon over float32 master weights, with the working copy (bfloat16, say) written in the same pass.

Every parameter's last two axes are one matrix and the axes before them a batch of independent ones (heads, the halves
of the gate, stacked experts), so Muon needs no list of special cases.
"""

from __future__ import annotations

import importlib.util
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calledshot.recipe import Recipe, UsageError, optimizer_groups
from calledshot.training.matrices import Matrices
from calledshot.training.pieces import Piece
from calledshot.training.slots import MATRICES, Exchange, Slot, is_matrix
from calledshot.training.world import World

KNOWN = ("muon", "adamw")
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic by Keller Jordan (https://kellerjordan.github.io/posts/muon), as in
`torch.optim.Muon`.
"""
NEWTON_SCHULZ_BYTES = 256 * 2**20
"""Most bytes of matrices orthogonalised in one batch."""


def _sum_of_squares(gradient: Tensor) -> Tensor:
    return gradient.float().square().sum()


def gradient_norm(slots: Sequence[Slot]) -> Tensor:
    """Global 2-norm of the gradients, float32."""
    norms = [
        torch.linalg.vector_norm(slot.gradient, dtype=torch.float32) for slot in slots if slot.gradient is not None
    ]
    return torch.linalg.vector_norm(torch.stack(norms))


def _adamw(
    working: Tensor, master: Tensor, gradient: Tensor, first: Tensor, second: Tensor,
    clip: Tensor, rate: Tensor, decay: Tensor, one_minus_beta1: Tensor, one_minus_beta2: Tensor,
    correction1: Tensor, correction2: Tensor, epsilon: Tensor,
) -> Tensor:  # fmt: skip
    """One AdamW update (Loshchilov and Hutter 2019, arXiv 1711.05101), in place on flat tensors; the update's sum of
    squares.
    """
    clipped = gradient.float() * clip
    first.lerp_(clipped, one_minus_beta1)
    second.lerp_(clipped.square(), one_minus_beta2)
    direction = (first / correction1) / ((second / correction2).sqrt() + epsilon)
    update = rate * direction + (rate * decay) * master
    master.sub_(update)
    working.copy_(master)
    return update.square().sum()


def _momentum(gradient: Tensor, buffer: Tensor, clip: Tensor, momentum: Tensor) -> Tensor:
    """Nesterov momentum as `torch.optim.Muon` has it; returns the direction to orthogonalise, float32."""
    clipped = gradient.float() * clip
    buffer.lerp_(clipped, 1.0 - momentum)
    return clipped.lerp(buffer, momentum)


def _momentum_narrow(gradient: Tensor, buffer: Tensor, clip: Tensor, momentum: Tensor) -> Tensor:
    """The same, bfloat16: one function each, since the compiler then writes nothing wide."""
    return _momentum(gradient, buffer, clip, momentum).bfloat16()


def _apply(working: Tensor, master: Tensor, direction: Tensor, rate: Tensor, adjusted: Tensor, decay: Tensor) -> Tensor:
    """Decoupled decay at `rate`, then the direction at `adjusted`; the update's sum of squares."""
    update = adjusted * direction.float() + (rate * decay) * master
    master.sub_(update)
    working.copy_(master)
    return update.square().sum()


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices by Newton-Schulz, in their own dtype and in batches; (..., rows, columns) in and
    out.

    Singular values come out between about 0.7 and 1.2, which is what Muon wants (Jordan et al. 2024).
    """
    a, b, c = NEWTON_SCHULZ_COEFFICIENTS
    x = matrices
    tall = x.size(-2) > x.size(-1)
    if tall:
        x = x.mT
    x = x / (torch.linalg.matrix_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) if x.dim() == 3 else b * gram + c * gram @ gram
        x = torch.baddbmm(x, polynomial, x, beta=a) if x.dim() == 3 else a * x + polynomial @ x
    return x.mT if tall else x


class Part(ABC):
    """An optimizer over some of the slots."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        self.slots = list(slots)

    @abstractmethod
    def step(self, number: int, clip: Tensor, rates: Mapping[str, float]) -> dict[str, Tensor]:
        """Update `number` (from 1) at a learning rate by group; the updates' squared norms by name."""


class AdamW(Part):
    def __init__(self, slots: Sequence[Slot], recipe: Recipe, compiled: bool) -> None:
        super().__init__(slots)
        self.settings = recipe.optimizer
        self.kernel: Callable[..., Tensor] = torch.compile(_adamw, dynamic=True) if compiled else _adamw
        for slot in self.slots:
            slot.state = {"first": torch.zeros_like(slot.master), "second": torch.zeros_like(slot.master)}

    def step(self, number: int, clip: Tensor, rates: Mapping[str, float]) -> dict[str, Tensor]:
        settings, squares = self.settings, {}
        for slot in self.slots:
            if not slot.piece.numel:
                continue
            decay = settings.weight_decay if slot.group in MATRICES else 0.0
            scalars = (
                rates[slot.group], decay, 1.0 - settings.beta1, 1.0 - settings.beta2,
                1.0 - settings.beta1**number, 1.0 - settings.beta2**number, settings.epsilon,
            )  # fmt: skip
            assert slot.gradient is not None
            flat = [*slot.flat(), *(t.view(-1) for t in (slot.gradient.contiguous(), *slot.state.values()))]
            # Numbers that change go in as tensors: as Python floats each step would be compiled anew.
            squares[slot.name] = self.kernel(*flat, clip, *(torch.tensor(s, device=clip.device) for s in scalars))
        return squares


class Muon(Part):
    """Muon (Jordan et al. 2024), orthogonalising the last two axes of every parameter, matrices of one shape
    together.
    """

    def __init__(self, slots: Sequence[Slot], recipe: Recipe, compiled: bool, world: World, dtype: torch.dtype) -> None:
        super().__init__(slots)
        self.settings = recipe.optimizer
        momentum = _momentum_narrow if dtype == torch.bfloat16 else _momentum
        self.momentum: Callable[..., Tensor] = torch.compile(momentum, dynamic=True) if compiled else momentum
        self.apply: Callable[..., Tensor] = torch.compile(_apply, dynamic=True) if compiled else _apply
        for slot in self.slots:
            slot.state = {"momentum": torch.zeros_like(slot.master)}
        self.batches = [Matrices(slots, world) for slots in self._batch()]

    def _batch(self) -> list[list[Slot]]:
        """Slots whose matrices have one shape, up to transposition, in batches of bounded size."""
        by_shape: dict[tuple[int, ...], list[Slot]] = {}
        for slot in self.slots:
            shape = tuple(sorted(slot.piece.shape[-2:]))
            by_shape.setdefault((*shape, slot.sharded, slot.copies), []).append(slot)
        batches = []
        for slots in by_shape.values():
            size = 0
            for slot in slots:
                elements = math.prod(slot.piece.shape) if slot.sharded else slot.master.numel()
                if size == 0 or size + 2 * elements > NEWTON_SCHULZ_BYTES:
                    batches.append([])
                    size = 0
                batches[-1].append(slot)
                size += 2 * elements
        return batches

    def step(self, number: int, clip: Tensor, rates: Mapping[str, float]) -> dict[str, Tensor]:
        settings, squares = self.settings, {}
        scalar = lambda value: torch.tensor(value, device=clip.device)  # noqa: E731
        for matrices in self.batches:
            directions = []
            for slot in matrices.slots:
                assert slot.gradient is not None
                directions.append(
                    self.momentum(
                        slot.gradient.contiguous().view(-1),
                        slot.state["momentum"].view(-1),
                        clip,
                        scalar(settings.momentum),
                    )
                )
            for slot, direction in zip(matrices.slots, matrices.map(orthogonalise, directions), strict=True):
                if not slot.piece.numel:
                    continue
                rows, columns = slot.piece.shape[-2:]
                rate = rates[slot.group]
                squares[slot.name] = self.apply(
                    *slot.flat(), direction, scalar(rate),
                    scalar(rate * math.sqrt(max(1.0, rows / columns))), scalar(settings.weight_decay),
                )  # fmt: skip
        return squares


class Borrowed(Part):
    """Any `torch.optim.Optimizer` of the user's own, over the masters; of several ranks each steps its own rows."""

    def __init__(self, slots: Sequence[Slot], recipe: Recipe, factory: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__(slots)
        groups = [{"params": [slot.master], "group": slot.group} for slot in self.slots]
        try:
            self.inner = factory(groups, lr=recipe.optimizer.learning_rate)
        except Exception as error:  # whatever the user's code raises
            raise UsageError(
                f"optimizer.name = {recipe.optimizer.name!r}: {type(error).__name__}: {error}; "
                "it is called with groups of parameters and lr"
            ) from error

    def step(self, number: int, clip: Tensor, rates: Mapping[str, float]) -> dict[str, Tensor]:
        before = [slot.master.clone() for slot in self.slots]
        for slot, group in zip(self.slots, self.inner.param_groups, strict=True):
            assert slot.gradient is not None
            group["lr"] = rates[slot.group]
            slot.master.grad = slot.gradient.float() * clip
        for slot in self.slots:  # the state lives in the slots, so that checkpoints need not know whose it is
            if slot.state:
                self.inner.state[slot.master] = slot.state
        self.inner.step()
        for slot in self.slots:
            slot.state = {
                key: value if isinstance(value, Tensor) else torch.tensor(value)
                for key, value in self.inner.state[slot.master].items()
            }
            slot.master.grad = None
            slot.rows().copy_(slot.master.view(-1))
        return {slot.name: (slot.master - old).square().sum() for slot, old in zip(self.slots, before, strict=True)}


class Optimizer:
    """All parts together: clipping, learning rates by group, and the state as named tensors."""

    def __init__(
        self,
        slots: list[Slot],
        recipe: Recipe,
        *,
        compiled: bool = False,
        folder: Path | None = None,
        world: World | None = None,
        exchanges: Sequence[Exchange] = (),
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        """`folder` is where a `file.py:Class` of the user's own is looked for first (the run directory's copy).

        `exchanges` are of those slots that other ranks hold too; `dtype` is that of Muon's matmuls, bfloat16 in the
        original and float32 for a run that computes in it: machines without bfloat16 are quicker so.
        """
        self.slots, self.settings, self.peaks = slots, recipe.optimizer, optimizer_groups(recipe)
        self.world, self.exchanges = world or World(), exchanges
        self.square = torch.compile(_sum_of_squares, dynamic=True) if compiled else None
        name = recipe.optimizer.name
        if name == "muon":
            muon = [slot for slot in slots if is_matrix(slot.name, slot.piece.shape)]
            chosen = {id(slot) for slot in muon}
            rest = [slot for slot in slots if id(slot) not in chosen]
            self.parts: list[Part] = [Muon(muon, recipe, compiled, self.world, dtype), AdamW(rest, recipe, compiled)]
        elif name == "adamw":
            self.parts = [AdamW(slots, recipe, compiled)]
        else:
            self.parts = [Borrowed(slots, recipe, user_class(name, "optimizer.name", folder))]

    @torch.no_grad()
    def exchange(self) -> None:
        """Adds up gradients over the ranks that hold the same weights whole."""
        for exchange in self.exchanges:
            exchange.reduce()

    @torch.no_grad()
    def squares(self) -> Tensor:
        """Sum of squares of the gradients, float32: this rank's share, so that those of all ranks add up to that of
        the whole model.
        """
        square = self.square or _sum_of_squares
        found: dict[int, list[Tensor]] = {}
        for slot in self.slots:
            if slot.gradient is not None and slot.piece.numel:
                found.setdefault(slot.copies, []).append(square(slot.gradient.contiguous().view(-1)))
        shares = [torch.stack(each).sum() / copies for copies, each in found.items()]
        return torch.stack(shares).sum() if shares else torch.zeros(())

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """Global 2-norm of the gradients of a model that is all here, float32."""
        if self.square is None:
            return gradient_norm(self.slots)
        # `vector_norm` makes a float32 copy of a bfloat16 tensor first: 1 % of a step.
        flat = [slot.gradient.contiguous().view(-1) for slot in self.slots if slot.gradient is not None]
        return torch.stack([self.square(each) for each in flat]).sum().sqrt()

    @torch.no_grad()
    def step(self, number: int, norm: Tensor, factor: float) -> dict[str, Tensor]:
        """Update `number` (from 1) with the gradients in the slots, whose norm is `norm`; the updates' squared norms by
        name.
        """
        limit = self.settings.clip
        clip = torch.clamp(limit / (norm + 1e-6), max=1.0) if limit else torch.ones_like(norm)
        rates = {group: peak * factor for group, peak in self.peaks.items()}
        squares: dict[str, Tensor] = {}
        for part in self.parts:
            squares |= part.step(number, clip, rates)
        for exchange in self.exchanges:
            exchange.share()
        return squares

    def clear(self) -> None:
        """Forget the gradients."""
        for slot in self.slots:
            slot.gradient = None

    def state(self) -> dict[str, tuple[Tensor, Piece]]:
        """State by `PARAMETER.KEY`, and which part of the parameter's it is."""
        return {
            f"{slot.name}.{key}": (value, slot.piece if value.shape == slot.master.shape else Piece.whole(value.shape))
            for slot in self.slots
            for key, value in slot.state.items()
        }

    def wanted(self, stored: Mapping[str, tuple[int, ...]]) -> dict[str, Piece]:
        """What of a checkpoint's state, given as shapes by name, is this rank's; the rest begins anew."""
        found = {name: piece for name, (_, piece) in self.state().items() if name in stored}
        for slot in self.slots:  # an optimizer of the user's own has no state before its first step
            for name, shape in stored.items():
                if name.startswith(f"{slot.name}.") and name not in found:
                    found[name] = slot.piece if shape == slot.piece.shape else Piece.whole(shape)
        return found

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the state that `state` gave."""
        for slot in self.slots:
            prefix = f"{slot.name}."
            loaded = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            for key, value in loaded.items():
                if key in slot.state:
                    slot.state[key].copy_(value)
                else:
                    slot.state[key] = value.to(slot.master.device)


def user_class(name: str, key: str, folder: Path | None = None) -> Any:
    """The object that `file.py:Class` names; UsageError names the recipe's key when there is none."""
    file, _, attribute = name.partition(":")
    if not attribute or not file.endswith(".py"):
        raise UsageError(f"{key} = {name!r}: is neither known nor of the form file.py:Class; known are muon, adamw")
    candidates: Iterable[Path] = ([folder / Path(file).name] if folder else []) + [Path(file)]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise UsageError(f"{key} = {name!r}: there is no file {file}; write its path from where you call shot")
    spec = importlib.util.spec_from_file_location(f"calledshot_user_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's code raises
        raise UsageError(f"{key} = {name!r}: {path} cannot be imported: {type(error).__name__}: {error}") from error
    if not hasattr(module, attribute):
        raise UsageError(f"{key} = {name!r}: {path} holds no {attribute}")
    return getattr(module, attribute)
