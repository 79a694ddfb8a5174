"""What may change between a run's incarnations, what is fixed at the first, and batches that are left out."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Ended, Shot, curve, shot, stop_at, weights

from calledshot.recipe import load_recipe
from calledshot.rundir import JsonLines, RunDirectory, read_json, write_json

Train = Callable[..., tuple[RunDirectory, Ended]]


def test_name_layout_checkpoints_and_evals_may_change(lab: Path, train: Train) -> None:
    run, ended = train("changing", before=functools.partial(stop_at, 4))
    assert ended.code == 143
    changes = ("name=other", "parallel.micro_tokens=64", "checkpoint.every_steps=8", "evals.every_steps=7")
    _, ended = train("changing", *changes)
    assert ended.code == 0, ended.said
    assert run.complete_checkpoints() == [16, 20], "the two newest, each hashed while it was written"
    assert {row["step"] for row in run.standing_rows("validation")} == {2, 7, 14, 20}
    changed = [row["changed"] for row in run.rows("events") if row["kind"] == "recipe_changed"]
    assert changed == [
        "name '' -> 'other'; parallel.micro_tokens 0 -> 64; checkpoint.every_steps 0 -> 8; evals.every_steps 0 -> 7"
    ]
    # `shot resume` would go on with what was said last.
    kept = load_recipe(str(run.path / "recipe.toml"))
    assert kept.parallel.micro_tokens == 64 and kept.checkpoint.every_steps == 8


def test_batches_are_left_out_by_the_recipe_and_by_a_rollback_alike(train: Train, reference: RunDirectory) -> None:
    plain, ended = train("skip-none")
    assert ended.code == 0
    skipped, ended = train("skip-recipe", "data.skip=[4, 5]")
    assert ended.code == 0
    assert curve(skipped)[:4] == curve(plain)[:4]
    assert curve(skipped)[4][3] != curve(plain)[4][3]

    # Ordered while the run stands still at step 3, by the key and by the file.
    ordered, ended = train("skip-file", before=functools.partial(stop_at, 3))
    assert ended.code == 143
    with JsonLines(ordered.path / "skips.jsonl") as skips:
        skips.append({"step": 4, "reason": "a spike"})
        skips.append({"step": 5, "reason": "a spike"})
    assert train("skip-file")[1].code == 0
    late, ended = train("skip-late", before=functools.partial(stop_at, 3))
    assert train("skip-late", "data.skip=[4, 5]")[1].code == 0
    for run in (ordered, late):
        assert curve(run) == curve(skipped)
        assert weights(run, 20) == weights(skipped, 20)


def test_the_batches_after_one_left_out_move_up(lab: Path, train: Train, reference: RunDirectory) -> None:
    """With learning rates next to nothing, the loss of a batch is nearly that of the initial weights, whenever it
    comes.
    """
    still = ("optimizer.name=adamw", "optimizer.learning_rate=1e-12", "optimizer.embedding_learning_rate=1e-12")
    everything, ended = train("still", *still)
    assert ended.code == 0
    without, ended = train("still-skipping", *still, "data.skip=[2, 7]")
    assert ended.code == 0
    losses = [row["loss"] for row in everything.metrics()]
    left = [loss for number, loss in enumerate(losses) if number not in (2, 7)]
    assert [row["loss"] for row in without.metrics()][:18] == pytest.approx(left, rel=1e-6)


def short_measurement() -> None:
    from calledshot.training import trainer

    trainer.PROBE_SECONDS = 0.05


def interrupted_measurement() -> None:
    from calledshot.training.engine import Engine

    update, calls = Engine.update, []

    def counted(self: Engine, *arguments: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(self, *arguments)

    Engine.update = counted


def slow_and_stopped_at_five() -> None:
    """As on a machine that has become a hundred times slower."""
    import time

    from calledshot.training.engine import Engine

    short_measurement()
    update = Engine.update

    def slow(self: Engine, *arguments: object) -> object:
        time.sleep(0.2)
        return update(self, *arguments)

    Engine.update = slow
    stop_at(5)


MINUTES = ("duration.minutes=0.02", "evals.tokens=64", "evals.final_tokens=64")


@pytest.fixture(scope="module")
def timed(train: Train) -> RunDirectory:
    """A run of a fiftieth of a minute."""
    run, ended = train("minutes", *MINUTES, before=short_measurement)
    assert ended.code == 0, ended.said
    return run


def test_minutes_become_steps_once(train: Train, timed: RunDirectory) -> None:
    steps = timed.load("probes")["steps"]
    assert timed.status()["step"] == timed.status()["total_steps"] == len(timed.metrics()) == steps
    # A fixed number of tokens gives the same run: measuring has left no trace in what is computed.
    tokens, ended = train("minutes-as-tokens", f"duration.tokens={steps * 128}", *MINUTES[1:])
    assert ended.code == 0, ended.said
    assert curve(tokens) == curve(timed)
    assert weights(tokens, steps) == weights(timed, steps)


def test_a_later_incarnation_obeys_the_measurement_of_the_first(lab: Path, train: Train) -> None:
    run, ended = train("minutes-stopped", *MINUTES, before=slow_and_stopped_at_five)
    assert ended.code == 143, ended.said
    probes = run.load("probes")
    assert 10 <= probes["steps"] < 20
    ended = shot(lab, "resume", "minutes-stopped")  # at full speed it would have measured a hundred
    assert ended.code == 0, ended.said
    assert run.load("probes") == probes
    assert len(run.metrics()) == probes["steps"]


def test_a_stop_while_measuring_fixes_nothing(lab: Path, train: Train) -> None:
    run, ended = train("minutes-early", *MINUTES, before=interrupted_measurement)
    assert ended.code == 143, ended.said
    assert run.state() == "interrupted"
    assert "steps" not in run.load("probes")
    _, ended = train("minutes-early", *MINUTES, before=short_measurement)
    assert ended.code == 0, ended.said


def test_the_minutes_of_a_fork_are_its_own(train: Train, reference: RunDirectory) -> None:
    run, ended = train("minutes-fork", *MINUTES, "--from", "reference@30", before=short_measurement)
    assert ended.code == 0, ended.said
    steps = run.load("probes")["steps"]
    assert steps >= 40
    assert [row["step"] for row in run.metrics()] == list(range(31, steps + 1))
    assert weights(run, 30) == weights(reference, 30)
    # The first step is the parent's next one but for the learning rate: the same batch and the same weights.
    assert run.metrics()[0]["loss"] == reference.metrics()[30]["loss"]


def test_probes_are_obeyed(lab: Path, train: Train) -> None:
    auto = ("parallel.dtype=auto", "parallel.compile=auto")
    run, ended = train("probed", *auto, before=functools.partial(stop_at, 3))
    assert ended.code == 143, ended.said
    probes = read_json(run.path / "probes.json")
    ((key, found),) = probes["machines"].items()
    assert found["threads"] == 1 and found["compile"] is False, "a run of a second does not repay compiling"
    other = {"float32": "bfloat16", "bfloat16": "float32"}[found["dtype"]]
    write_json(run.path / "probes.json", {**probes, "machines": {key: {**found, "dtype": other, "micro_tokens": 32}}})
    ended = shot(lab, "resume", "probed")
    assert ended.code == 0, ended.said
    assert f"; {other} on " in ended.said
    assert read_json(run.path / "probes.json")["machines"][key]["dtype"] == other


def test_a_run_in_use_is_left_alone(lab: Path) -> None:
    first = Shot(lab, "train", "tiny.toml", "duration.tokens=1280000", "--name", "used")
    run = RunDirectory(lab / "runs" / "used")
    assert first.wait_for(lambda: (run.path / "metrics.jsonl").exists())
    command = ("train", "tiny.toml", "duration.tokens=1280000", "--name", "used")
    ended = shot(lab, *command)
    assert ended.code == 1
    assert f"in use by process {first.process.pid}" in ended.complaint
    assert run.incarnation == 1 and run.state() == "running"
    first.signal(signal.SIGTERM)
    assert first.end().code == 143
