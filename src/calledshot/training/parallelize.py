"""A model shared among ranks, in a fixed order: tensor, experts, context, activation checkpointing, compile, FSDP."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

from calledshot.model import Decoder
from calledshot.training.pieces import Piece
from calledshot.training.world import World

ENTRANCES = ("loss", "token_losses", "activation_scales")
"""Methods of the trunk that a pass begins with, and FSDP has to know of."""


def parallelize(
    model: Decoder, world: World, *, dtype: torch.dtype, checkpointing: str = "none", compiled: bool = False
) -> dict[str, Piece]:
    """Cuts a model on the meta device to this rank's part; which part of each parameter that is, by name.

    Under FSDP, which cuts once more, matrices become two-dimensional (rows, last axis): cut along its first axis, a
    stack of two matrices would be on two ranks alone.
    """
    whole = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if world.tensor is not None:
        model.parallelize_tensor(world.tensor)
    if world.expert is not None:
        model.parallelize_experts(world.expert)
    if world.context is not None:
        model.parallelize_context(world.context)
    parts = {name: Piece.cut(shape, *model.cuts.get(name, ())) for name, shape in whole.items()}
    if checkpointing != "none":
        model.checkpoint_blocks(checkpointing)
    if compiled:
        model.compile_blocks()
    if world.mesh is not None:
        _shard(model, world, dtype)
    return parts


def apart(model: Decoder, world: World) -> list[str]:
    """Names of the experts' parameters, where ranks hold different experts."""
    if world.expert is None:
        return []
    return [name for name, _ in model.named_parameters() if ".experts." in name and name in model.cuts]


def _shard(model: Decoder, world: World, dtype: torch.dtype) -> None:
    """FSDP2 (Zhao et al. 2023, arXiv 2304.11277; `fully_shard`) of each block, and of what is left.

    Gradients are summed in float32. Routers stay float32 and whole, experts that other ranks do not have are shared
    already: both are left out, and exchanged as `slots.Exchange` does.
    """
    left_out = set(apart(model, world)) | {name for name, _ in model.named_parameters() if name.endswith("router_ED")}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() > 2:
                setattr(module, name, nn.Parameter(parameter.data.view(-1, parameter.size(-1))))
    ignored = {parameter for name, parameter in model.named_parameters() if name in left_out}
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in model.all_blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=policy, ignored_params=ignored)
    fully_shard(model, mesh=world.mesh, mp_policy=policy, ignored_params=ignored)
    for module in _managed(model):
        # The loss is a sum over all ranks' tokens, already divided by their weights.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    for name in ENTRANCES:
        register_fsdp_forward_method(model, name)
    model.hooked = True


def _managed(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))
