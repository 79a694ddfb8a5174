"""The counter against the model itself."""

import pytest
import torch

from calledshot.model import Decoder
from calledshot.recipe import cost, load_recipe


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
