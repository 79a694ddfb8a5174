"""Losses, gradients and weights that are no numbers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

from processes import Ended, curve, shot

from calledshot.rundir import RunDirectory

Train = Callable[..., tuple[RunDirectory, Ended]]

BREAKS = '''"""An optimizer that destroys the weights in its fifth update."""

import torch


class Breaks(torch.optim.SGD):
    updates = 0

    def step(self):
        super().step()
        self.updates += 1
        if self.updates == 5:
            for group in self.param_groups:
                for weights in group["params"]:
                    weights.fill_(float("nan"))
'''


def nan_in(steps: range) -> None:
    """For `before`: loss and gradients of these steps, counted in this process, are NaN."""
    from calledshot.model import Decoder

    compute, calls = Decoder.loss, []

    def computed(self: Decoder, *arguments: object, **options: object) -> tuple[object, object]:
        calls.append(1)
        loss, z_loss = compute(self, *arguments, **options)
        return (loss * float("nan") if len(calls) in steps else loss), z_loss

    Decoder.loss = computed


def test_a_step_that_is_not_finite_is_left_out_and_recorded(train: Train) -> None:
    plain, ended = train("finite")
    assert ended.code == 0
    run, ended = train("one-nan", before=functools.partial(nan_in, range(7, 8)))
    assert ended.code == 0, ended.said
    assert "step 7: loss or gradient is not finite; the update was left out" in ended.said
    skipped = [row for row in run.rows("events") if row["kind"] == "skipped_step"]
    assert [(row["step"], row["loss"]) for row in skipped] == [(7, None)]
    rows = run.metrics()
    assert len(rows) == 20
    assert rows[6]["loss"] is None and rows[6]["grad_norm"] is None and rows[6]["update_norm"] is None
    assert all(row["loss"] is not None for row in rows[:6] + rows[7:])
    assert curve(run)[:6] == curve(plain)[:6]
    assert json.loads((run.checkpoint_path(20) / "state.json").read_text())["updates"] == 19


def test_four_in_a_row_are_survived_and_five_are_not(lab: Path, train: Train) -> None:
    _, ended = train("four-nan", before=functools.partial(nan_in, range(6, 10)))
    assert ended.code == 0, ended.said

    run, ended = train("five-nan", "checkpoint.every_steps=5", before=functools.partial(nan_in, range(6, 99)))
    assert ended.code == 1
    assert "not finite for 5 steps up to 10" in ended.complaint
    assert "fork from an earlier checkpoint" in ended.complaint
    assert run.state() == "failed"
    assert "not finite" in run.status()["message"]
    assert [row["step"] for row in run.rows("events") if row["kind"] == "skipped_step"] == [6, 7, 8, 9, 10]
    assert run.rows("events")[-1]["kind"] == "stop" and run.rows("events")[-1]["state"] == "failed"

    # Nothing is lost: with the cause gone, it goes on from the checkpoint before.
    run.verify(5)
    ended = shot(lab, "resume", "five-nan")
    assert ended.code == 0, ended.said
    assert "going on from step 5" in ended.said
    plain, ended = train("finite-by-fives", "checkpoint.every_steps=5")
    assert curve(run) == curve(plain)


def test_weights_that_are_not_finite_never_replace_good_ones(lab: Path, train: Train) -> None:
    (lab / "breaks.py").write_text(BREAKS, encoding="utf-8")
    options = ("optimizer.name=breaks.py:Breaks", "checkpoint.every_steps=1", "checkpoint.keep=1")
    run, ended = train("broken-weights", *options)
    assert ended.code == 1
    assert "so they were not saved" in ended.complaint
    assert run.state() == "failed"
    assert run.latest_checkpoint().step == 4
    ended = shot(lab, "resume", "broken-weights")  # where it does so again, five updates on
    assert ended.code == 1
    assert "not finite at step 9" in ended.complaint
    assert run.latest_checkpoint().step == 8
