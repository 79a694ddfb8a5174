"""Ranks that share a model give the loss and the gradients of one process that has it whole. Real processes (gloo)."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes_kept import Ranks
from torch import Tensor
from trunks import config, encoder_row, random_model, row

from calledshot.model import Decoder, EncoderInputs, Reading, Request, Sampling, batch_nats, generate
from calledshot.objective import Batch
from calledshot.objective.batch import Encoded
from calledshot.recipe import UsageError, schema


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
    decoder.checkpoint_blocks(settings.get("checkpointing", "none"))
    if backend := settings.get("compiler"):
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        decoder.compile_blocks()
        for block in decoder.all_blocks:
            block.compile(backend=backend, dynamic=False)
        decoder.compiled = backend == "inductor"
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
        parts = [each.gradients[name] for each, _ in columns]
        if layout.expert > 1 and name in columns[0][1]:
            starts = range(0, len(parts), layout.expert)
            parts = [torch.cat(parts[start : start + layout.expert], columns[0][1][name][0]) for start in starts]
        gradients[name] = sum(parts)
    rows = [
        torch.cat([each.token_losses for each, _ in columns[start : start + layout.context]], 1)
        for start in range(0, len(columns), layout.context)
    ]
    loads = None if columns[0][0].loads is None else sum(each.loads for each, _ in columns)
    return Passed(sum(each.loss for each, _ in columns), torch.cat(rows), gradients, loads)


def assert_same(found: Passed, wanted: Passed) -> None:
    """Each tensor by its norm, to 1e-5."""

    def near(ours: Tensor, theirs: Tensor) -> bool:
        return bool(torch.linalg.vector_norm(ours.float() - theirs) <= 1e-5 * torch.linalg.vector_norm(theirs))

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


def check(ranks: Ranks, model: schema.Model, layout: Layout, batch: list[Rows], **settings: Any) -> None:
    """The ranks against one process, of the same parameters."""
    whole = random_model(model, blocked=settings.get("blocked", True))
    state = {name: each.detach() for name, each in whole.state_dict().items()}
    found = together(ranks.run(on_a_rank, model, layout, state, batch, settings), layout)
    assert_same(found, alone(whole, batch))


SPARSE = {"experts": 4, "expert_hidden": 16, "balance_weight": 0.5, "router_z_loss": 0.1}
TENSOR = {
    "decoder": config(),
    "decoder of other kinds": config(tied_embeddings=True, positions="t5", norm_placement="post", feed_forward="relu2"),
    "prefix": config("prefix", positions="t5", qk_norm=False, softcap=20.0),
    "encoder-decoder": config("encoder-decoder", norm_placement="sandwich", positions="t5", tied_embeddings=True),
    "narrow encoder": config("narrow encoder", kv_heads=4, norm="layernorm"),
    "pooling encoder": config("pooling encoder"),
    "experts": config(**SPARSE, shared_expert_hidden=8),
    "sigmoid experts": config(**SPARSE, router="sigmoid", feed_forward="gelu", shared_expert_hidden=8, dense_layers=1),
}
EXPERTS = {
    "experts": config(**SPARSE),
    "sigmoid experts": config(**SPARSE, router="sigmoid", balance="bias", feed_forward="gelu", shared_expert_hidden=8),
    "encoder-decoder": config("encoder-decoder", **SPARSE, norm_placement="sandwich", dense_layers=1),
}
CONTEXT = {
    "decoder": config(),
    "decoder with T5's positions": config(positions="t5", tied_embeddings=True, norm_placement="sandwich"),
    "prefix": config("prefix", positions="t5"),
    "experts": config(**SPARSE, router="sigmoid"),
}


@pytest.mark.parametrize("name", TENSOR)
def test_tensor_parallelism_is_one_process(two, name):
    model = TENSOR[name]
    check(two, model, Layout(tensor=2), [Rows.of(model)])


@pytest.mark.parametrize("name", EXPERTS)
def test_expert_parallelism_is_one_process(two, name):
    """Of two micro-batches, one for each rank."""
    model = EXPERTS[name]
    check(two, model, Layout(expert=2), [Rows.of(model, seed) for seed in (0, 1)])


@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize("name", CONTEXT)
def test_context_parallelism_is_one_process(two, name, blocked):
    """On packed documents, one of which lies across the cut."""
    model = CONTEXT[name]
    check(two, model, Layout(context=2), [Rows.of(model, T=256)], blocked=blocked)


def test_experts_of_ranks_that_share_positions(two):
    model = CONTEXT["experts"]
    check(two, model, Layout(context=2, expert=2), [Rows.of(model)])


ALL_KINDS = {
    "tensor": (TENSOR["experts"], Layout(tensor=2), (0,)),
    "tensor, encoder-decoder": (TENSOR["encoder-decoder"], Layout(tensor=2), (0,)),
    "experts": (EXPERTS["sigmoid experts"], Layout(expert=2), (0, 1)),
    "context": (CONTEXT["prefix"], Layout(context=2), (0,)),
    "context and experts": (CONTEXT["experts"], Layout(context=2, expert=2), (0,)),
}


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("name", ["tensor", "context and experts"])
def test_what_is_computed_again_is_exchanged_again(two, name, kind):
    model, layout, seeds = ALL_KINDS[name]
    check(two, model, layout, [Rows.of(model, seed) for seed in seeds], checkpointing=kind)


@pytest.mark.parametrize("name", ALL_KINDS)
def test_bfloat16_is_close_to_one_process_in_float32(two, name):
    model, layout, seeds = ALL_KINDS[name]
    whole, batch = random_model(model), [Rows.of(model, seed) for seed in seeds]
    state = {key: each.detach() for key, each in whole.state_dict().items()}
    found = together(two.run(on_a_rank, model, layout, state, batch, {"dtype": torch.bfloat16}), layout)
    wanted = alone(whole, batch)
    torch.testing.assert_close(found.loss, wanted.loss, rtol=0.02, atol=0.0)
    slopes = [torch.cat([each.float().flatten() for each in one.gradients.values()]) for one in (found, wanted)]
    assert torch.nn.functional.cosine_similarity(*slopes, dim=0) > 0.995


@pytest.mark.parametrize(("name", "checkpointing"), [*((name, "none") for name in ALL_KINDS), ("tensor", "full")])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_blocks_compile_whole(two, name, compiler, checkpointing):
    """Without breaks in their graphs."""
    model, layout, seeds = ALL_KINDS[name]
    batch = [Rows.of(model, seed, T=128, S=64) for seed in seeds]
    check(two, model, layout, batch, compiler=compiler, checkpointing=checkpointing)


def test_experts_that_nobody_chooses_and_ranks_that_nobody_sends_to(two):
    """All tokens go to expert 1 of four, or none to any of the other rank's."""
    model = config(**{**SPARSE, "top_k": 1, "balance": "bias"})
    batch = [Rows.of(model, seed) for seed in (0, 1)]
    for preferred in ([0.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 8.5]):
        whole = random_model(model)
        for block in whole.all_blocks:
            block.experts.bias_E.copy_(torch.tensor(preferred))
        state = {name: each.detach() for name, each in whole.state_dict().items()}
        for compiler in (None, "aot_eager"):
            answers = two.run(on_a_rank, model, Layout(expert=2), state, batch, {"compiler": compiler})
            found, wanted = together(answers, Layout(expert=2)), alone(whole, batch)
            assert (wanted.loads[:, preferred.index(0.0)] == 0).all()
            assert_same(found, wanted)


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    "model, layout, seeds",
    [
        (config("prefix", positions="t5"), Layout(tensor=2, context=2), (0,)),
        (config(**SPARSE), Layout(tensor=2, context=2), (0,)),
        (config(**SPARSE), Layout(context=2, expert=4), (0, 1)),
        (config(**SPARSE), Layout(expert=2), (0, 1, 2, 3)),
        (config(kv_heads=4), Layout(tensor=4), (0,)),
        (config(), Layout(context=4), (0,)),
    ],
)
def test_four_ranks_are_one_process(four, model, layout, seeds):
    check(four, model, layout, [Rows.of(model, seed, T=64) for seed in seeds])


READING = Reading(start=(1,))
DRAWN = [
    Request((1, 5, 9), 8, Sampling(temperature=0.0), reading=READING),
    Request(tuple(range(20)), 8, Sampling(seed=3), reading=READING),
]


def completions(model: schema.Model, layout: Layout, state: Mapping[str, Tensor]) -> tuple[list[list[int]], int]:
    """Of two prompts; and the key heads that a rank's cache holds."""
    decoder = shared(model, layout, state)
    decoder.hooked = True  # blocks are then called, not gone around
    return [each.tokens for each in generate(decoder.packed(), DRAWN)], decoder.new_cache(1, 8).keys[0].size(1)


@pytest.mark.parametrize("name", ALL_KINDS)
def test_ranks_that_share_a_model_generate_what_one_process_does(two, name):
    model, layout, _ = ALL_KINDS[name]
    whole = random_model(model)
    state = {key: each.detach() for key, each in whole.state_dict().items()}
    expected = [each.tokens for each in generate(whole, DRAWN)]
    for tokens, heads in two.run(completions, model, layout, state):
        assert tokens == expected
        assert heads == model.kv_heads // layout.tensor


def held_out(model: schema.Model, layout: Layout, state: Mapping[str, Tensor], batch: Batch) -> np.ndarray:
    return batch_nats(shared(model, layout, state), batch)


@pytest.mark.parametrize("name", ALL_KINDS)
def test_held_out_text_costs_ranks_what_it_costs_one_process(two, name):
    """Every rank is given whole rows, and has the nats of all."""
    model, layout, _ = ALL_KINDS[name]
    whole, rows = random_model(model), Rows.of(model, T=30)
    read = {key: each.numpy() for key, each in rows.reading.items() if isinstance(each, Tensor)}
    tokens, nothing = rows.tokens.numpy(), np.zeros(rows.tokens.shape, np.int8)
    encoded = None
    if "encoder_inputs" in rows.reading:
        inputs = rows.reading["encoder_inputs"]
        encoded = Encoded(inputs.tokens_BS.numpy(), inputs.documents_BS.numpy(), inputs.positions_BS.numpy())
    batch = Batch(
        tokens, np.roll(tokens, 1), np.ones_like(tokens, np.float32), read["documents_BT"], read["positions_BT"],
        read.get("regions_BT", nothing), np.zeros(2, np.int32), encoded,
    )  # fmt: skip
    state = {key: each.detach() for key, each in whole.state_dict().items()}
    expected = batch_nats(whole, batch)
    for nats in two.run(held_out, model, layout, state, batch):
        np.testing.assert_allclose(nats, expected, rtol=1e-5)


def refusal(model: schema.Model, ways: tuple[str, ...]) -> str:
    decoder = Decoder(model)
    with pytest.raises(UsageError) as refused:
        for way in ways:
            getattr(decoder, f"parallelize_{way}")(dist.group.WORLD)
    return str(refused.value)


def test_what_cannot_be_shared_is_refused(two):
    for answer in two.run(refusal, config("encoder-decoder"), ("context",)):
        assert "parallel.context=1" in answer
    for answer in two.run(refusal, config(**SPARSE), ("tensor", "experts")):
        assert "parallel.tensor and parallel.expert" in answer


def alone_in_groups(model: schema.Model) -> bool:
    """Whether groups of one change nothing."""
    decoder, alone = Decoder(model), dist.new_subgroups(1)[0]
    before = dict(decoder.named_parameters())
    for way in ("tensor", "experts", "context"):
        getattr(decoder, f"parallelize_{way}")(alone)
    after = dict(decoder.named_parameters())
    kept = all(after[name] is each for name, each in before.items()) and not decoder.cuts
    return kept and all(block.tensor is block.context is None for block in decoder.all_blocks)


def test_a_group_of_one_rank_changes_nothing(two):
    assert two.run(alone_in_groups, config("encoder-decoder", **SPARSE)) == [True, True]
