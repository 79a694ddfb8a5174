"""Dashboards get what there is, and can neither stop nor slow a run."""

from __future__ import annotations

import functools
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from processes import Ended, curve, shot, stop_at

from calledshot.rundir import RunDirectory, read_jsonl

Train = Callable[..., tuple[RunDirectory, Ended]]


@pytest.fixture(scope="module")
def plain(train: Train) -> RunDirectory:
    """A run without a dashboard."""
    run, ended = train("no-sink")
    assert ended.code == 0
    return run


def replace_tensorboard(factory: Callable[..., object]) -> None:
    from calledshot.training import sinks

    sinks.SINKS["tensorboard"] = factory
    sinks.QUEUE_ROWS, sinks.CLOSE_SECONDS = 5, 0.2


def never_opens(*_: object) -> None:
    raise ConnectionError("the dashboard is not at home")


def cannot_be_opened() -> None:
    replace_tensorboard(never_opens)


def cannot_be_written() -> None:
    def write(step: int, row: Mapping[str, float]) -> None:
        raise OSError("the dashboard is full")

    def finish() -> None:
        raise OSError("the dashboard does not close")

    replace_tensorboard(lambda *_: (write, finish))


def blocks_forever() -> None:
    replace_tensorboard(lambda *_: (lambda step, row: threading.Event().wait(), lambda: None))


@pytest.mark.parametrize(
    ("before", "words"),
    [
        (cannot_be_opened, "tensorboard failed and is left out from here (the dashboard is not at home)"),
        (cannot_be_written, "tensorboard failed and is left out from here (the dashboard is full)"),
        (blocks_forever, "tensorboard was too slow"),
    ],
)
def test_a_bad_dashboard_does_no_harm(
    train: Train, plain: RunDirectory, before: Callable[[], None], words: str
) -> None:
    started = time.monotonic()
    run, ended = train(before.__name__, "--sink", "tensorboard", before=before)
    assert ended.code == 0, ended.said
    assert time.monotonic() - started < 30
    assert words in ended.said
    assert run.state() == "done"
    assert curve(run) == curve(plain)


def test_tensorboard_gets_every_step(train: Train, plain: RunDirectory) -> None:
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="needs the extra `tensorboard`"
    )
    run, ended = train("tensorboard", "--sink", "tensorboard")
    assert ended.code == 0, ended.said
    assert curve(run) == curve(plain)
    events = accumulator.EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("loss")
    assert [one.step for one in losses] == list(range(1, 21))
    assert [one.value for one in losses] == pytest.approx([row["loss"] for row in run.metrics()])
    assert [one.step for one in events.Scalars("held_out/corpus/bits_per_byte")] == list(range(2, 21, 2))


FAKE_WANDB = '''
"""What calledshot uses of wandb, as its documentation has it: init, then log and finish of what that returns."""
import json, os, sys, time

HERE = os.path.dirname(os.path.abspath(__file__))


def note(call, **arguments):
    with open(os.path.join(HERE, "calls.jsonl"), "a") as file:
        file.write(json.dumps({"call": call, **arguments}) + "\\n")
    with open(os.path.join(HERE, "mode")) as file:
        mode = file.read()
    if mode == f"{call} raises":
        raise ValueError("the dashboard is broken")
    if mode == f"{call} exits":
        sys.exit("the dashboard has had enough")
    if mode == f"{call} hangs":
        time.sleep(3600)


class Run:
    def log(self, data, step=None, commit=None):
        note("log", data=data, step=step)

    def finish(self, exit_code=None):
        note("finish")


def init(project=None, name=None, id=None, resume=None, dir=None, config=None):
    note("init", project=project, name=name, id=id, resume=resume, dir=dir, config=config)
    return Run()
'''


def with_wandb(folder: Path) -> None:
    """Puts what lies in `folder` in the place of wandb, which may be installed."""
    from calledshot.training import sinks

    sys.path.insert(0, str(folder))
    sys.modules.pop("wandb", None)
    sinks.CLOSE_SECONDS = 0.5


@pytest.fixture
def wandb(tmp_path: Path) -> Callable[[str], functools.partial]:
    """`wandb(MODE)` is a `before`; calls go to `tmp_path/wandb/calls.jsonl`."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "__init__.py").write_text(FAKE_WANDB)

    def before(mode: str) -> functools.partial:
        (tmp_path / "wandb" / "mode").write_text(mode)
        return functools.partial(with_wandb, tmp_path)

    return before


def test_wandb_gets_every_step_under_its_number(
    lab: Path, train: Train, plain: RunDirectory, wandb: Callable, tmp_path: Path
) -> None:
    stop = functools.partial(both, wandb("works"), functools.partial(stop_at, 12))
    _, ended = train("wandb", "--sink", "wandb", before=stop)
    assert ended.code == 143, ended.said
    ended = shot(lab, "resume", "wandb", "--sink", "wandb", before=wandb("works"))
    assert ended.code == 0, ended.said
    run = RunDirectory(lab / "runs" / "wandb")
    assert curve(run) == curve(plain)
    calls = read_jsonl(tmp_path / "wandb" / "calls.jsonl")
    first, second = (call for call in calls if call["call"] == "init")
    assert first == second, "the second incarnation goes on with the first one's"
    assert (first["name"], first["resume"], first["config"]["model"]["layers"]) == ("wandb", "allow", 2)
    assert [call["call"] for call in calls].count("finish") == 2
    logged = [call for call in calls if call["call"] == "log"]
    steps = [call["step"] for call in logged]
    assert steps == sorted(steps), "wandb throws away what goes back"
    losses = {call["step"]: call["data"]["loss"] for call in logged if "loss" in call["data"]}
    assert losses == {row["step"]: row["loss"] for row in run.metrics()}
    measured = {call["step"] for call in logged if "held_out/corpus/bits_per_byte" in call["data"]}
    assert measured == {row["step"] for row in run.rows("validation")}


@pytest.mark.parametrize("call", ["init", "log", "finish"])
@pytest.mark.parametrize("fault", ["raises", "exits", "hangs"])
def test_a_bad_wandb_does_no_harm(train: Train, plain: RunDirectory, wandb: Callable, call: str, fault: str) -> None:
    started = time.monotonic()
    run, ended = train(f"wandb-{call}-{fault}", "--sink", "wandb", before=wandb(f"{call} {fault}"))
    assert ended.code == 0, ended.said
    assert time.monotonic() - started < 30
    assert curve(run) == curve(plain) and run.state() == "done"
    if fault != "hangs":
        assert "wandb failed and is left out from here (the dashboard" in ended.said
    elif call != "finish":
        assert "wandb was too slow" in ended.said


def both(one: Callable[[], None], other: Callable[[], None]) -> None:
    one()
    other()


def test_an_unknown_dashboard_is_said_and_leaves_nothing(lab: Path, train: Train) -> None:
    _, ended = train("unknown-sink", "--sink", "abacus")
    assert ended.code == 2
    assert ended.complaint == "shot: --sink abacus: is not known; there are tensorboard, wandb"
    assert not (lab / "runs" / "unknown-sink").exists()
