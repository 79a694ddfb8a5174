"""What a run writes down for others to read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from processes import Ended, curve, weights

from calledshot.data import HeldOut, Prepared
from calledshot.lab.view import open_view
from calledshot.model import Request, Sampling, generate
from calledshot.recipe import cost, load_recipe
from calledshot.rundir import RunDirectory, parse_time, read_json
from calledshot.training import load_model

Train = Callable[..., tuple[RunDirectory, Ended]]

OPTIONS = ("checkpoint.every_steps=10", 'evals.prompts=["ba", "The end"]', "evals.sample_tokens=6")


@pytest.fixture(scope="module")
def run(train: Train) -> RunDirectory:
    """A finished run that measures everything there is."""
    run, ended = train("records", *OPTIONS, "evals.norms_every_steps=5", "evals.final_tokens=0")
    assert ended.code == 0, ended.said
    return run


def test_norms_by_layer_change_nothing(run: RunDirectory, train: Train) -> None:
    without, ended = train("records-plain", *OPTIONS)
    assert ended.code == 0
    assert curve(run) == curve(without)
    assert weights(run, 20) == weights(without, 20)
    with_norms = {row["step"]: row["norms"] for row in run.metrics() if "norms" in row}
    assert list(with_norms) == [5, 10, 15, 20]
    names = {name for name, _ in load_model(run).model.named_parameters()}
    for row in run.metrics():
        if row["step"] in with_norms:
            norms = row["norms"]
            assert set(norms["gradient"]) == set(norms["update"]) == names
            assert set(norms["activation"]) == {"embedding", "blocks.0", "blocks.1", "final"}
            assert math.hypot(*norms["gradient"].values()) == pytest.approx(row["grad_norm"], rel=1e-5)
            assert math.hypot(*norms["update"].values()) == pytest.approx(row["update_norm"], rel=1e-5)


def test_a_row_of_metrics_has_what_the_design_asks_for(run: RunDirectory) -> None:
    counted = cost(load_recipe(str(run.path / "recipe.toml")))
    rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(1, 21))
    for row in rows:
        assert row["incarnation"] == 1 and not math.isnan(parse_time(row["time"]))
        assert row["tokens"] == row["step"] * 128
        assert row["flops"] == pytest.approx(row["tokens"] * counted.flops_per_token.total)
        assert 0 < row["loss"] < 10 and row["step_seconds"] > 0 and row["memory_bytes"] > 1 << 20
        assert (row["tokens_per_second"] is None) == (row["step"] <= 3), "the first steps give no rate"
        if row["mfu_low"] is not None:
            assert 0 < row["mfu_low"] <= (row["mfu_high"] or 1.0) <= 1.0
    # Uniform logits at the beginning: the loss is the logarithm of the vocabulary.
    assert rows[0]["loss"] == pytest.approx(math.log(768), abs=0.7)


def test_the_last_word_on_held_out_loss_is_that_of_the_saved_model(run: RunDirectory, lab: Path) -> None:
    """Over all held-out documents; computed anew from the checkpoint, document by document, without packing."""
    loaded = load_model(run)
    held_out = HeldOut(Prepared.open(lab / "data" / run.load("data")["folder"]), loaded.recipe)
    selection = held_out.select("corpus")
    texts = [(lab / "corpus" / name).read_text(encoding="utf-8") for name in selection.names]
    nats = tokens = 0
    for text in texts:
        ids = [loaded.tokenizer.begin, *loaded.tokenizer.encode(text), loaded.tokenizer.end]
        for start in range(0, len(ids) - 1, 32):  # the context: longer documents are cut there
            piece = torch.tensor([ids[start : start + 33]])
            nats += float(loaded.model.token_losses(piece[:, :-1], piece[:, 1:]).double().sum())
            tokens += piece.size(1) - 1
    last = run.load("summary")["final"]["corpus"]
    assert last["whole"] is True and last["documents"] == len(texts)
    assert last["tokens_evaluated"] == tokens
    assert last["bytes_evaluated"] == sum(len(text.encode()) for text in texts)
    assert last["loss"] == pytest.approx(nats / tokens, rel=1e-3)
    assert last["bits_per_byte"] == pytest.approx(nats / math.log(2) / last["bytes_evaluated"], rel=1e-3)
    assert last["bytes_per_token"] == last["bytes_evaluated"] / tokens


def test_the_curve_of_held_out_loss_is_on_the_same_documents_throughout(run: RunDirectory) -> None:
    rows = run.rows("validation")
    assert [row["step"] for row in rows] == list(range(2, 21, 2))
    assert [row["tokens"] for row in rows] == [128 * step for step in range(2, 21, 2)]
    assert {(row["source"], row["whole"]) for row in rows} == {("corpus", False)}
    assert len({(row["documents"], row["bytes_evaluated"]) for row in rows}) == 1
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    assert run.load("summary")["final"]["corpus"]["tokens_evaluated"] > rows[0]["tokens_evaluated"] >= 256


def test_samples_are_what_the_checkpoint_makes_of_the_prompts_with_the_recipes_seed(run: RunDirectory) -> None:
    rows = run.rows("samples")
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, prompt) for step in range(2, 21, 2) for prompt in ("ba", "The end")
    ]
    loaded = load_model(run)
    tokenizer = loaded.tokenizer
    for row in rows[-2:]:
        sampling = Sampling(temperature=0.8, top_p=0.95, seed=loaded.recipe.seed)
        ids = (tokenizer.begin, *tokenizer.encode(row["prompt"]))
        made = generate(
            loaded.model, [Request(ids, 6, sampling, frozenset({tokenizer.end}))],
            vocabulary=tokenizer.size, banned=tokenizer.reserved,
        )  # fmt: skip
        assert row["text"] == tokenizer.decode(made[0].tokens)
    assert not any("<|" in row["text"] for row in rows)


def test_the_environment_written_down_is_the_one_computed_in(train: Train) -> None:
    run, ended = train("three-threads", "duration.tokens=256", "parallel.threads=3")
    assert ended.code == 0, ended.said
    environment = read_json(run.incarnation_path(1) / "environment.json")
    assert environment["threads"] == 3 and "; 3 threads" in environment["fingerprint"]
    assert list(run.load("probes")["machines"]) == [f"{environment['fingerprint']} cpu"]


def test_summary_and_status_say_how_it_ended(run: RunDirectory) -> None:
    counted = cost(load_recipe(str(run.path / "recipe.toml"))).parameters
    summary = run.load("summary")
    assert summary["parameters"] == {
        "total": counted.total,
        "non_embedding": counted.non_embedding,
        "active": counted.active,
    }
    assert summary["parameters"]["total"] == sum(p.numel() for p in load_model(run).model.parameters())
    assert summary["tokens"] == 2560 and summary["flops"] == run.metrics()[-1]["flops"]
    assert 0 < summary["step_seconds"] < summary["seconds"] < 600
    assert 0 < summary["goodput"] < 1
    assert summary["peak_memory_bytes"] >= max(row["memory_bytes"] for row in run.metrics())
    assert 0 <= summary["packing_loss"] < 0.5
    status = run.status()
    assert (status["state"], status["step"], status["tokens"]) == ("done", 20, 2560)
    assert (status["total_steps"], status["total_tokens"]) == (20, 2560)


def test_the_report_reads_all_of_it_without_a_warning(run: RunDirectory) -> None:
    view = open_view(run)
    assert view.warnings == []
    assert view.state == "done" and view.sources == ["corpus"]
    assert len(view.samples) == 20 and len(view.validation) == 10
    assert view.recipe is not None and view.environment["fingerprint"]


def test_the_console_says_a_line_a_step(run: RunDirectory) -> None:
    log = (run.incarnation_path() / "logs" / "rank0.log").read_text(encoding="utf-8").splitlines()
    steps = [line for line in log if line.startswith("step ") and "/20 " in line]
    assert len(steps) == 20
    number = r"[\d.e+-]+"
    pattern = (
        rf"step 20/20  loss {number}  lr {number}  grad {number}  [\d.]+[kM]? tok/s  mfu \S+  "
        rf"{number} GiB  data 100%  eta 0s"
    )
    assert re.fullmatch(pattern, steps[-1]), steps[-1]


def test_a_checkpoint_holds_float32_masters_whatever_the_arithmetic(train: Train) -> None:
    from safetensors.torch import load_file

    run, ended = train("masters", "parallel.dtype=bfloat16", "duration.tokens=640")
    assert ended.code == 0, ended.said
    tensors = load_file(run.checkpoint_path(5) / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert any((tensor.bfloat16().float() != tensor).any() for tensor in tensors.values())
    assert json.loads((run.checkpoint_path(5) / "state.json").read_text())["step"] == 5
    assert load_model(run, dtype=torch.bfloat16).model.embedding_VD.dtype == torch.bfloat16
