"""Runs that are killed and damaged as `benchmarks/torture.py` knows how, and mistakes that it must notice."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from hostile import attempts
from job import OVERRIDES, Disk
from ordeal import ALL, FLIPPED
from torture import laboratory, table, torture

Lab = tuple[Path, Disk]


@pytest.fixture(scope="module")
def tormented(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with laboratory(tmp_path_factory.mktemp("torture")) as lab:
        yield lab


def test_ten_kills_leave_no_trace(tormented: Lab) -> None:
    report = torture(*tormented, kills=10, seed=3)
    assert not report.failures, report.failures
    assert (report.unrecoverable, report.lost) == (0, 0)
    assert len(report.events) == 10 and all(event.resumed for event in report.events)
    assert set(report.done) == {"1 rank", "2 shards", "changing"}
    assert table(report)[-1].startswith("| all | 10 | 10 |")


@pytest.mark.slow
def test_sixty_kills_leave_no_trace(tormented: Lab) -> None:
    report = torture(*tormented, kills=60, seed=4)
    assert not report.failures, report.failures
    assert all(event.resumed for event in report.events)


# Mistakes, made in every process of the tormented runs


def forget_the_optimizer() -> None:
    from calledshot.training.engine import Engine

    restore = Engine.restore
    Engine.restore = lambda self, folder, *, with_optimizer: restore(self, folder, with_optimizer=False)


def update_once_more_after_a_restart() -> None:
    from calledshot.training.engine import Engine

    restore, update = Engine.restore, Engine.update
    fresh = set()

    def restored(self: Engine, *arguments: object, **more: object) -> None:
        fresh.add(self)
        restore(self, *arguments, **more)

    def updated(self: Engine, *arguments: object) -> object:
        if self in fresh:
            fresh.remove(self)
            update(self, *arguments)
            self.optimizer.clear()
        return update(self, *arguments)

    Engine.restore, Engine.update = restored, updated


def leave_a_step_out_after_a_restart() -> None:
    from calledshot.training import state

    read = state.read_counters

    def counters(folder: Path) -> state.Counters:
        found = read(folder)
        found.step += 1
        return found

    state.read_counters = counters


def lose_a_row() -> None:
    from calledshot.training.trainer import Trainer

    record = Trainer._record
    Trainer._record = lambda self, row, steps: None if row["step"] == 20 else record(self, row, steps)


def go_on_from_the_checkpoint_before() -> None:
    from calledshot.rundir import Checkpoints

    candidates = Checkpoints._candidates
    Checkpoints._candidates = lambda self, complete=True: (found := candidates(self, complete))[len(found) > 1 :]


def look_at_no_hash() -> None:
    from calledshot.rundir import Checkpoints

    fault = Checkpoints.fault
    Checkpoints.fault = lambda self, step, hashes, share=(0, 1): fault(self, step, False, share)


def delete_the_newest() -> None:
    import shutil

    from calledshot.rundir import Checkpoints

    def prune(self: Checkpoints, *_: object) -> list[int]:
        for step in self.checkpoint_steps()[1:]:
            shutil.rmtree(self.checkpoint_path(step))
        return []

    Checkpoints.prune = prune


def refuse_to_go_on() -> None:
    from calledshot.recipe import RunError
    from calledshot.training.engine import Engine

    def restore(*_: object, **__: object) -> None:
        raise RunError("no")

    Engine.restore = restore


@pytest.mark.parametrize(
    ("mistake", "kind", "noticed"),
    [
        (forget_the_optimizer, ALL, "its losses are not those of the run that was left alone"),
        (update_once_more_after_a_restart, ALL, "its losses are not those of the run that was left alone"),
        (leave_a_step_out_after_a_restart, ALL, "begins at step"),
        (lose_a_row, ALL, "has rows of the steps"),
        (go_on_from_the_checkpoint_before, ALL, "is whole|newest whole"),
        (look_at_no_hash, FLIPPED, "is whole|does not go on"),
        (delete_the_newest, ALL, "newest whole"),
        (refuse_to_go_on, ALL, "does not go on"),
    ],
)
def test_a_mistake_is_noticed(tormented: Lab, mistake: Callable[[], None], kind: str, noticed: str) -> None:
    report = torture(*tormented, kills=4, seed=5, series=["1 rank"], kinds=[kind], sabotage=mistake)
    assert any(re.search(noticed, what) for _, what in report.failures), report.failures
    assert report.unrecoverable or mistake is not refuse_to_go_on
    assert table(report)[-1].endswith(f"| {len(report.failures)} |")


def test_a_pickle_or_a_path_in_a_checkpoint_is_refused(tormented: Lab) -> None:
    tried = attempts(tormented[0], OVERRIDES, lambda what: what.endswith(": a pickle") or "outside" in what)
    assert len(tried) > 15
    assert all(one.refused for one in tried), [one for one in tried if not one.refused]


@pytest.mark.slow
def test_every_hostile_checkpoint_is_refused(tormented: Lab) -> None:
    tried = attempts(tormented[0], OVERRIDES)
    assert all(one.refused for one in tried), [one for one in tried if not one.refused]
