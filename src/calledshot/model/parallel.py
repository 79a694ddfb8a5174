"""How the trunk's parameters are cut among ranks: parameters become empty parts of themselves, on the meta device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from calledshot.model import block, experts
from calledshot.model.collectives import Group

Cut = tuple[int, int, int]
"""The axis along which a parameter is cut into equal parts, this rank's part, and the number of parts."""


def share_matrices(model: nn.Module, group: Group) -> dict[str, Cut]:
    """Each rank keeps some key heads with their query heads, and a part of each hidden width; the cuts by name."""
    cuts: dict[str, Cut] = {}
    for name, module in model.named_modules():
        if isinstance(module, block.Block):
            module.tensor = group
            module.kv_heads //= group.size
            cuts |= _cut(name, module, block.TENSOR_AXES, group)
        elif isinstance(module, experts.Experts):
            module.tensor = group
            cuts |= _cut(name, module, experts.TENSOR_AXES, group)
    return cuts


def share_experts(model: nn.Module, group: Group) -> dict[str, Cut]:
    """Each rank keeps some experts of every layer; the cuts by name."""
    cuts: dict[str, Cut] = {}
    for name, module in _all_experts(model):
        module.expert = group
        module.local //= group.size
        cuts |= _cut(name, module, experts.EXPERT_AXES, group)
    return cuts


def share_positions(model: nn.Module, group: Group) -> None:
    """Nothing is cut: blocks gather keys and values, experts count the other ranks' tokens."""
    for module in model.modules():
        if isinstance(module, block.Block | experts.Experts):
            module.context = group


def shares_experts(model: nn.Module) -> bool:
    """Whether ranks have different experts."""
    return any(module.expert is not None for _, module in _all_experts(model))


def _all_experts(model: nn.Module) -> Iterator[tuple[str, experts.Experts]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, experts.Experts))


def _cut(place: str, module: nn.Module, axes: Mapping[str, int], group: Group) -> dict[str, Cut]:
    cuts = {}
    for kind, whole in list(module.named_parameters(recurse=False)):
        if kind in axes:
            size = list(whole.shape)
            size[axes[kind]] //= group.size
            setattr(module, kind, nn.Parameter(whole.new_empty(size)))
            cuts[f"{place}.{kind}"] = (axes[kind], group.rank, group.size)
    return cuts
