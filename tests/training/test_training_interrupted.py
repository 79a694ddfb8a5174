"""Runs that are killed, stopped and resumed: what they compute is what an uninterrupted run computes."""

from __future__ import annotations

import functools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import Ended, Shot, curve, held_out, make_lab, shot, stop_at, weights

from calledshot.rundir import RunDirectory, read_jsonl

SIXTY = ("duration.tokens=7680", "checkpoint.every_steps=2")


def partial_saves(run: Path) -> list[str]:
    """Checkpoints that are half written."""
    try:
        return [name for name in os.listdir(run / "checkpoints") if name.startswith(".partial-")]
    except FileNotFoundError:
        return []


def kill_and_resume(lab: Path, command: tuple[str, ...], run: Path, kills: int, in_saves: int, seed: int) -> None:
    """Starts `command` again and again, and kills it `kills` times, `in_saves` of them while it saves; then to the
    end.
    """
    chance = random.Random(seed)
    killed_in_save = 0
    for number in range(kills):
        process = Shot(lab, *command)
        done = len(read_jsonl(run / "metrics.jsonl"))
        target = done + chance.randint(1, 3)
        if number == 1:
            time.sleep(chance.uniform(0.0, 0.3))  # before the first step, wherever that is
        else:
            assert process.wait_for(lambda target=target: len(read_jsonl(run / "metrics.jsonl")) >= target)
        if killed_in_save < in_saves and number != 1:
            assert process.wait_for(lambda: partial_saves(run))
            time.sleep(chance.choice((0.0, 0.0, 0.002)))
        else:
            time.sleep(chance.uniform(0.0, 0.01))
        process.signal(signal.SIGKILL)
        assert process.end().code == -signal.SIGKILL, "it ended before it was killed"
        killed_in_save += bool(partial_saves(run))
    assert killed_in_save >= in_saves
    last = shot(lab, *command)
    assert last.code == 0, last.said


def same_as(run: RunDirectory, reference: RunDirectory, step: int) -> None:
    """Whether two runs have computed the same, to the last bit."""
    assert curve(run) == curve(reference)
    assert weights(run, step) == weights(reference, step)
    assert held_out(run) == held_out(reference)


def test_ten_kills_leave_no_trace_in_what_is_computed(lab: Path, reference: RunDirectory) -> None:
    command = ("train", "tiny.toml", "--name", "killed", *SIXTY)
    kill_and_resume(lab, command, lab / "runs" / "killed", kills=10, in_saves=3, seed=1)
    run = RunDirectory(lab / "runs" / "killed")
    assert run.incarnation >= 10
    same_as(run, reference, 60)
    assert run.state() == "done"


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_kills_of_a_compiled_run_in_bfloat16(lab: Path, optimizer: str) -> None:
    options = (*SIXTY, f"optimizer.name={optimizer}", "parallel.dtype=bfloat16", "parallel.compile=on")
    whole = ("train", "tiny.toml", "--name", f"compiled-{optimizer}", *options)
    ended = shot(lab, *whole)
    assert ended.code == 0, ended.said
    name = f"compiled-{optimizer}-killed"
    command = ("train", "tiny.toml", "--name", name, *options)
    kill_and_resume(lab, command, lab / "runs" / name, kills=4, in_saves=1, seed=2)
    same_as(RunDirectory(lab / "runs" / name), RunDirectory(lab / "runs" / f"compiled-{optimizer}"), 60)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_and_saves(
    lab: Path,
    train: Callable[..., tuple[RunDirectory, Ended]],
    reference: RunDirectory,
    number: signal.Signals,
    code: int,
) -> None:
    name = f"stopped-{code}"
    command = ("duration.tokens=7680", "checkpoint.every_minutes=0")
    run, ended = train(name, *command, before=functools.partial(stop_at, 23, number))
    assert ended.code == code, ended.said
    assert run.state() == "interrupted"
    assert run.status()["step"] == 23
    assert run.complete_checkpoints() == [23]
    assert len(run.metrics()) == 23
    ended = shot(lab, "resume", name)
    assert ended.code == 0, ended.said
    assert "going on from step 23" in ended.said
    same_as(run, reference, 60)


def sleep_in_every_step() -> None:
    from calledshot.training.trainer import Trainer

    Trainer._step = lambda self, *_: time.sleep(600)


def test_the_second_signal_stops_at_once(lab: Path) -> None:
    process = Shot(lab, "train", "tiny.toml", "--name", "twice", before=sleep_in_every_step)
    run = RunDirectory(lab / "runs" / "twice")
    assert process.wait_for(lambda: "going" in process.said or "parameters" in process.said)
    process.signal(signal.SIGINT)
    assert process.wait_for(lambda: "finishing the step" in process.said)
    assert process.alive
    process.signal(signal.SIGTERM)
    assert process.end().code == 143
    assert run.state() == "interrupted"
    assert shot(lab, "train", "tiny.toml", "--name", "twice").code == 0


def interrupt_the_evaluation() -> None:
    """Ctrl-C in the third measurement, between two of its batches."""
    from calledshot.training.engine import Engine

    measure, calls = Engine.nats, []

    def measured(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(*arguments)

    Engine.nats = measured


def test_a_measurement_that_was_interrupted_is_made_after_all(
    lab: Path, train: Callable[..., tuple[RunDirectory, Ended]], reference: RunDirectory
) -> None:
    run, ended = train("unmeasured", "duration.tokens=7680", before=interrupt_the_evaluation)
    assert ended.code == 130, ended.said
    step = run.status()["step"]
    assert step % 6 == 0 and run.latest() == step
    assert all(row["step"] < step for row in run.rows("validation"))
    assert shot(lab, "resume", "unmeasured").code == 0
    same_as(run, reference, 60)


def interrupt_the_preparation() -> None:
    """Ctrl-C when the tokens begin to be written."""
    import calledshot.training  # noqa: F401 - of which the next is a part, hidden behind the function of that name

    module = sys.modules["calledshot.training.train"]
    prepare = module.prepare

    def prepared(recipe: object, lab: Path, progress: Callable[[str, int, int], None]) -> object:
        def tell(stage: str, done: int, total: int) -> None:
            if stage == "tokens":
                os.kill(os.getpid(), signal.SIGINT)
            progress(stage, done, total)

        return prepare(recipe, lab, tell)

    module.prepare = prepared


def test_preparation_is_interrupted_and_taken_up_again(tmp_path: Path) -> None:
    make_lab(tmp_path)
    ended = shot(tmp_path, "train", "tiny.toml", "--name", "early", before=interrupt_the_preparation)
    assert ended.code == 130, ended.said
    assert not (tmp_path / "runs").exists()
    ended = shot(tmp_path, "train", "tiny.toml", "--name", "early")
    assert ended.code == 0, ended.said
    assert "tokenizer" not in ended.said, "the tokenizer was there already"


def die_at(number: int, events: tuple[str, ...] = ("os.rename", "os.mkdir")) -> None:
    """For `before`: the process dies just before its Nth change of a folder."""
    seen = 0

    def hook(event: str, _: tuple[object, ...]) -> None:
        nonlocal seen
        if event in events:
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


@pytest.mark.slow
def test_a_fork_killed_at_any_change_of_a_folder_is_the_fork_after_all(lab: Path, reference: RunDirectory) -> None:
    name = "fork-killed"
    command = ("train", "tiny.toml", "duration.tokens=7680", "checkpoint.every_steps=2", "--name", name)
    command = (*command, "--from", "reference@50")
    deaths = 0
    for number in range(1, 60):
        ended = shot(lab, *command, before=functools.partial(die_at, number))
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.said
        deaths += 1
    run = RunDirectory(lab / "runs" / name)
    assert deaths > 5
    assert run.state() == "done"
    assert run.load("lineage")["step"] == 50
    assert curve(run) == curve(reference)[50:]
    assert weights(run, 60) == weights(reference, 60)
