"""Ranks that share a model give the loss and the gradients of one process that has it whole. Real processes (gloo)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import Tensor
from trunks import config, encoder_row, random_model, row

from calledshot.model import Decoder, EncoderInputs
from calledshot.recipe import schema


@dataclass(frozen=True)
class Layout:
    """Sizes of the groups; ranks are ordered by (rows, context, tensor), the last fastest."""

    tensor: int = 1
    context: int = 1
    expert: int = 1


@functools.cache
def groups(layout: Layout) -> dict[str, dist.ProcessGroup]:
    """Of this process."""
    grid = torch.arange(dist.get_world_size()).view(-1, layout.context, layout.tensor)
    rows = {
        "tensor": grid.reshape(-1, layout.tensor), "context": grid.mT.reshape(-1, layout.context),
        "experts": grid.reshape(-1, layout.expert),
    }  # fmt: skip
    return {name: dist.new_subgroups_by_enumeration(ranks.tolist())[0] for name, ranks in rows.items()}


@dataclass(frozen=True)
class Rows:
    """Some rows as a trunk reads them."""

    tokens: Tensor
    reading: dict[str, Any]

    @classmethod
    def of(cls, model: schema.Model, seed: int = 0, T: int = 32, S: int = 24) -> Rows:
        """Two rows of two or three documents and padding."""
        generator = torch.Generator().manual_seed(seed)
        tokens_BT = torch.randint(0, 96, (2, T), generator=generator)
        first, second = row(17, T - 20, width=T), row(5, 9, T - 14, width=T)
        documents_BT, positions_BT = (torch.cat(pair) for pair in zip(first, second, strict=True))
        reading: dict[str, Any] = {"positions_BT": positions_BT, "documents_BT": documents_BT}
        if model.topology == "prefix":
            reading["regions_BT"] = (positions_BT < 6).to(torch.int8)
        if model.topology == "encoder-decoder":
            tokens_BS = torch.randint(0, 96, (2, S), generator=generator)
            rows = [encoder_row(tokens_BS[:1], 8, S - 10), encoder_row(tokens_BS[1:], 6, 8, S - 14)]
            reading["encoder_inputs"] = EncoderInputs(
                *(torch.cat(each) for each in zip(*map(_fields, rows), strict=True))
            )
        return cls(tokens_BT, reading)

    def columns(self, part: int, parts: int) -> Rows:
        """A part of the positions."""
        cut = {name: each.chunk(parts, 1)[part] for name, each in self.reading.items()}
        return Rows(self.tokens.chunk(parts, 1)[part], cut)


def _fields(inputs: EncoderInputs) -> tuple[Tensor, ...]:
    return inputs.tokens_BS, inputs.positions_BS, inputs.documents_BS


@dataclass(frozen=True)
class Passed:
    """What came of a pass forward and back."""

    loss: Tensor
    """With the experts' balance, of these rows."""
    token_losses: Tensor
    gradients: dict[str, Tensor]
    loads: Tensor | None


def passed(model: Decoder, rows: Rows, share: float = 1.0) -> Passed:
    """`share` is that of the balance loss, as a trainer has it."""
    weights, targets = (rows.tokens % 3).float(), (rows.tokens * 7 + 1) % 96
    loss, z_term = model.loss(rows.tokens, targets, weights, torch.tensor(0.01), 1e-2, **rows.reading)
    total, loads = loss + z_term, None
    if model.records:
        total = total + share * model.auxiliary_loss()
        loads = torch.stack([record.load_E for record in model.records])
    total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return Passed(total.detach(), model.token_losses(rows.tokens, targets, **rows.reading), gradients, loads)


def part(whole: Tensor, axis: int, number: int, parts: int) -> Tensor:
    return whole.chunk(parts, axis)[number]


def shared(model: schema.Model, layout: Layout, state: Mapping[str, Tensor]) -> Decoder:
    """This rank's part of a model with these parameters."""
    with torch.device("meta"):
        decoder = Decoder(model)
    mine = groups(layout)
    decoder.parallelize_tensor(mine["tensor"])
    decoder.parallelize_experts(mine["experts"])
    decoder.parallelize_context(mine["context"])
    parts = {name: part(each, *decoder.cuts[name]) if name in decoder.cuts else each for name, each in state.items()}
    decoder.load_state_dict({name: each.clone() for name, each in parts.items()}, assign=True)
    return decoder.requires_grad_(True)


def on_a_rank(
    model: schema.Model, layout: Layout, state: Mapping[str, Tensor], batch: list[Rows], settings: Mapping[str, Any]
) -> tuple[Passed, dict[str, tuple[int, int, int]]]:
    """What a rank makes of its rows of a batch."""
    decoder = shared(model, layout, state).to(settings.get("dtype", torch.float32))
    decoder.blocked_attention = settings.get("blocked", True)
    if settings.get("compiled"):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        decoder.compile_blocks()
    rank = dist.get_rank()
    rows = batch[rank // (layout.context * layout.tensor)]
    if layout.context > 1:
        rows = rows.columns(rank // layout.tensor % layout.context, layout.context)
    found = passed(decoder, rows)
    assert not torch._dynamo.utils.counters["graph_break"]
    return found, decoder.cuts


def alone(model: Decoder, batch: list[Rows]) -> Passed:
    """What one process makes of the whole batch, rows of one rank at a time."""
    each = [passed(model, rows) for rows in batch]
    gradients = {name: sum(one.gradients[name] for one in each) for name in each[0].gradients}
    loads = None if each[0].loads is None else sum(one.loads for one in each)
    return Passed(sum(one.loss for one in each), torch.cat([one.token_losses for one in each]), gradients, loads)


def together(answers: list[tuple[Passed, dict[str, tuple[int, int, int]]]], layout: Layout) -> Passed:
    """The ranks' answers as one. What all ranks of a tensor group have whole must be the same on all."""
    columns, tensor = [], layout.tensor
    for start in range(0, len(answers), tensor):
        group = answers[start : start + tensor]
        gradients = {}
        for name, gradient in group[0][0].gradients.items():
            others = [each.gradients[name] for each, _ in group]
            if tensor > 1 and name in group[0][1]:
                gradient = torch.cat(others, group[0][1][name][0])
            else:
                assert all(torch.equal(gradient, other) for other in others), name
            gradients[name] = gradient
        first = group[0][0]
        assert all(torch.equal(first.token_losses, each.token_losses) for each, _ in group)
        assert all(torch.equal(first.loss, each.loss) for each, _ in group)
        columns.append((Passed(first.loss, first.token_losses, gradients, first.loads), group[0][1]))
    gradients = {}
    for name in columns[0][0].gradients:
        all_ranks = [each.gradients[name] for each, _ in columns]
        apart = layout.expert > 1 and name in columns[0][1]
        gradients[name] = torch.cat(all_ranks, columns[0][1][name][0]) if apart else sum(all_ranks)
    rows = [
        torch.cat([each.token_losses for each, _ in columns[start : start + layout.context]], 1)
        for start in range(0, len(columns), layout.context)
    ]
    loads = None if columns[0][0].loads is None else sum(each.loads for each, _ in columns)
    return Passed(sum(each.loss for each, _ in columns), torch.cat(rows), gradients, loads)


def assert_same(found: Passed, wanted: Passed, tolerance: float = 1e-5) -> None:
    """Each tensor by its norm."""

    def near(ours: Tensor, theirs: Tensor) -> bool:
        return bool(torch.linalg.vector_norm(ours.float() - theirs) <= tolerance * torch.linalg.vector_norm(theirs))

    assert near(found.loss, wanted.loss), (found.loss, wanted.loss)
    assert near(found.token_losses, wanted.token_losses)
    assert found.loads is None or torch.allclose(found.loads, wanted.loads)
    assert found.gradients.keys() == wanted.gradients.keys()
    for name, gradient in wanted.gradients.items():
        assert gradient.abs().max() > 0, name
        assert near(found.gradients[name], gradient), name


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


def check(
    ranks: Ranks, model: schema.Model, layout: Layout, batch: list[Rows], tolerance: float = 1e-5, **settings: Any
):
    whole = random_model(model, blocked=settings.get("blocked", True))
    state = {name: each.detach() for name, each in whole.state_dict().items()}
    found = together(ranks.run(on_a_rank, model, layout, state, batch, settings), layout)
    assert_same(found, alone(whole, batch), tolerance)


SPARSE = {"experts": 4, "expert_hidden": 16, "balance_weight": 0.5, "router_z_loss": 0.1}
TENSOR = {
    "decoder": config(),
    "decoder of all kinds": config(tied_embeddings=True, positions="t5", norm_placement="post", feed_forward="relu2"),
    "prefix": config("prefix", positions="t5", qk_norm=False, softcap=20.0),
    "encoder-decoder": config("encoder-decoder", norm_placement="sandwich", positions="t5", tied_embeddings=True),
    "narrow encoder": config("narrow encoder", kv_heads=4, norm="layernorm"),
    "pooling encoder": config("pooling encoder"),
    "experts": config(**SPARSE, shared_expert_hidden=8),
    "sigmoid experts": config(**SPARSE, router="sigmoid", feed_forward="gelu", shared_expert_hidden=8, dense_layers=1),
}


@pytest.mark.parametrize("name", TENSOR)
def test_tensor_parallelism_is_one_process(two, name):
    model = TENSOR[name]
    check(two, model, Layout(tensor=2), [Rows.of(model)])


EXPERTS = {
    "experts": config(**SPARSE),
    "sigmoid experts": config(**SPARSE, router="sigmoid", balance="bias", feed_forward="gelu", shared_expert_hidden=8),
    "encoder-decoder": config("encoder-decoder", **SPARSE, norm_placement="sandwich", dense_layers=1),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_expert_parallelism_is_one_process(two, name):
    """Of two micro-batches, one for each rank."""
    model = EXPERTS[name]
    check(two, model, Layout(expert=2), [Rows.of(model, seed) for seed in (0, 1)])


CONTEXT = {
    "decoder": config(),
    "decoder with T5's positions": config(positions="t5", tied_embeddings=True, norm_placement="sandwich"),
    "prefix": config("prefix", positions="t5"),
    "experts": config(**SPARSE, router="sigmoid"),
}


@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize("name", CONTEXT)
def test_context_parallelism_is_one_process(two, name, blocked):
    """On packed documents that lie across the cut."""
    model = CONTEXT[name]
    check(two, model, Layout(context=2), [Rows.of(model)], blocked=blocked)


def test_experts_of_ranks_that_share_positions(two):
    model = CONTEXT["experts"]
    check(two, model, Layout(context=2, expert=2), [Rows.of(model)])
