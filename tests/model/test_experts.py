"""Experts against other people's layers, naive loops and arithmetic."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from calledshot.model.activation import activate
from calledshot.model.experts import Experts
from calledshot.model.grouped import grouped_linear, grouped_outer
from calledshot.model.routing import arrange, choose, load_figures
from calledshot.recipe import schema, shape

WIDTH = 32


def make(width: int = WIDTH, *, scale: float = 1.0, **keys) -> Experts:
    """A layer with random parameters; `scale` is that of the router's logits."""
    defaults = {"experts": 8, "top_k": 2, "expert_hidden": 48, "balance": "none", "router_z_loss": 0.0}
    model = schema.Model(width=width, heads=4, kv_heads=4, **{**defaults, **keys})
    layer = Experts(shape(model), width)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in layer.named_parameters():
        factor = scale if name == "router_ED" else 1.0
        parameter.data.normal_(0.0, factor * parameter.size(-1) ** -0.5, generator=generator)
    return layer


def random(*size: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def naive(layer: Experts, x_ND: Tensor, bias_E: Tensor | None = None) -> Tensor:
    """Token by token, expert by expert, with autograd's own gradients."""
    model = layer.model
    logits_NE = x_ND @ layer.router_ED.to(x_ND.dtype).T
    scores_NE = logits_NE.softmax(-1) if model.router == "softmax" else logits_NE.sigmoid()
    chosen_NK = (scores_NE if bias_E is None else scores_NE + bias_E).topk(model.top_k).indices
    rows = []
    for x_D, scores_E, chosen_K in zip(x_ND, scores_NE, chosen_NK, strict=True):
        weights_K = scores_E[chosen_K]
        if model.renormalize:
            weights_K = weights_K / weights_K.sum()
        row = torch.zeros_like(x_D)
        for weight, expert in zip(weights_K, chosen_K, strict=True):
            up = layer.gate_up_E2FD[expert].flatten(0, 1) if "glu" in model.feed_forward else layer.up_EFD[expert]
            row = row + weight * (layer.down_EDF[expert] @ activate(up @ x_D, model.feed_forward))
        if model.shared_expert_hidden:
            up = layer.shared_gate_up_2FD.flatten(0, 1) if "glu" in model.feed_forward else layer.shared_up_FD
            row = row + layer.shared_down_DF @ activate(up @ x_D, model.feed_forward)
        rows.append(row)
    return torch.stack(rows)


def gradients(y: Tensor, of: list[Tensor]) -> list[Tensor]:
    """Of a sum in which each output has its own weight."""
    return list(
        torch.autograd.grad((y * random(*y.shape, seed=2)).sum(), of, allow_unused=True, materialize_grads=True)
    )


def assert_close(found: Tensor, wanted: Tensor, relative: float) -> None:
    """Largest difference as a share of the largest value."""
    difference, largest = (found - wanted).abs().max().item(), wanted.abs().max().item()
    assert difference <= relative * largest


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "qwen3-moe-plain"])
def test_outputs_and_gradients_are_those_of_transformers(name):
    x_BTD = random(2, 20, WIDTH).requires_grad_()
    if name == "mixtral":
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(hidden_size=WIDTH, intermediate_size=48, num_local_experts=8, num_experts_per_tok=2)
        peer, keys = MixtralSparseMoeBlock(config), {}
    else:
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        keys = {"top_k": 3, "renormalize": name == "qwen3-moe"}
        config = Qwen3MoeConfig(
            hidden_size=WIDTH, moe_intermediate_size=48, num_experts=8, num_experts_per_tok=3,
            norm_topk_prob=keys["renormalize"],
        )  # fmt: skip
        peer = Qwen3MoeSparseMoeBlock(config)
    layer = make(**keys)
    for theirs, ours in (
        (peer.gate.weight, layer.router_ED),
        (peer.experts.gate_up_proj, layer.gate_up_E2FD.flatten(1, 2)),
        (peer.experts.down_proj, layer.down_EDF),
    ):
        theirs.data.copy_(ours)
    mine, wanted = layer(x_BTD)[0], peer(x_BTD)
    assert_close(mine, wanted, 1e-5)
    found = gradients(mine, [x_BTD, layer.router_ED, layer.gate_up_E2FD, layer.down_EDF])
    expected = gradients(wanted, [x_BTD, peer.gate.weight, peer.experts.gate_up_proj, peer.experts.down_proj])
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs.view(ours.shape), 1e-5)


@pytest.mark.parametrize("masked", [False, True])
def test_balance_loss_is_that_of_transformers_without_padding(masked):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layer = make(balance="auxiliary", balance_weight=0.1)
    x_BTD, real_BT = random(2, 20, WIDTH), torch.ones(2, 20, dtype=torch.bool)
    real_BT[1, 13:] = not masked
    logits_NE = (x_BTD @ layer.router_ED.T).flatten(0, 1)
    wanted = 0.1 * load_balancing_loss_func((logits_NE,), 8, 2, real_BT)
    _, record = layer(x_BTD, real_BT if masked else None)
    assert record.loss.item() == pytest.approx(wanted.item(), rel=1e-6)
    chosen = logits_NE.topk(2).indices[real_BT.flatten()].flatten()
    assert torch.allclose(record.load_E, chosen.bincount(minlength=8) / len(chosen))
    assert_close(*(torch.autograd.grad(loss, layer.router_ED)[0] for loss in (record.loss, wanted)), 1e-5)


def test_router_z_loss_is_the_mean_square_of_the_log_partition():
    layer, x_ND = make(router_z_loss=1e-3, scale=3.0), random(20, WIDTH)
    wanted = 1e-3 * (x_ND @ layer.router_ED.T).exp().sum(-1).log().square().mean()
    assert layer(x_ND)[1].loss.item() == pytest.approx(wanted.item(), rel=1e-5)


def test_sigmoid_scores_are_balanced_by_their_shares():
    """DeepSeek-V3, equations 17 to 20, with the whole batch as one sequence."""
    layer, x_ND = make(router="sigmoid", balance="auxiliary", balance_weight=1.0), random(20, WIDTH)
    scores_NE = (x_ND @ layer.router_ED.T).sigmoid()
    f_E = scores_NE.topk(2).indices.flatten().bincount(minlength=8) * 8 / (2 * 20)
    p_E = (scores_NE / scores_NE.sum(-1, keepdim=True)).mean(0)
    # Ours is not divided by top_k, as flaxformer's is not.
    assert layer(x_ND)[1].loss.item() == pytest.approx(2 * (f_E * p_E).sum().item(), rel=1e-6)


@pytest.mark.parametrize("renormalize", [True, False])
def test_selection_by_bias_is_that_of_deepseek(renormalize):
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    config = DeepseekV3Config(
        hidden_size=WIDTH, n_routed_experts=16, num_experts_per_tok=4, n_group=1, topk_group=1,
        routed_scaling_factor=1.0, norm_topk_prob=renormalize,
    )  # fmt: skip
    router = DeepseekV3TopkRouter(config)
    router.weight.data.copy_(random(16, WIDTH) * WIDTH**-0.5)
    router.e_score_correction_bias.copy_(0.3 * random(16, seed=5))
    x_ND = random(200, WIDTH, seed=3)
    logits_NE, weights, experts = router(x_ND)
    wanted_NE = torch.zeros(200, 16).scatter(1, experts, weights)
    scores_NE, weights_NK, experts_NK = choose(logits_NE, router.e_score_correction_bias, 4, "sigmoid", renormalize)
    assert torch.allclose(torch.zeros(200, 16).scatter(1, experts_NK, weights_NK), wanted_NE, rtol=1e-6, atol=0)
    plain_NK = scores_NE.topk(4).indices
    assert (plain_NK.sort().values != experts_NK.sort().values).any(), "the bias changed no choice"


KINDS = {
    "swiglu": {},
    "geglu-shared": {"feed_forward": "geglu", "shared_expert_hidden": 16, "renormalize": False},
    "gelu-shared": {"feed_forward": "gelu", "shared_expert_hidden": 16},
    "relu2-sigmoid": {"feed_forward": "relu2", "router": "sigmoid", "top_k": 3},
    "sigmoid-bias": {"router": "sigmoid", "balance": "bias", "renormalize": False},
    "all": {"top_k": 8},
    "one": {"top_k": 1, "renormalize": False},
    "odd": {"expert_hidden": 37},
}


@pytest.mark.parametrize("dtype, relative", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_a_naive_loop(kind, dtype, relative):
    layer = make(**KINDS[kind]).to(dtype)
    if layer.bias_E is not None:
        layer.bias_E.copy_(0.2 * random(8, seed=7))
    x_ND = random(70, WIDTH, dtype=dtype).requires_grad_()
    mine, wanted = layer(x_ND)[0], naive(layer, x_ND, layer.bias_E)
    assert_close(mine, wanted, relative)
    of = [x_ND, *layer.parameters()]
    for found, expected in zip(gradients(mine, of), gradients(wanted, of), strict=True):
        assert_close(found, expected, relative)


@pytest.mark.parametrize("dtype, relative", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("width", [16, 13])
def test_grouped_products_are_those_of_each_group(dtype, relative, width):
    """A width of 13 is one that PyTorch's own grouped product refuses; the last three rows are nobody's."""
    ends = [0, 5, 5, 21, 24]
    x_RI, weight_EOI = random(27, width, dtype=dtype), random(5, 24, width, dtype=dtype, seed=3)
    g_RO = random(27, 24, dtype=dtype, seed=4)
    x_RI.requires_grad_(), weight_EOI.requires_grad_()
    y_RO = grouped_linear(x_RI, weight_EOI, torch.tensor(ends, dtype=torch.int32))
    starts = [0, *ends[:-1]]
    wanted = [x_RI[a:b] @ weight_EOI[e].T for e, (a, b) in enumerate(zip(starts, ends, strict=True))]
    wanted_RO = torch.cat([*wanted, torch.zeros(3, 24, dtype=dtype)])
    assert_close(y_RO, wanted_RO, relative)
    assert not y_RO[24:].any()
    found, expected = (torch.autograd.grad(y, (x_RI, weight_EOI), g_RO) for y in (y_RO, wanted_RO))
    for mine, theirs in zip(found, expected, strict=True):
        assert_close(mine, theirs, relative)
    assert not found[1][0].any() and not found[1][2].any()
    outer = grouped_outer(g_RO, x_RI.detach(), torch.tensor(ends, dtype=torch.int32))
    assert_close(outer[3], g_RO[5:21].T @ x_RI[5:21].detach(), relative)


@pytest.mark.parametrize("tile", [1, 8])
def test_every_choice_has_a_row_of_its_expert(tile):
    experts_NK = torch.stack([torch.randperm(12, generator=torch.Generator().manual_seed(n))[:3] for n in range(40)])
    weights_NK = random(40, 3)
    weights_R, tokens_R, rows_NK, ends_E = arrange(weights_NK, experts_NK, 12, tile)
    assert len(rows_NK.unique()) == 120
    assert torch.equal(weights_R[rows_NK], weights_NK)
    assert torch.equal(tokens_R[rows_NK], torch.arange(40)[:, None].expand(40, 3))
    assert torch.equal(torch.searchsorted(ends_E, rows_NK.int(), right=True), experts_NK)
    assert not ends_E.remainder(tile).any()
    padding = torch.ones_like(weights_R).index_fill(0, rows_NK.flatten(), 0.0).bool()
    assert not weights_R[padding].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_tokens_on_one_expert(dtype):
    """A load of 600 on one expert is kept whole, and the others' gradients are exactly zero."""
    layer = make(top_k=1, renormalize=False).to(dtype)
    layer.router_ED.data.zero_()[5] = 1.0
    x_ND = random(600, WIDTH, dtype=dtype).abs()
    y_ND, record = layer(x_ND)
    assert record.load_E.tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
    assert load_figures(record.load_E) == {"max_over_mean": 8.0, "entropy": 0.0, "dropped": 0.0}
    y_ND.float().square().sum().backward()
    inner = activate(F.linear(x_ND, layer.gate_up_E2FD[5].flatten(0, 1)), "swiglu")
    weight_N1 = (x_ND.float() @ layer.router_ED.T).softmax(-1)[:, 5:6]
    assert_close(y_ND.float(), F.linear(inner, layer.down_EDF[5]).float() * weight_N1, 1e-2)
    others = torch.arange(8) != 5
    for name, parameter in layer.named_parameters():
        assert parameter.grad.isfinite().all(), name
        if name != "router_ED":
            assert not parameter.grad[others].any() and parameter.grad[5].any(), name


def test_a_thousand_experts():
    layer = make(experts=1000, top_k=8, expert_hidden=8, balance="auxiliary", router_z_loss=1e-3)
    x_ND = random(64, WIDTH)
    y_ND, record = layer(x_ND)
    assert_close(y_ND, naive(layer, x_ND), 1e-5)
    (y_ND.square().sum() + record.loss).backward()
    unused = record.load_E == 0
    assert unused.sum() >= 1000 - 64 * 8
    assert not layer.down_EDF.grad[unused].any() and layer.down_EDF.grad[~unused].flatten(1).any(1).all()
    assert layer.router_ED.grad[unused].any(1).all(), "the softmax reaches every expert"


@pytest.mark.parametrize("top_k", [1, 2, 4, 8])
def test_copies_of_a_dense_feed_forward_give_its_output(top_k):
    """Sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055) with renormalised weights."""
    layer, x_ND = make(top_k=top_k), random(100, WIDTH)
    up_XD, down_DF = random(96, WIDTH, seed=3) * WIDTH**-0.5, random(WIDTH, 48, seed=4) * 48**-0.5
    layer.gate_up_E2FD.data.copy_(up_XD.view(2, 48, WIDTH))
    layer.down_EDF.data.copy_(down_DF)
    dense_ND = F.linear(activate(F.linear(x_ND, up_XD), "swiglu"), down_DF)
    assert_close(layer(x_ND)[0], dense_ND, 1e-6)


def test_one_renormalised_expert_teaches_the_router_nothing():
    largest = []
    for renormalize in (True, False):
        layer = make(top_k=1, renormalize=renormalize)
        gradient_ED = gradients(layer(random(50, WIDTH))[0], [layer.router_ED])[0]
        largest.append(float(gradient_ED.abs().max()))
    assert largest[0] < 1e-5 * largest[1]


def test_router_and_bias_stay_float32_in_their_own_memory():
    layer = make(balance="bias")
    router, bias = layer.router_ED.data_ptr(), layer.bias_E.data_ptr()
    layer.to(torch.bfloat16)
    assert layer.down_EDF.dtype == torch.bfloat16
    assert layer.router_ED.dtype == layer.bias_E.dtype == torch.float32
    assert (layer.router_ED.data_ptr(), layer.bias_E.data_ptr()) == (router, bias)
    assert layer.double().router_ED.dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_a_few_tokens_is_the_same_arithmetic(kind):
    layer, x_ND = make(**KINDS[kind]), random(1, WIDTH)
    if layer.bias_E is not None:
        layer.bias_E.copy_(0.2 * random(8, seed=7))
    with torch.no_grad():
        y_ND, record = layer(x_ND)
    assert record is None
    assert_close(y_ND, layer(x_ND)[0], 1e-6)


@pytest.mark.parametrize("keys, dtype, relative", [
    ({"balance": "auxiliary", "router_z_loss": 1e-3, "shared_expert_hidden": 16}, torch.float32, 1e-5),
    ({"balance": "bias", "router": "sigmoid"}, torch.bfloat16, 2e-2),
])  # fmt: skip
def test_compiled_is_eager(keys, dtype, relative):
    """In one graph, for loads that it was not traced with."""
    layer = make(**keys).to(dtype)
    compiled = torch.compile(layer, fullgraph=True, dynamic=False)
    for seed in (1, 2):
        layer.router_ED.data.copy_(random(8, WIDTH, seed=seed))
        x_BTD = random(2, 300, WIDTH, dtype=dtype, seed=seed).requires_grad_()
        results = []
        for run in (compiled, layer):
            y_BTD, record = run(x_BTD, torch.ones(2, 300, dtype=torch.bool))
            found = gradients(torch.cat((y_BTD.flatten(), record.loss[None])), [x_BTD, *layer.parameters()])
            results.append([y_BTD, record.loss, record.load_E, *found])
        for mine, wanted in zip(*results, strict=True):
            assert_close(mine, wanted, relative)


@pytest.mark.parametrize("balance, weight", [("none", 0.0), ("auxiliary", 0.05), ("bias", 0.01)])
def test_balance_keeps_experts_in_use(balance, weight):
    """A toy whose tokens have much in common, so that the router's first favourites win all: without balance most
    experts go unused, with either kind of it none does.
    """
    layer = make(16, balance=balance, balance_weight=weight, top_k=1, renormalize=False, expert_hidden=16)
    common_D, target = 2 * random(16, seed=3), random(16, 16, seed=4) * 0.5
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    load_E, steps = torch.zeros(8), 300
    for step in range(steps):
        x_ND = random(256, 16, seed=100 + step) + common_D
        y_ND, record = layer(x_ND)
        loss = F.mse_loss(y_ND, torch.tanh(x_ND @ target)) + record.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if balance == "bias":
            layer.update_bias(record.load_E)
        if step >= steps - 50:
            load_E += record.load_E / 50
    figures = load_figures(load_E)
    if balance == "none":
        assert figures["max_over_mean"] > 3.0 and (load_E < 0.01).sum() >= 4
    else:
        assert figures["max_over_mean"] < 1.5 and figures["entropy"] > 0.97 * math.log(8)
        assert load_E.min() > 0.5 / 8
