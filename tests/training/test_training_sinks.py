"""Dashboards get what there is, and can neither stop nor slow a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from processes import Ended, curve

from calledshot.rundir import RunDirectory

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


def test_an_unknown_dashboard_is_said_and_leaves_nothing(lab: Path, train: Train) -> None:
    _, ended = train("unknown-sink", "--sink", "abacus")
    assert ended.code == 2
    assert ended.complaint == "shot: --sink abacus: is not known; there are tensorboard, wandb"
    assert not (lab / "runs" / "unknown-sink").exists()
