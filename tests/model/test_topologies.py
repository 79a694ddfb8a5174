"""Every topology against arithmetic, autograd, the compiler and itself alone."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode
from trunks import TOPOLOGIES, config, random_model, row

from calledshot.model import BatchTensors, Decoder, EncoderInputs, Reading, Request, Sampling, generate
from calledshot.objective import Batch
from calledshot.objective.batch import Encoded
from calledshot.recipe import Recipe, schema
from calledshot.training.optimizer import Optimizer, gradient_norm
from calledshot.training.slots import make_slots

NORMS = ("pre", "post", "sandwich")


@pytest.fixture
def compiler():
    """A compiler that remembers nothing, before and after: a block may be compiled only so many times in a process."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def initialised(model: schema.Model) -> Decoder:
    decoder = Decoder(model)
    decoder.initialise(torch.Generator().manual_seed(0))
    return decoder


def two_documents(decoder: Decoder, seed: int = 0, T: int = 32, S: int = 24) -> dict[str, object]:
    """One row of two documents and padding, read as the topology has it; two rows of it in all."""
    generator = torch.Generator().manual_seed(seed)
    documents_1T, positions_1T = row(17, 12, width=T)
    documents_1S, positions_1S = row(8, 12, width=S)
    tokens_BT, tokens_BS = (torch.randint(0, 96, (2, width), generator=generator) for width in (T, S))
    reading: dict[str, object] = {
        "positions_BT": positions_1T.expand(2, -1), "documents_BT": documents_1T.expand(2, -1).contiguous(),
    }  # fmt: skip
    if decoder.config.topology == "prefix":
        reading["regions_BT"] = (positions_1T < 6).to(torch.int8).expand(2, -1).contiguous()
    if decoder.encoder is not None:
        wide = (each.expand(2, -1).contiguous() for each in (positions_1S, documents_1S))
        reading["encoder_inputs"] = EncoderInputs(tokens_BS, *wide)
    return {"tokens": tokens_BT, **reading}


def loss_of(decoder: Decoder, tokens: Tensor, **reading: object) -> Tensor:
    loss, z_term = decoder.loss(
        tokens, tokens.roll(-1, 1), torch.ones(tokens.shape), torch.tensor(0.01), 1e-4, **reading
    )
    return loss + z_term


@pytest.mark.parametrize("placement", NORMS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_the_first_predictions_are_uniform(topology, placement):
    decoder = initialised(config(topology, norm_placement=placement, positions="t5"))
    arguments = two_documents(decoder)
    tokens = arguments.pop("tokens")
    losses = decoder.token_losses(tokens, tokens.roll(1), **arguments)
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(96)))


@pytest.mark.parametrize("tied", [False, True])
def test_a_table_begins_small_only_where_it_is_the_head_too(tied):
    """An encoder of another width has a table of its own."""
    decoder = initialised(config("narrow encoder", width=64, vocabulary=960, tied_embeddings=tied))
    assert float(decoder.embedding_VD.data.std()) == pytest.approx(64**-0.75 if tied else 1.0, rel=0.02)
    assert float(decoder.encoder.embedding_VD.data.std()) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_parameters_drawn_one_at_a_time_are_those_of_the_whole(topology):
    decoder = initialised(config(topology, norm_placement="sandwich", experts=4))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in decoder.named_parameters():
        whole = torch.empty(parameter.shape)
        decoder.initial(name, whole, generator)
        assert torch.equal(whole, parameter), name


@pytest.mark.parametrize("experts", [0, 4])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_parameters_may_come_as_plain_matrices(topology, experts):
    """As FSDP keeps them: forwards, backwards and through a cache."""
    whole, flat = (random_model(config(topology, experts=experts, shared_expert_hidden=8)) for _ in range(2))
    for module in flat.modules():
        for name, each in list(module.named_parameters(recurse=False)):
            if each.dim() > 2:
                setattr(module, name, torch.nn.Parameter(each.data.view(-1, each.size(-1))))
    losses = [loss_of(each, **two_documents(each)) for each in (whole, flat)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for ours, theirs in zip(flat.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours.grad.view(-1), theirs.grad.view(-1))
    request = Request((1, 2, 3), 4, Sampling(temperature=0.0), reading=Reading(start=(1,)))
    assert generate(flat, [request])[0].tokens == generate(whole, [request])[0].tokens


@pytest.mark.parametrize("topology", ["decoder", "encoder-decoder"])
def test_blocks_are_called_and_not_compiled_where_something_hangs_on_the_call(topology):
    decoder, calls = random_model(config(topology)), []
    decoder.hooked = True
    for block in decoder.all_blocks:
        block.register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
        block.compile(backend=lambda *_: pytest.fail("compiled"))
    arguments = two_documents(decoder)
    tokens = arguments.pop("tokens")
    decoder.token_losses(tokens, tokens.roll(1), **arguments)
    assert calls == [False] * len(decoder.all_blocks)
    calls.clear()
    generate(decoder, [Request((1, 2, 3), 4, reading=Reading(start=(1,)))])
    encoder = 0 if decoder.encoder is None else len(decoder.encoder.blocks)
    assert len(calls) == encoder + 4 * len(decoder.blocks)


@pytest.mark.parametrize("layers, encoder_layers", [(4, 4), (2, 8)])
def test_sandwiched_branches_add_up_to_the_embeddings_variance(layers, encoder_layers):
    """In both stacks, however deep: the stream ends at the square root of 2."""
    model = config(
        "encoder-decoder", norm_placement="sandwich", layers=layers, encoder_layers=encoder_layers, width=256
    )
    decoder = initialised(model)
    arguments = two_documents(decoder)
    scales = decoder.activation_scales(arguments.pop("tokens"), **arguments)
    assert scales[f"blocks.{layers - 1}"] == pytest.approx(math.sqrt(2), rel=0.1)
    assert scales[f"encoder.blocks.{encoder_layers - 1}"] == pytest.approx(math.sqrt(2), rel=0.1)


@pytest.mark.parametrize("positions", ["rope", "t5"])
@pytest.mark.parametrize("placement", NORMS)
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_gradients_flow_to_every_parameter(topology, placement, positions):
    model = config(topology, norm_placement=placement, positions=positions, tied_embeddings=placement == "post")
    decoder = random_model(model)
    arguments = two_documents(decoder)
    loss_of(decoder, **arguments).backward()
    without = [name for name, each in decoder.named_parameters() if each.grad is None or not each.grad.any()]
    assert without == []
    assert all(each.grad.isfinite().all() for each in decoder.parameters())


@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize("positions", ["rope", "t5"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
@torch.no_grad()
def test_packed_documents_are_what_they_are_alone(topology, positions, blocked):
    """Both rows of a batch as the objectives lay it out; an encoder's documents begin where pooling wants them."""
    decoder = random_model(config(topology, positions=positions), blocked=blocked)
    generator = np.random.default_rng(0)
    T, S = 128, 96
    lengths = [[(40, 20), (1, 8), (80, 64)], [(128, 3)]]
    shape = len(lengths), T
    arrays = {name: np.zeros(shape, np.int32) for name in ("inputs", "targets", "positions")}
    documents, weights, regions = np.full(shape, -1, np.int32), np.zeros(shape, np.float32), np.zeros(shape, np.int8)
    given = {name: np.zeros((len(lengths), S), np.int32) for name in ("inputs", "positions")}
    of_given = np.full((len(lengths), S), -1, np.int32)
    alone = []
    for b, rows in enumerate(lengths):
        start = begin = 0
        for index, (length, inputs) in enumerate(rows):
            here, there = slice(start, start + length), slice(begin, begin + inputs)
            for name in ("inputs", "targets"):
                arrays[name][b, here] = generator.integers(0, 96, length)
            arrays["positions"][b, here], documents[b, here], weights[b, here] = np.arange(length), index, 1
            given["inputs"][b, there] = generator.integers(0, 96, inputs)
            given["positions"][b, there], of_given[b, there] = np.arange(inputs), index
            if topology == "prefix":
                regions[b, start : start + length // 2] = 1
            alone.append((b, here, there))
            start, begin = start + length, begin + inputs + -inputs % 4
    encoded = Encoded(given["inputs"], of_given, given["positions"]) if decoder.encoder else None
    batch = Batch(
        arrays["inputs"], arrays["targets"], weights, documents, arrays["positions"], regions,
        np.zeros(2, np.int32), encoded,
    )  # fmt: skip
    tensors = BatchTensors.of(batch, torch.device("cpu"))
    together_BT = decoder.token_losses(tensors.inputs, tensors.targets, **tensors.reading)
    assert together_BT.isfinite().all()
    for b, here, there in alone:
        reading = {"regions_BT": None if tensors.regions is None else tensors.regions[b : b + 1, here]}
        if tensors.encoder is not None:
            reading["encoder_inputs"] = EncoderInputs(tensors.encoder.tokens_BS[b : b + 1, there])
        one = decoder.token_losses(tensors.inputs[b : b + 1, here], tensors.targets[b : b + 1, here], **reading)
        torch.testing.assert_close(together_BT[b : b + 1, here], one, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize(
    "topology, positions, blocked",
    [
        ("decoder", "t5", False), ("prefix", "rope", True), ("encoder-decoder", "t5", True),
        ("encoder-decoder", "rope", False), pytest.param("pooling encoder", "rope", True, marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_blocks_compile_whole_and_once(topology, positions, blocked, compiler):
    """No graph breaks, one graph for all blocks of a stack and length, and none at later steps."""
    decoder = random_model(config(topology, positions=positions), blocked=blocked)
    counter = CompileCounterWithBackend("aot_eager")
    for block in decoder.all_blocks:
        block.compile(backend=counter, fullgraph=True, dynamic=False)
    expected = [loss_of(random_model(decoder.config), **two_documents(decoder, seed)) for seed in range(3)]
    for seed in range(3):
        loss = loss_of(decoder, **two_documents(decoder, seed))
        loss.backward()
        torch.testing.assert_close(loss, expected[seed])
        lengths = 1 if decoder.encoder is None else 2 + decoder.config.encoder_pooling // 2
        assert counter.frame_count == lengths


@pytest.mark.slow
@pytest.mark.parametrize("positions", ["rope", "t5"])
@pytest.mark.parametrize("topology", ["prefix", "encoder-decoder", "pooling encoder"])
def test_compiled_blocks_give_what_plain_ones_give(topology, positions, compiler):
    """Through inductor, values and gradients."""
    plain, compiled = (random_model(config(topology, positions=positions)) for _ in range(2))
    compiled.compile_blocks()
    losses = [loss_of(each, **two_documents(each, T=128, S=96)) for each in (plain, compiled)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for (name, ours), theirs in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        assert torch.linalg.vector_norm(ours.grad - theirs.grad) < 1e-4 * torch.linalg.vector_norm(theirs.grad), name


@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize("positions", ["rope", "t5"])
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_bfloat16_is_close_to_float32(topology, positions, blocked):
    exact = random_model(config(topology, positions=positions), blocked=blocked)
    rounded = random_model(config(topology, positions=positions), blocked=blocked).bfloat16()
    losses = [loss_of(each, **two_documents(each)) for each in (exact, rounded)]
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0.0)
    for loss in losses:
        loss.backward()
    slopes = [torch.cat([each.grad.float().flatten() for each in model.parameters()]) for model in (exact, rounded)]
    assert torch.nn.functional.cosine_similarity(*slopes, dim=0) > 0.995


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("topology", TOPOLOGIES)
@torch.no_grad()
def test_packed_weights_decode_the_same(topology, dtype):
    decoder = random_model(config(topology)).to(dtype)
    twin = decoder.packed()
    prompt, inputs = torch.arange(20).view(2, 10), torch.arange(24).view(2, 12)
    regions = torch.ones(2, 10, dtype=torch.int8) if topology == "prefix" else None
    encoder = None if decoder.encoder is None else EncoderInputs(inputs)
    found = []
    for model in (decoder, twin):
        cache = model.new_cache(2, 12, 12)
        read = model.hidden_states(prompt, cache=cache, regions_BT=regions, encoder_inputs=encoder)
        new = model.hidden_states(torch.tensor([[1], [2]]), torch.tensor([[10], [10]]), cache=cache)
        found.append(model.logits(torch.cat([read, new], 1)))
    tolerance = 2e-5 if dtype == torch.float32 else 0.06
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_activation_scales_name_every_block(topology):
    decoder = random_model(config(topology))
    arguments = two_documents(decoder)
    tokens = arguments.pop("tokens")
    scales = decoder.activation_scales(tokens, **arguments)
    encoders = decoder.derived.encoder.layers if decoder.derived.encoder else 0
    blocks = [f"blocks.{n}" for n in range(2)] + [f"encoder.blocks.{n}" for n in range(encoders)]
    assert set(scales) == {"embedding", "final", *blocks}
    with torch.no_grad():
        final = decoder.hidden_states(tokens, **arguments)
    assert scales["final"] == pytest.approx(float(final.square().mean().sqrt()))
    assert all(not block._forward_hooks for block in decoder.all_blocks)


def projection_flops(decoder: Decoder, tokens: Tensor, **reading: object) -> int:
    """Of the products with weights in one forward pass, head left out: attention's own are batched ones."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        decoder.hidden_states(tokens, **reading)
    return counter.get_flop_counts()["Global"][torch.ops.aten.mm]


@pytest.mark.parametrize("keys, hidden", [({}, 224), ({"kv_heads": 4, "feed_forward": "gelu"}, 240)])
def test_an_encoder_decoder_of_n_parameters_costs_a_decoder_of_half(keys, hidden):
    """Raffel et al. 2020, table 2: each token crosses one of the two stacks."""

    def non_embedding(decoder: Decoder) -> int:
        return sum(each.numel() for name, each in decoder.named_parameters() if not name.endswith("_VD"))

    both = random_model(config("encoder-decoder", width=64, layers=4, hidden=192, **keys))
    one = random_model(config(width=64, layers=4, hidden=hidden, **keys))
    assert non_embedding(one) == pytest.approx(non_embedding(both) / 2, rel=0.05)
    tokens = torch.arange(96).view(1, 96)
    inputs = EncoderInputs(tokens[:, :48])
    of_both = projection_flops(both, tokens[:, 48:], encoder_inputs=inputs)
    assert of_both == pytest.approx(projection_flops(one, tokens), rel=0.05)
    # Exactly 2 FLOPs a matrix parameter and token of the half that it meets.
    matrices = sum(each.numel() for each in both.parameters() if each.dim() > 1) - 2 * 96 * 64
    assert of_both == matrices * 96


def learnt_scales(model: schema.Model, optimizer: str, steps: int = 4) -> dict[str, float]:
    """What blocks add to the stream, what positions add to scores and the head gives, after some steps on one batch."""
    rates = {"muon": 0.02, "adamw": 0.01}
    settings = schema.Optimizer(name=optimizer, learning_rate=rates[optimizer], base_width=64)
    decoder = initialised(model)
    slots = make_slots(decoder, {name: parameter.data for name, parameter in decoder.named_parameters()})
    update = Optimizer(slots, Recipe(model=model, optimizer=settings))
    arguments = two_documents(decoder, T=64, S=64)
    tokens = arguments.pop("tokens")
    for step in range(1, steps + 1):
        loss_of(decoder, tokens, **arguments).backward()
        for slot in slots:
            slot.collect()
        update.step(step, gradient_norm(slots), 1.0)
        update.clear()
    found: dict[str, float] = {}

    def note(name: str):
        def hook(_: object, given: tuple[Tensor, ...], output: Tensor | tuple[Tensor, object]) -> None:
            x_BTD = output[0] if isinstance(output, tuple) else output
            found[name] = float((x_BTD - given[0]).detach().square().mean().sqrt())

        return hook

    hooks = [
        each.register_forward_hook(note(name)) for name, each in decoder.named_modules() if each in decoder.all_blocks
    ]
    states = decoder.hidden_states(tokens, **arguments)
    for hook in hooks:
        hook.remove()
    if decoder.relative_bias_HR is not None:
        found["positions"] = float(decoder.relative_bias_HR.detach().square().mean().sqrt())
    found["logits"] = float(decoder.logits(states).detach().square().mean().sqrt())
    return found


@pytest.mark.parametrize(
    "topology, placement, positions, optimizer",
    [
        ("encoder-decoder", "pre", "rope", "muon"), ("encoder-decoder", "sandwich", "t5", "muon"),
        ("decoder", "post", "rope", "muon"), ("decoder", "sandwich", "rope", "muon"),
        ("decoder", "pre", "t5", "adamw"),
    ],
)  # fmt: skip
def test_activations_are_flat_from_width_64_to_512(topology, placement, positions, optimizer):
    """The coordinate check (Yang et al., arXiv 2203.03466, appendix D.1) past the causal decoder's own."""
    keys = {"norm_placement": placement, "positions": positions}
    found = [
        learnt_scales(
            config(topology, width=width, hidden=width, heads=width // 32, kv_heads=width // 32, **keys), optimizer
        )
        for width in (64, 512)
    ]
    for name in found[0]:
        sizes = [each[name] for each in found]
        assert max(sizes) < 1.5 * min(sizes), (name, sizes)
