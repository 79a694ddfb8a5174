"""Our optimizers beside PyTorch's own, on the decoder's parameters and on stacks of matrices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from processes import Ended, curve, shot, stop_at, weights
from torch import Tensor, nn

from calledshot.model import Decoder
from calledshot.recipe import Recipe, UsageError, from_dict
from calledshot.rundir import RunDirectory
from calledshot.training.optimizer import Borrowed, Optimizer, gradient_norm, orthogonalise, user_class
from calledshot.training.slots import make_slots

WIDTH = 64


def recipe(name: str, **optimizer: object) -> Recipe:
    return from_dict(
        {
            "model": {"width": WIDTH, "heads": 2, "kv_heads": 1, "layers": 1, "vocabulary": 768, "context": 32},
            "optimizer": {"name": name, "learning_rate": 0.01, "clip": 0.0, "transfer": "none", **optimizer},
            "batch": {"tokens": 64},
            "duration": {"tokens": 640},
        }
    )


class Bag(nn.Module):
    """Parameters under the names that the decoder gives to its groups."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape, generator=generator)))


def gradients(model: nn.Module, step: int) -> dict[str, Tensor]:
    """Some gradients, the same for the same step."""
    generator = torch.Generator().manual_seed(100 + step)
    return {name: torch.randn(p.shape, generator=generator) * 3.0 for name, p in model.named_parameters()}


def advance(model: nn.Module, optimizer: Optimizer, steps: int, factor: Callable[[int], float] = lambda _: 1.0) -> None:
    """Steps with `gradients`."""
    for step in range(steps):
        made = gradients(model, step)
        for slot in optimizer.slots:
            slot.gradient = made[slot.name].to(slot.working.dtype)
        optimizer.step(step + 1, gradient_norm(optimizer.slots), factor(step))
        optimizer.clear()


def theirs(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients(model, step)[name]
        optimizer.step()


def optimizer_of(model: nn.Module, settings: Recipe) -> Optimizer:
    return Optimizer(make_slots(model, {name: p.data for name, p in model.named_parameters()}), settings)


def test_adamw_is_that_of_pytorch() -> None:
    shapes = {"down_DF": (48, 96), "embedding_VD": (100, 48), "gate_up_2FD": (2, 96, 48), "final_norm_D": (48,)}
    ours, other = Bag(**shapes), Bag(**shapes)
    settings = recipe("adamw", learning_rate=0.01, embedding_learning_rate=0.03, vector_learning_rate=0.002)
    advance(ours, optimizer_of(ours, settings), 8)
    rates = {"down_DF": 0.01, "embedding_VD": 0.03, "gate_up_2FD": 0.01, "final_norm_D": 0.002}
    decays = {"down_DF": 0.1, "embedding_VD": 0.0, "gate_up_2FD": 0.1, "final_norm_D": 0.0}
    groups = [
        {"params": [parameter], "lr": rates[name], "weight_decay": decays[name]}
        for name, parameter in other.named_parameters()
    ]
    theirs(other, torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8), 8)
    for name, parameter in other.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=1e-6, atol=1e-6)


def test_muon_is_that_of_pytorch() -> None:
    shapes = {"down_DF": (48, 96), "out_DHC": (96, 48), "square_DD": (64, 64)}
    ours, other = Bag(**shapes), Bag(**shapes)
    advance(ours, optimizer_of(ours, recipe("muon", learning_rate=0.02, weight_decay=0.1)), 6)
    before = Bag(**shapes)
    muon = torch.optim.Muon(
        other.parameters(), lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="original"
    )
    theirs(other, muon, 6)
    for name, parameter in other.named_parameters():
        moved = parameter - before.get_parameter(name)
        apart = ours.get_parameter(name) - parameter
        # Both round to bfloat16 (8 bits) in every product of Newton-Schulz, in another order.
        assert apart.norm() < 2e-2 * moved.norm(), name


def test_a_stack_of_matrices_is_its_matrices_one_by_one() -> None:
    stacked = Bag(experts_EFD=(5, 32, 48), more_EDF=(2, 3, 48, 32))
    advance(stacked, optimizer_of(stacked, recipe("muon")), 5)
    for name, count in (("experts_EFD", 5), ("more_EDF", 6)):
        whole = Bag(experts_EFD=(5, 32, 48), more_EDF=(2, 3, 48, 32)).get_parameter(name)
        matrices = whole.detach().reshape(-1, *whole.shape[-2:])
        for place in range(count):
            single = nn.Module()
            single.register_parameter("one_MN", nn.Parameter(matrices[place].clone()))
            optimizer = optimizer_of(single, recipe("muon"))
            for step in range(5):
                made = gradients(Bag(experts_EFD=(5, 32, 48), more_EDF=(2, 3, 48, 32)), step)[name]
                optimizer.slots[0].gradient = made.reshape(matrices.shape)[place]
                optimizer.step(step + 1, torch.tensor(1.0), 1.0)
            got = stacked.get_parameter(name).reshape(matrices.shape)[place]
            moved = (single.get_parameter("one_MN") - matrices[place]).norm()
            assert (got - single.get_parameter("one_MN")).norm() < 1e-2 * moved, (name, place)


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32), (3, 48, 96), (2, 3, 96, 48)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalise((x * 1e-3).bfloat16()).float())
    assert values.min() > 0.6 and values.max() < 1.3
    # The directions are kept: each pair of singular vectors still belongs together.
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    diagonal = (u.mT @ orthogonalise(x).float() @ vh.mT).diagonal(dim1=-2, dim2=-1)
    assert diagonal.min() > 0.5


def test_clipping_scales_all_gradients_by_the_same_factor() -> None:
    clipped, scaled = Bag(down_DF=(8, 8), norm_D=(8,)), Bag(down_DF=(8, 8), norm_D=(8,))
    ours = optimizer_of(clipped, recipe("adamw", clip=0.5))
    other = optimizer_of(scaled, recipe("adamw"))
    made = gradients(clipped, 0)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in made.values()))
    for slot in ours.slots:
        slot.gradient = made[slot.name].clone()
    for slot in other.slots:
        slot.gradient = made[slot.name] * 0.5 / norm
    assert float(gradient_norm(ours.slots)) == pytest.approx(norm, rel=1e-6)
    ours.step(1, gradient_norm(ours.slots), 1.0)
    other.step(1, gradient_norm(other.slots), 1.0)
    for first, second in zip(ours.slots, other.slots, strict=True):
        torch.testing.assert_close(first.state["first"], second.state["first"], rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(first.state["second"], second.state["second"], rtol=1e-5, atol=1e-9)


def test_gradients_below_the_limit_are_left_alone() -> None:
    limited, free = Bag(down_DF=(8, 8)), Bag(down_DF=(8, 8))
    advance(limited, optimizer_of(limited, recipe("adamw", clip=1e6)), 3)
    advance(free, optimizer_of(free, recipe("adamw")), 3)
    assert torch.equal(limited.down_DF, free.down_DF)


def test_the_norms_of_the_updates_are_what_the_weights_moved_by() -> None:
    for name in ("muon", "adamw"):
        model = Bag(down_DF=(16, 24), embedding_VD=(20, 16), norm_D=(16,))
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        optimizer = optimizer_of(model, recipe(name))
        made = gradients(model, 0)
        for slot in optimizer.slots:
            slot.gradient = made[slot.name]
        squares = optimizer.step(1, gradient_norm(optimizer.slots), 1.0)
        for key, parameter in model.named_parameters():
            moved = float((parameter.detach() - before[key]).square().sum())
            assert float(squares[key]) == pytest.approx(moved, rel=1e-4), (name, key)


def test_bfloat16_computes_with_rounded_float32_masters() -> None:
    wide, narrow = Bag(down_DF=(32, 48), embedding_VD=(20, 16)), Bag(down_DF=(32, 48), embedding_VD=(20, 16))
    masters = {name: p.detach().clone() for name, p in narrow.named_parameters()}
    narrow = narrow.to(torch.bfloat16)
    small = recipe("adamw", learning_rate=1e-5)  # less than bfloat16 would notice
    optimizer = Optimizer(make_slots(narrow, masters), small)
    advance(narrow, optimizer, 5)
    advance(wide, optimizer_of(wide, small), 5)
    for slot in optimizer.slots:
        assert slot.master.dtype == torch.float32
        # The weights have moved by up to 5e-5; the gradients were rounded to bfloat16.
        torch.testing.assert_close(slot.master, wide.get_parameter(slot.name).data, rtol=0, atol=1e-6)
        assert torch.equal(slot.working, slot.master.bfloat16())


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_learning_rates_by_group_follow_the_width(name: str) -> None:
    """At four times the base width, the head's rate falls to a quarter, and that of the matrices too under AdamW;
    Muon's stays.
    """
    settings = recipe(name, learning_rate=0.01, transfer="width", weight_decay=0.0, base_width=WIDTH // 4)
    settings = replace(settings, optimizer=replace(settings.optimizer, head_learning_rate=0.004))
    model = Bag(gate_up_2FD=(2, 32, 32), separate_head_VD=(100, 32), embedding_VD=(100, 32), final_norm_D=(32,))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    advance(model, optimizer_of(model, settings), 1, lambda _: 0.5)
    # The first update of AdamW moves every entry by the learning rate.
    moved = {key: float((p.detach() - before[key]).abs().median()) for key, p in model.named_parameters()}
    assert moved["separate_head_VD"] == pytest.approx(0.5 * 0.004 / 4, rel=1e-3)
    assert moved["embedding_VD"] == pytest.approx(0.5 * 0.01 * (15 if name == "muon" else 1), rel=1e-3)
    assert moved["final_norm_D"] == pytest.approx(0.5 * 0.01 * (0.5 if name == "muon" else 1), rel=1e-3)
    if name == "adamw":
        assert moved["gate_up_2FD"] == pytest.approx(0.5 * 0.01 / 4, rel=1e-3)
    else:
        spectral = torch.linalg.matrix_norm(model.gate_up_2FD - before["gate_up_2FD"], ord=2).detach()
        assert all(0.6 < float(each) / (0.5 * 0.01) < 1.3 for each in spectral)


SGD = '''"""Somebody's own optimizer."""

import torch


class Sgd(torch.optim.SGD):
    def __init__(self, groups, lr):
        super().__init__(groups, lr=lr, momentum=0.9, nesterov=True)
'''


@pytest.fixture(scope="module")
def own(lab: Path) -> tuple[str, ...]:
    """Options for a run with the user's optimizer."""
    (lab / "sgd.py").write_text(SGD, encoding="utf-8")
    rates = ("optimizer.learning_rate=0.1", "optimizer.embedding_learning_rate=0.5")
    return ("optimizer.name=sgd.py:Sgd", "checkpoint.every_steps=5", *rates)


def test_an_optimizer_of_the_users_own_trains_and_resumes(
    lab: Path, train: Callable[..., tuple[RunDirectory, Ended]], own: tuple[str, ...]
) -> None:
    whole, ended = train("own", *own)
    assert ended.code == 0, ended.said
    losses = [row["loss"] for row in whole.metrics()]
    assert losses[-1] < losses[0] - 0.3
    stopped, ended = train("own-stopped", *own, before=functools.partial(stop_at, 8))
    assert ended.code == 143
    assert (stopped.path / "sgd.py").read_text(encoding="utf-8") == SGD
    (lab / "sgd.py").write_text("this is not Python", encoding="utf-8")
    assert shot(lab, "resume", "own-stopped").code == 0, "the run has its own copy"
    (lab / "sgd.py").write_text(SGD, encoding="utf-8")
    assert curve(stopped) == curve(whole)
    assert weights(stopped, 20) == weights(whole, 20)


def test_pytorchs_sgd_in_the_loop_is_pytorchs_sgd() -> None:
    ours, other = Bag(down_DF=(8, 12), norm_D=(8,)), Bag(down_DF=(8, 12), norm_D=(8,))
    settings = recipe("x.py:Y", learning_rate=0.1)
    slots = make_slots(ours, {})
    borrowed = Borrowed(slots, settings, lambda groups, lr: torch.optim.SGD(groups, lr=lr, momentum=0.9))
    with torch.no_grad():
        for step in range(4):
            made = gradients(ours, step)
            for slot in slots:
                slot.gradient = made[slot.name]
            borrowed.step(step + 1, torch.tensor(1.0), dict.fromkeys(("matrix", "vector"), 0.1))
    theirs(other, torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9), 4)
    for name, parameter in other.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter)


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        (None, "none.py:Sgd", "there is no file none.py"),
        (SGD, "bad.py:Other", "holds no Other"),
        ("1 / 0", "bad.py:Sgd", "ZeroDivisionError"),
        ("", "bad.py", "file.py:Class"),
    ],
)
def test_an_optimizer_that_cannot_be_had_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, name: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "bad.py").write_text(content, encoding="utf-8")
    with pytest.raises(UsageError, match=r"optimizer\.name") as raised:
        user_class(name, "optimizer.name")
    assert words in str(raised.value)


def test_micro_batches_add_up_to_the_batch(train: Callable[..., tuple[RunDirectory, Ended]]) -> None:
    """Plain gradients, so that nothing normalises a wrong scale away."""
    options = ("duration.tokens=640", "optimizer.name=adamw", "optimizer.learning_rate=0.001")
    whole, ended = train("whole-batch", *options, "parallel.micro_tokens=128")
    assert ended.code == 0, ended.said
    parts, ended = train("micro-batches", *options, "parallel.micro_tokens=32")
    assert ended.code == 0, ended.said
    for one, other in zip(curve(whole), curve(parts), strict=True):
        assert one == pytest.approx(other, rel=2e-5)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_what_reads_an_encoder_of_another_width_moves_at_its_rate(name: str) -> None:
    model = {"width": 64, "encoder_width": 32, "heads": 2, "kv_heads": 2, "layers": 1, "vocabulary": 768, "context": 32}
    asked = from_dict(
        {
            "model": model | {"topology": "encoder-decoder", "tied_embeddings": True},
            "objective": {"kind": "span"},
            "optimizer": {"name": name, "learning_rate": 0.01, "clip": 0.0, "transfer": "width", "base_width": 64},
            "batch": {"tokens": 64},
            "duration": {"tokens": 640},
        }
    )
    trunk = Decoder(asked.model)
    trunk.initialise(torch.Generator().manual_seed(0))
    optimizer = optimizer_of(trunk, asked)
    assert {slot.group for slot in optimizer.slots} <= set(optimizer.peaks)
    groups = {slot.name: slot.group for slot in optimizer.slots}
    assert groups["encoder.embedding_VD"] == "encoder_embedding" and groups["embedding_VD"] == "embedding"
    matrices = {n for n, group in groups.items() if group == "encoder_matrix"}
    assert matrices == {
        *(n for n in groups if n.startswith("encoder.blocks") and not n.endswith(("norm_D", "norm_C"))),
        "blocks.0.cross_key_value_K2CD",
    }
    # AdamW's first step is the rate in every entry, whatever the gradient (no weight decay here).
    if name == "adamw":
        before = {n: p.detach().clone() for n, p in trunk.named_parameters()}
        advance(trunk, optimizer, 1)
        moved = {n: float((p.detach() - before[n]).abs().median()) for n, p in trunk.named_parameters()}
        inside, across = moved["encoder.blocks.0.qkv_KXCD"], moved["blocks.0.cross_key_value_K2CD"]
        assert inside == pytest.approx(0.02, rel=0.1) and across == pytest.approx(0.02, rel=0.1)
        assert moved["blocks.0.qkv_KXCD"] == pytest.approx(0.01, rel=0.1)
        assert moved["encoder.embedding_VD"] == pytest.approx(0.01, rel=0.1)
