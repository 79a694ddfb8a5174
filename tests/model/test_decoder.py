"""The decoder against arithmetic, autograd and PyTorch's own functions."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from calledshot.model import Decoder
from calledshot.model import loss as loss_module
from calledshot.model.attention import Mask, attend, ready
from calledshot.model.loss import chunked_cross_entropy, token_losses
from calledshot.model.positions import rotary
from calledshot.objective import Batch, causal
from calledshot.recipe import Recipe, cost, schema

SHAPES = {
    "gqa": schema.Model(layers=3, width=96, heads=6, kv_heads=2, vocabulary=320),
    "mha": schema.Model(layers=2, width=64, heads=4, kv_heads=4, vocabulary=256, qk_norm=False),
    "mqa-tied": schema.Model(layers=2, width=64, heads=4, kv_heads=1, vocabulary=256, tied_embeddings=True),
    "free": schema.Model(
        layers=1, width=48, heads=3, kv_heads=3, head_width=32, hidden=100, vocabulary=192, softcap=30.0
    ),
}


def random_decoder(config: schema.Model, *, blocked: bool = True) -> Decoder:
    """Every parameter random and away from zero."""
    generator = torch.Generator().manual_seed(0)
    decoder = Decoder(config)
    for parameter in decoder.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.data.normal_(0.0, parameter.size(-1) ** -0.5, generator=generator)
    decoder.blocked_attention = blocked
    return decoder


def packed(lengths: list[list[int]], context: int, vocabulary: int) -> tuple[Batch, list[list[np.ndarray]]]:
    """Rows of documents with so many pairs each, and the documents."""
    generator = np.random.default_rng(0)
    rows = [[generator.integers(0, vocabulary, pairs + 1) for pairs in row] for row in lengths]
    return causal(rows, [0] * len(rows), context, pad=0), rows


def tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arrays = batch.inputs, batch.targets.astype(np.int64), batch.positions, batch.documents
    inputs, targets, positions, documents = map(torch.from_numpy, arrays)
    return inputs, targets, positions, documents


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_that_the_recipe_counts(name):
    decoder = Decoder(SHAPES[name])
    counts = cost(Recipe(model=SHAPES[name])).parameters
    sizes = {key: parameter.numel() for key, parameter in decoder.named_parameters()}
    assert sum(sizes.values()) == counts.total == counts.active
    inner = {key: size for key, size in sizes.items() if key not in ("embedding_VD", "separate_head_VD")}
    assert sum(inner.values()) == counts.non_embedding
    assert sum(size for key, size in inner.items() if key.endswith(("norm_D", "norm_C"))) == counts.vectors
    assert sum(size for key, size in sizes.items() if key == "separate_head_VD") == counts.head


@pytest.mark.parametrize("context, computed", [(64, 1.0), (128, 3 / 4), (256, 5 / 8)])
@pytest.mark.parametrize("name", SHAPES)
def test_flops_are_those_that_the_recipe_counts(name, context, computed):
    """A counter sees all products of the score blocks; the recipe counts the (T + 1) / 2 keys that a query may see.

    One block computes the whole square, two 3/4 of it, four 5/8: all above the triangle is thrown away.
    """
    config = schema.Model(**{**vars(SHAPES[name]), "context": context})
    counted = cost(Recipe(model=config)).flops_per_token
    assert counted.attention * 2 * context == counted.attention_full * (context + 1)
    decoder = random_decoder(config)
    tokens = torch.arange(2 * context).view(2, context) % config.vocabulary
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        decoder.logits(decoder.hidden_states(tokens))
    attention = computed * counted.attention_full
    assert forward.get_total_flops() / tokens.numel() == counted.forward + (attention - counted.attention) / 3
    with FlopCounterMode(display=False) as both:
        loss, z_term = decoder.loss(tokens, tokens, torch.ones(2, context), torch.tensor(1.0), 1e-4)
        (loss + z_term).backward()
    assert both.get_total_flops() / tokens.numel() == counted.total - counted.attention + attention


@pytest.mark.parametrize("blocked", [True, False])
def test_no_gradient_crosses_a_document(blocked):
    """The Jacobian of one layer is zero exactly where the mask says so. 128 positions are two blocks of rows."""
    config = schema.Model(layers=1, width=32, heads=4, kv_heads=2, vocabulary=64)
    decoder = random_decoder(config, blocked=blocked)
    batch, _ = packed([[50, 1, 30, 40], [63, 65]], 128, 64)
    _, _, positions, documents = tensors(batch)
    cos, sin = rotary(positions, decoder.derived, 8)
    mask = Mask(128, 128, documents_BT=documents)
    seen = ready(mask, torch.device("cpu"), torch.float32, blocked=blocked)
    x_BTD = torch.randn(2, 128, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y_BTD, _ = decoder.blocks[0](x_BTD, cos, sin, seen)
    allowed_BTS = mask.allowed(0, 128, 128)
    for t in range(128):
        (gradient_BTD,) = torch.autograd.grad(y_BTD[:, t].square().sum(), x_BTD, retain_graph=True)
        assert torch.equal(gradient_BTD.abs().sum(-1) > 0, allowed_BTS[:, t]), t


def test_the_mask_is_same_document_and_not_later():
    batch, _ = packed([[2, 1]], 4, 64)
    _, _, _, documents = tensors(batch)
    seen = Mask(4, 4, documents_BT=documents).allowed(0, 4, 4)
    assert seen[0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


@pytest.mark.parametrize("T", [96, 128, 256])
@pytest.mark.parametrize("with_documents", [False, True])
def test_the_two_attention_paths_are_equal(T, with_documents):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, T, *heads, 16, generator=generator) for heads in ((2, 3), (2,), (2,)))
    documents = tensors(packed([[T // 3, T // 4, T // 5], [T - 7, 7]], T, 64)[0])[3] if with_documents else None
    results = []
    for blocked in (True, False):
        inputs = [one.clone().requires_grad_() for one in (q, k, v)]
        seen = ready(Mask(T, T, documents_BT=documents), torch.device("cpu"), torch.float32, blocked=blocked)
        y = attend(*inputs, seen)
        results.append([y, *torch.autograd.grad((y * torch.arange(16)).sum(), inputs)])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize("name", ["gqa", "free"])
def test_packed_documents_lose_what_they_lose_alone(name, blocked):
    config = SHAPES[name]
    decoder = random_decoder(config, blocked=blocked)
    batch, rows = packed([[30, 1, 77, 10], [128], [60, 68]], 128, config.vocabulary)
    inputs, targets, positions, documents = tensors(batch)
    together = decoder.token_losses(inputs, targets, positions_BT=positions, documents_BT=documents)
    for row, pieces in enumerate(rows):
        for index, ids in enumerate(pieces):
            alone = decoder.token_losses(torch.from_numpy(ids[None, :-1]), torch.from_numpy(ids[None, 1:]))[0]
            torch.testing.assert_close(together[row][documents[row] == index], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gqa", "mha", "mqa-tied"])
def test_a_cache_filled_in_pieces_gives_the_logits_of_one_pass(name):
    config = SHAPES[name]
    decoder = random_decoder(config).requires_grad_(False)
    tokens = torch.randint(0, config.vocabulary, (3, 20), generator=torch.Generator().manual_seed(1))
    whole = decoder.hidden_states(tokens)
    cache = decoder.new_cache(3, 24)
    parts = [
        decoder.hidden_states(tokens[:, start:stop], torch.arange(start, stop).expand(3, -1), cache=cache)
        for start, stop in ((0, 11), (11, 12), (12, 19), (19, 20))
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-5)


def reference_loss(
    hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor, scale: float, softcap: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """The same sums by `F.cross_entropy` over whole logits."""
    logits = hidden @ head.T
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum() * scale
    return loss, z_loss * (logits.logsumexp(-1).square() * weights).sum() * scale


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_chunked_cross_entropy_equals_torchs_in_float64(softcap, z_loss, monkeypatch):
    """Value and gradients, over more than two chunks with a ragged end, with uneven weights and padding."""
    generator = torch.Generator().manual_seed(0)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", {"cpu": 512 * 50})
    N, D, V = 2 * 512 + 100, 24, 50
    hidden, head = torch.randn(N, D, generator=generator), torch.randn(V, D, generator=generator)
    targets = torch.randint(0, V, (N,), generator=generator)
    weights = torch.rand(N, generator=generator)
    weights[::7] = 0.0
    scale = 1.0 / float(weights.sum())
    exact = [hidden.double().requires_grad_(), head.double().requires_grad_()]
    expected = reference_loss(*exact, targets, weights.double(), scale, softcap, z_loss)
    ours = [hidden.requires_grad_(), head.requires_grad_()]
    found = chunked_cross_entropy(
        *ours, targets, weights, scale=torch.tensor(scale), softcap=softcap, z_loss=z_loss
    )  # fmt: skip
    torch.testing.assert_close([each.double() for each in found], list(expected), rtol=1e-6, atol=1e-7)
    sum(found).backward()
    sum(expected).backward()
    for ours_, exact_ in zip(ours, exact, strict=True):
        torch.testing.assert_close(ours_.grad.double(), exact_.grad, rtol=1e-5, atol=1e-8)
    assert (ours[0].grad[::7] == 0).all()
    each = token_losses(hidden.detach(), head.detach(), targets, softcap)
    torch.testing.assert_close((each * weights).sum() * scale, found[0].detach())


def test_micro_batches_add_up_to_the_batch():
    generator = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(600, 16, generator=generator), torch.randn(40, 16, generator=generator).requires_grad_()
    targets, weights = torch.randint(0, 40, (600,), generator=generator), torch.rand(600, generator=generator)
    scale = 1.0 / weights.sum()
    whole, _ = chunked_cross_entropy(hidden, head, targets, weights, scale=scale)
    (expected,) = torch.autograd.grad(whole, head)
    parts = [
        chunked_cross_entropy(hidden[a:b], head, targets[a:b], weights[a:b], scale=scale)[0]
        for a, b in ((0, 150), (150, 600))
    ]
    found = sum(torch.autograd.grad(part, head)[0] for part in parts)
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("width", [64, 256])
def test_the_first_predictions_are_uniform(width):
    config = schema.Model(layers=2, width=width, heads=4, kv_heads=2, vocabulary=256)
    decoder = Decoder(config)
    decoder.initialise(torch.Generator().manual_seed(0))
    tokens = torch.arange(64)[None]
    losses = decoder.token_losses(tokens, tokens.roll(1))
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(256)))
