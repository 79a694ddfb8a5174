"""Runs that begin with a checkpoint of another, and commands that are repeated."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Ended, curve, shot, stop_at, weights, write_corpus
from safetensors.numpy import load_file

from calledshot.rundir import RunDirectory

Train = Callable[..., tuple[RunDirectory, Ended]]
FROM = ("--from", "reference@30")


def test_a_fork_that_changes_nothing_goes_on_as_its_parent_did(train: Train, reference: RunDirectory) -> None:
    run, ended = train("fork-same", "duration.tokens=7680", *FROM)
    assert ended.code == 0, ended.said
    assert "going on from step 30" in ended.said
    assert curve(run) == curve(reference)[30:]
    assert weights(run, 60) == weights(reference, 60)
    assert run.load("lineage") == {"parent": "reference", "step": 30, "fresh_optimizer": False}
    summary = run.load("summary")
    assert summary["tokens"] == 60 * 128
    assert 0 < summary["goodput"] < 1, "the parent's tokens are not this run's work"


def test_schedule_learning_rate_and_data_may_change(lab: Path, train: Train, reference: RunDirectory) -> None:
    if not (lab / "more").exists():
        write_corpus(lab / "more", documents=60, seed=7)
    changes = ("schedule.kind=cosine", "optimizer.learning_rate=0.005", "duration.tokens=6400")
    data = 'data.sources=[{ path = "corpus", weight = 1.0 }, { path = "more", weight = 3.0 }]'
    run, ended = train("fork-changed", *changes, data, *FROM)
    assert ended.code == 0, ended.said
    assert weights(run, 30) == weights(reference, 30), "it begins with its parent's weights and optimizer"
    rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(31, 51))
    assert rows[0]["tokens"] == 31 * 128
    assert rows[0]["flops"] == pytest.approx(reference.metrics()[30]["flops"])
    # Step 31 of 50 under a cosine from step 1 on: 0.5 (1 + cos(pi 29 / 49)) of the peak.
    assert rows[0]["lr"] == pytest.approx(0.005 * 0.357736, rel=1e-4)
    assert {row["source"] for row in run.rows("validation")} == {"corpus", "more"}
    tokenizers = [(one.path / "tokenizer.json").read_bytes() for one in (run, reference)]
    assert tokenizers[0] == tokenizers[1], "other text, but the parent's tokenizer"
    assert 'tokenizer = "runs/reference/tokenizer.json"' in run.recipe_toml()


@pytest.mark.parametrize("how", [("--fresh-optimizer",), ("optimizer.name=adamw",)])
def test_a_fresh_optimizer_begins_anew(train: Train, reference: RunDirectory, how: tuple[str, ...]) -> None:
    name = f"fork-fresh-{how[0].strip('-').partition('=')[0]}"
    run, ended = train(name, "duration.tokens=5120", *FROM, *how)
    assert ended.code == 0, ended.said
    assert run.load("lineage")["fresh_optimizer"] is True
    assert weights(run, 30)[0] == weights(reference, 30)[0]
    state = load_file(run.checkpoint_path(30) / "optimizer.safetensors")
    assert state and not any(tensor.any() for tensor in state.values())
    assert json.loads((run.checkpoint_path(30) / "state.json").read_text())["updates"] == 0
    assert json.loads((run.checkpoint_path(40) / "state.json").read_text())["updates"] == 10


def test_a_fork_does_not_need_its_parents_checkpoint_twice(lab: Path, train: Train, reference: RunDirectory) -> None:
    shutil.copytree(reference.path, lab / "runs" / "mortal")
    command = ("duration.tokens=7680", "--from", "mortal@30")
    run, ended = train("fork-orphan", *command, before=functools.partial(stop_at, 35))
    assert ended.code == 143, ended.said
    shutil.rmtree(lab / "runs" / "mortal" / "checkpoints")
    _, ended = train("fork-orphan", *command)
    assert ended.code == 0, ended.said
    assert curve(run) == curve(reference)[30:]


@pytest.mark.parametrize(("origin", "step"), [("reference@30", 30), ("reference", 60)])
def test_a_repeated_command_finds_its_run_done(train: Train, reference: RunDirectory, origin: str, step: int) -> None:
    command = ("duration.tokens=8320", "--from", origin)
    run, ended = train(f"fork-repeated-{step}", *command)
    assert ended.code == 0
    assert [row["step"] for row in run.metrics()] == list(range(step + 1, 66))
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    _, ended = train(f"fork-repeated-{step}", *command)
    assert ended.code == 0
    assert "is done" in ended.complaint
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_a_fork_from_behind_its_own_end_leaves_nothing(lab: Path, train: Train, reference: RunDirectory) -> None:
    _, ended = train("fork-none", "duration.tokens=5120", "--from", "reference@60")
    assert ended.code == 2
    assert "is at step 60, but the recipe ends at 40" in ended.said
    assert not (lab / "runs" / "fork-none").exists()


def test_a_lab_that_was_moved_goes_on(lab: Path, train: Train, reference: RunDirectory, tmp_path: Path) -> None:
    command = ("duration.tokens=7680", *FROM)
    _, ended = train("fork-moved", *command, before=functools.partial(stop_at, 44))
    assert ended.code == 143
    for part in ("corpus", "data", "tiny.toml", "runs/reference", "runs/fork-moved"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (lab / part).rename(tmp_path / part)
    try:
        ended = shot(tmp_path, "train", "tiny.toml", "--name", "fork-moved", *command)
        assert ended.code == 0, ended.said
        assert "data: tokens" not in ended.said, "the prepared data are found where they are now"
        assert (
            curve(RunDirectory(tmp_path / "runs" / "fork-moved"))
            == curve(RunDirectory(tmp_path / "runs" / "reference"))[30:]
        )
    finally:
        for part in ("corpus", "data", "tiny.toml", "runs/reference"):
            (tmp_path / part).rename(lab / part)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("duration.tokens=5120", "--from", "reference@20"), "--from reference@30 -> reference@20"),
        (("duration.tokens=5120",), "--from reference@30 -> nothing"),
        (("duration.tokens=5120", *FROM, "--fresh-optimizer"), "--fresh-optimizer"),
        (("duration.tokens=5120", *FROM, "schedule.decay=0.3"), "schedule.decay 0.4 -> 0.3"),
        (("duration.tokens=6400", *FROM, "seed=3"), "seed 0 -> 3; duration.tokens 5120 -> 6400"),
    ],
)
def test_another_command_under_the_same_name_is_refused(
    train: Train, reference: RunDirectory, command: tuple[str, ...], words: str
) -> None:
    run = RunDirectory(reference.path.parent / "fork-other")
    if not run.path.exists():
        assert train("fork-other", "duration.tokens=5120", *FROM)[1].code == 0
    before = {path: path.stat().st_mtime_ns for path in run.path.rglob("*")}
    _, ended = train("fork-other", *command)
    assert ended.code == 2
    assert words in ended.complaint
    assert "choose another --name" in ended.complaint
    assert {path: path.stat().st_mtime_ns for path in run.path.rglob("*")} == before


def test_a_fork_of_another_shape_is_refused_and_leaves_nothing(
    lab: Path, train: Train, reference: RunDirectory
) -> None:
    _, ended = train("fork-wide", "duration.tokens=7680", "model.width=64", *FROM)
    assert ended.code == 2
    assert "embedding_VD" in ended.said and "(768, 32)" in ended.said and "(768, 64)" in ended.said
    assert not (lab / "runs" / "fork-wide").exists()


def test_a_run_of_another_recipe_is_not_gone_on_with(lab: Path, train: Train, reference: RunDirectory) -> None:
    metrics = (reference.path / "metrics.jsonl").read_bytes()
    _, ended = train("reference", "duration.tokens=7680", "model.layers=3", "parallel.threads=2")
    assert ended.code == 2
    assert "model.layers 2 -> 3" in ended.complaint
    assert "threads" not in ended.complaint, "what may change is no difference"
    assert (reference.path / "metrics.jsonl").read_bytes() == metrics
    ended = shot(lab, "resume", "reference")
    assert ended.code == 0 and "is done" in ended.complaint


def test_a_fork_into_a_model_without_place_for_the_weights_is_refused(train: Train, reference: RunDirectory) -> None:
    run, ended = train("fork-smaller", "model.qk_norm=false", *FROM)
    assert ended.code == 2
    assert "that the recipe's model has no place for" in ended.said
    assert not run.path.exists()


def test_a_fork_says_when_weights_will_mean_something_else(train: Train, reference: RunDirectory) -> None:
    _, ended = train("fork-geglu", "model.feed_forward=geglu", "duration.tokens=5120", *FROM)
    assert ended.code == 0, ended.said
    assert "was trained with another model.feed_forward" in ended.said
