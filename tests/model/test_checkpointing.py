"""What the backward computes again, counted, and that it changes nothing."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from trunks import config, encoder_row, random_model, row

from calledshot.model import Decoder

MODELS = {
    "decoder": config(),
    "encoder-decoder": config("encoder-decoder", positions="t5", norm_placement="sandwich"),
    "experts": config(experts=4, shared_expert_hidden=8),
}


def passed(decoder: Decoder) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients of a row of packed documents."""
    tokens = torch.arange(64)[None] * 7 % 96
    documents, positions = row(40, 20, width=64)
    encoder = None if decoder.encoder is None else encoder_row(tokens, 30, 30)
    loss, z_term = decoder.loss(
        tokens, tokens.roll(1), torch.ones(tokens.shape), torch.tensor(0.1), 1e-4,
        positions_BT=positions, documents_BT=documents, encoder_inputs=encoder,
    )  # fmt: skip
    (loss + z_term).backward()
    return loss.detach(), [each.grad for each in decoder.parameters()]


def kept_bytes(decoder: Decoder) -> int:
    """Of storages that the forward of the blocks leaves to the backward, parameters aside."""
    own = {each.untyped_storage().data_ptr() for each in decoder.parameters()}
    found: dict[int, int] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage().data_ptr() not in own:
            found[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    tokens = torch.arange(64)[None] * 7 % 96
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        alive = decoder.hidden_states(tokens)
    del alive
    return sum(found.values())


@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes(name, kind, blocked):
    expected = passed(random_model(MODELS[name], blocked=blocked))
    decoder = random_model(MODELS[name], blocked=blocked)
    decoder.checkpoint_blocks(kind)
    loss, gradients = passed(decoder)
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(*pair) for pair in zip(gradients, expected[1], strict=True))


def products(kind: str) -> int:
    """FLOPs of all products of a step."""
    decoder = random_model(config(), blocked=False)
    decoder.checkpoint_blocks(kind)
    with FlopCounterMode(display=False) as counter:
        passed(decoder)
    return sum(counter.get_flop_counts()["Global"].values())


def test_full_computes_the_blocks_again_and_selective_none_of_their_products():
    decoder = random_model(config(), blocked=False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder.hidden_states(torch.zeros(1, 64, dtype=torch.long))
    forward = sum(counter.get_flop_counts()["Global"].values())
    plain, selective, full = (products(kind) for kind in ("none", "selective", "full"))
    assert selective == plain
    # The last product of a block is no part of what its backward needs.
    down = 2 * 64 * 64 * 32 * len(decoder.blocks)
    assert full == plain + forward - down


def test_less_is_kept():
    kept = {}
    for kind in ("none", "full"):
        decoder = random_model(config())
        decoder.checkpoint_blocks(kind)
        kept[kind] = kept_bytes(decoder)
    assert kept["full"] < 0.2 * kept["none"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_compiled_blocks_do_the_same(name, kind):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    expected = passed(random_model(MODELS[name]))
    decoder = random_model(MODELS[name])
    decoder.checkpoint_blocks(kind)
    decoder.compile_blocks()
    loss, gradients = passed(decoder)
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.testing.assert_close(loss, expected[0])
    for ours, theirs in zip(gradients, expected[1], strict=True):
        assert torch.linalg.vector_norm(ours - theirs) <= 1e-5 * torch.linalg.vector_norm(theirs)
    torch.compiler.reset()
