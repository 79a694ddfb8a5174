"""The coordinate check: after a few steps activations are as large at width 1,024 as at 64.

Source: Yang et al., Tensor Programs V (arXiv 2203.03466), appendix D.1.
"""

import pytest
import torch
import torch.nn.functional as F

from calledshot.model import Decoder
from calledshot.model.attention import Mask, Seen
from calledshot.model.positions import rotary
from calledshot.recipe import Recipe, schema
from calledshot.training.optimizer import Optimizer, gradient_norm
from calledshot.training.slots import make_slots

VOCABULARY, CONTEXT, ROWS = 128, 64, 4
RATES = {"muon": 0.02, "adamw": 0.01}


def scales(optimizer: str, width: int, *, transfer: str = "width", layers: int = 2, steps: int = 4) -> dict[str, float]:
    """Root mean squares after training on one batch; blocks and head begin at zero, so what they give is learnt."""
    model = schema.Model(
        layers=layers, width=width, heads=width // 32, kv_heads=width // 32, hidden=width,
        vocabulary=VOCABULARY, context=CONTEXT,
    )  # fmt: skip
    settings = schema.Optimizer(name=optimizer, learning_rate=RATES[optimizer], transfer=transfer, base_width=64)
    decoder = Decoder(model)
    decoder.initialise(torch.Generator().manual_seed(0))
    slots = make_slots(decoder, {name: parameter.data for name, parameter in decoder.named_parameters()})
    update = Optimizer(slots, Recipe(model=model, optimizer=settings))
    generator = torch.Generator().manual_seed(1)
    zipf = 1 / torch.arange(1, VOCABULARY + 1.0)
    tokens = torch.multinomial(zipf, ROWS * (CONTEXT + 1), replacement=True, generator=generator).view(ROWS, -1)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    for step in range(1, steps + 1):
        loss, z_term = decoder.loss(inputs, targets, torch.ones(inputs.shape), torch.tensor(1 / inputs.numel()), 1e-4)
        (loss + z_term).backward()
        for slot in slots:
            slot.collect()
        update.step(step, gradient_norm(slots), 1.0)
        update.clear()

    found: dict[str, float] = {}
    with torch.no_grad():
        x_BTD = F.embedding(inputs, decoder.embedding_VD)
        cos, sin = rotary(torch.arange(CONTEXT).expand_as(inputs), model, 32)
        for number, block in enumerate(decoder.blocks):
            before_BTD, x_BTD = x_BTD, block(x_BTD, cos, sin, Seen(Mask(CONTEXT, CONTEXT)))[0]
            found[f"block {number}"] = float((x_BTD - before_BTD).square().mean().sqrt())
        found["stream"] = float(x_BTD.square().mean().sqrt())
        found["logits"] = float(decoder.logits(decoder.hidden_states(inputs)).square().mean().sqrt())
    return found


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_activations_are_flat_from_width_64_to_1024(optimizer):
    found = [scales(optimizer, width) for width in (64, 256, 1024)]
    for name in found[0]:
        sizes = [each[name] for each in found]
        assert max(sizes) < 1.25 * min(sizes), (name, sizes)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_without_the_transfer_they_are_not(optimizer):
    """The check can fail: with one learning rate for all widths, four times the width gives far larger logits."""
    narrow, wide = (scales(optimizer, width, transfer="none")["logits"] for width in (64, 256))
    assert wide > 2 * narrow


def test_logits_are_flat_from_2_to_32_layers_under_muon():
    sizes = [scales("muon", 64, layers=layers, steps=10)["logits"] for layers in (2, 8, 32)]
    assert max(sizes) < 1.25 * min(sizes), sizes
