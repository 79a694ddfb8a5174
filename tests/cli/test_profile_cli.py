"""The table of `shot profile`."""

from __future__ import annotations

import json
from typing import Any

import pytest

from calledshot.cli.profile import as_json, show
from calledshot.training.profile import Profile
from calledshot.training.roofline import Work, row
from calledshot.training.timeline import Place

PARTS = {
    Place("data"): (0.001, None),
    Place("matmul", "forward"): (0.05, Work(10e9, "FLOP")),
    Place("elementwise", "forward"): (0.02, Work(0.4e9, "B")),
    Place("host"): (0.025, None),
    Place("other"): (0.004, None),
}


def profile(**changes: Any) -> Profile:
    rows = [row(place, seconds, 0.1, work, 0.4e12, 10e9) for place, (seconds, work) in PARTS.items()]
    known: dict[str, Any] = {
        "recipe": "10M",
        "machine": {
            "device": "cpu", "dtype": "bfloat16", "compile": True, "threads": 2, "micro_tokens": 2048,
            "cpu": {"model": "AMD EPYC (26/2/1)"}, "gpus": [], "torch": {}, "allocator": "system", "openmp": "libgomp",
        },
        "layout": {"replicate": 1, "shard": 1, "context": 1, "tensor": 1, "expert": 1},
        "tokens": 4096, "steps": (0.1, 0.1), "plain_steps": (0.09, 0.11), "rows": tuple(rows),
        "unknown": {"somebody::kernel": 0.004}, "peaks": (0.3e12, 0.4e12), "bandwidth": 10e9, "flops": 15e9,
        "page_faults": 12_000.0, "hidden_communication": 0.0, "advice": (),
    }  # fmt: skip
    return Profile(**(known | changes))


def test_the_table_says_what_each_part_could_gain() -> None:
    lines = show(profile()).splitlines()
    assert lines[0] == (
        "10M on AMD EPYC (26/2/1), 2 threads: bfloat16, compiled, 4,096 tokens a step in passes of 2,048"
    )
    # 15 GFLOP in 0.1 s: 37.5 % of the highest peak, 50 % of the lowest.
    assert "100.0 ms (90.0 to 110.0; 40,960 tok/s, MFU 38%-50%)" in lines[1]
    assert "with the profiler, +0.0%" in lines[1]
    assert lines[2].endswith("memory 10 GB/s; 12k page faults a step")
    cells = {line.split("  ")[0]: line.split() for line in lines[4:]}
    # 200 GFLOP/s of 400: half of 50 ms could go. The memory's part is above what the memory can do.
    assert cells["matmul"][1:] == ["forward", "50.00", "50.0%", "0.2", "TFLOP/s", "0.4", "TFLOP/s", "50%", "25.00"]
    assert cells["norms, rotation, activation"][-7:] == ["20.0%", "20", "GB/s", "10", "GB/s", "200%", "0.00"]
    assert cells["host (Python, calls)"][-3:] == ["25.00", "25.0%", "25.00"]
    assert cells["other"][-2:] == ["4.00", "4.0%"]
    assert cells["sum"] == ["sum", "100.00", "100.0%"]
    assert "above 100% of the memory" in lines[-2]
    assert lines[-1] == "other: somebody::kernel 4.00 ms"


def test_several_ranks_what_to_do_and_an_mfu_that_cannot_be() -> None:
    shown = show(
        profile(
            layout={"replicate": 2, "shard": 2, "context": 1, "tensor": 1, "expert": 1},
            advice=("host: do something",),
            flops=1e12,
            hidden_communication=0.03,
        )
    )
    assert "rank 0 of 4" in shown
    assert "MFU n/a (2500% of the highest peak" in shown
    assert "30.00 ms of communication lie behind other work" in shown
    assert shown.endswith("\n\nhost: do something")


def test_json_has_all_of_it() -> None:
    found = json.loads(json.dumps(as_json(profile()), allow_nan=False))
    assert sum(one["seconds"] for one in found["rows"]) == pytest.approx(found["seconds"])
    assert found["rows"][1]["of_limit"] == 0.5
    assert (found["plain_seconds"], found["mfu_low"]) == (0.1, 0.375)
