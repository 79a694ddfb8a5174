"""The arithmetic against the model itself: parameters by `numel`, kept activations by what autograd saves."""

import pytest
import torch

from calledshot.model import Decoder
from calledshot.model.attention import Mask, ready
from calledshot.model.positions import rotary
from calledshot.recipe import cost, load_recipe
from calledshot.recipe.cost import EAGER, activation_bytes


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.tied_embeddings=true"],
        ["model.qk_norm=false", "model.head_width=32"],
        ["model.kv_heads=4", "model.hidden=100"],
        ["model.kv_heads=1", "model.layers=1"],
    ],
)
def test_parameters_are_the_models(overrides):
    recipe = load_recipe("demo", overrides)
    with torch.device("meta"):
        model = Decoder(recipe.model)
    assert cost(recipe).parameters.total == sum(parameter.numel() for parameter in model.parameters())


def test_an_eager_layer_keeps_what_the_estimate_allows_it():
    """Without compilation autograd saves at most `EAGER` times the estimate for compiled layers, and more than 1.5."""
    recipe = load_recipe("demo", ["model.context=512", "batch.tokens=4096", "model.layers=1"])
    shape = cost(recipe).shape
    rows, length = 4, shape.context
    block = Decoder(recipe.model).bfloat16().blocks[0]
    positions = torch.arange(length).expand(rows, length)
    cos, sin = rotary(positions, shape, shape.head_width)
    mask = Mask(length, length, documents_BT=positions // 100)
    seen = ready(mask, positions.device, torch.bfloat16, blocked=False)
    ours = {tensor.untyped_storage().data_ptr() for tensor in (cos, sin, *block.parameters())}
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ours:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(rows, length, shape.width, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output, _ = block(x, cos, sin, seen)
    assert output.requires_grad
    tokens = rows * length
    layer = activation_bytes(shape, 2 * tokens) - activation_bytes(shape, tokens) - tokens * 2 * shape.width * 2
    assert 1.5 < sum(saved.values()) / layer < EAGER
