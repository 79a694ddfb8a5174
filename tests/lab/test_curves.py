import json
import math
import random
import tracemalloc

import pytest
from synthetic import write_lines, write_run

from calledshot.lab.curves import Curves, edges
from calledshot.lab.history import History
from calledshot.lab.metrics import Metrics, downsample
from calledshot.lab.view import open_view
from calledshot.rundir import read_jsonl
from calledshot.rundir.merge import merge


def curves_of(rows: list[dict], limit: int = 600) -> tuple[Curves, History]:
    metrics, seen = Metrics(rows), History()
    metrics.tell(seen)
    return downsample(metrics, seen, limit), seen


@pytest.mark.parametrize("restart", [None, (60, 75), (10, 10)])
def test_a_short_run_keeps_every_step_that_still_stands(tmp_path, restart):
    rows = read_jsonl(write_run(tmp_path / "run", steps=100, restart=restart) / "metrics.jsonl")
    curves, _ = curves_of(rows)
    expected = merge(rows)
    assert curves.step == [row["step"] for row in expected]
    assert curves.mean["loss"] == [row["loss"] for row in expected]
    assert curves.rows == 100


def test_steps_done_twice_are_counted_and_gaps_are_left_out_of_the_hours(tmp_path):
    rows = read_jsonl(write_run(tmp_path / "run", steps=100, restart=(60, 75)) / "metrics.jsonl")
    curves, seen = curves_of(rows)
    assert seen.lost == 15
    assert curves.hours == sorted(curves.hours)
    # 115 steps of 1.3 s, 4 s after ten of the eleven evaluations; the 900 s between the incarnations are left out.
    assert seen.seconds == pytest.approx(115 * 1.3 + 4 * (11 - 1), abs=5)


def test_no_spike_of_a_long_run_is_lost():
    noise = random.Random(0)
    rows = [{"step": step, "incarnation": 1, "loss": noise.random(), "grad_norm": 1.0} for step in range(1, 100_001)]
    rows[77_777]["loss"], rows[12_345]["loss"] = 50.0, -3.0
    curves, _ = curves_of(rows, limit=300)
    assert len(curves.step) <= 300
    assert max(curves.high["loss"]) == 50.0
    assert min(curves.low["loss"]) == -3.0
    assert curves.step[-1] == 100_000
    # Dense enough at the start for a logarithmic axis.
    assert sum(step <= 100 for step in curves.step) > 20


def test_a_long_run_is_never_in_memory_as_rows(tmp_path):
    """30,000 rows are 60 MiB as dictionaries."""
    path = write_run(tmp_path / "run", steps=100, restart=None)
    row = json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])
    write_lines(path / "metrics.jsonl", [row | {"step": step} for step in range(1, 30_001)])
    open_view(path)  # imports
    tracemalloc.start()
    view = open_view(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert view.curves.rows == 30_000
    assert peak < 20 << 20


def test_buckets_cover_all_steps_once():
    ends = edges(1, 1_000_000, 600)
    assert ends == sorted(set(ends))
    assert ends[-1] == 1_000_000
    assert len(ends) <= 600


def test_what_is_not_a_number_is_left_out():
    rows = [
        {"step": 1, "loss": None, "lr": "0.1"},
        {"step": 2, "loss": math.nan, "lr": True},
        {"step": 3, "loss": 2.0, "lr": 0.1},
        {"loss": 9.0},
        {"step": None, "loss": 9.0},
    ]
    curves, _ = curves_of(rows)
    assert curves.mean["loss"] == [None, None, 2.0]
    assert curves.mean["lr"] == [None, None, 0.1]


def test_an_mfu_above_the_highest_peak_is_refused():
    rows = [
        {"step": step, "mfu_low": 0.4 if step < 8 else 1.2, "mfu_high": 0.5 if step < 8 else 1.4} for step in range(10)
    ]
    curves, _ = curves_of(rows)
    assert curves.refused == 2
    assert curves.peak["mfu_low"] == 0.4
    assert curves.median == {"mfu_low": 0.4, "mfu_high": 0.5}


def test_places_between_steps_are_interpolated():
    rows = [{"step": step, "tokens": 100 * step} for step in (10, 20)]
    curves, _ = curves_of(rows)
    assert [curves.at("tokens", step) for step in (5, 10, 15, 20, 25, None)] == [500, 1000, 1500, 2000, 2000, None]
    assert curves.at("flops", 15) is None
