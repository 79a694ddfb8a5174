from __future__ import annotations

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from rundir_crash import crashes, fill

from calledshot.recipe.errors import RunError
from calledshot.rundir import JsonLines, atomic_write, parse_time, read_json, read_jsonl, utc_now, write_json
from calledshot.rundir.files import objects, tail_jsonl


def test_a_line_torn_at_any_byte_is_dropped_and_the_file_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with JsonLines(path) as log:
        log.append({"step": 1, "text": "größer"})
        log.append({"step": 2, "text": "\ud800 lone surrogate"})
    whole = path.read_bytes()
    first_end = whole.index(b"\n") + 1
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        expected = [1] * (cut >= first_end - 1) + [2] * (cut >= len(whole) - 1)  # the newline itself may be missing
        assert [row["step"] for row in read_jsonl(path)] == expected
        with JsonLines(path) as log:
            log.append({"step": 3})
        assert [row["step"] for row in read_jsonl(path)] == [*expected, 3]


def test_foreign_lines_are_dropped_and_unknown_fields_kept(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b'{"a": 1, "from_the_future": [2]}\n\x00\x00\x00\n\xff\xfe\n[1]\n7\n\n{"a": 2}\n')
    assert read_jsonl(path) == [{"a": 1, "from_the_future": [2]}, {"a": 2}]
    assert read_jsonl(tmp_path / "absent.jsonl") == []


def test_a_reader_stops_where_a_line_is_being_written() -> None:
    reads = [b'{"step": 1}\n', b'{"step": 2', b'2, "rest": {"step": 3}\n', b'{"step": 4}\n']
    assert [row["step"] for row in objects(reads)] == [1]


def test_the_tail_is_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"".join(b'{"step": %d}\n' % step for step in range(10, 90)))  # 13 bytes each
    for size, rows in ((1, 0), (12, 0), (13, 1), (14, 1), (26, 2), (79 * 13, 79), (80 * 13, 80), (10_000, 80)):
        assert [row["step"] for row in tail_jsonl(path, size)] == list(range(90 - rows, 90)), size
    assert tail_jsonl(tmp_path / "absent.jsonl") == []


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    with JsonLines(path) as log:
        log.append({"loss": math.nan, "norms": [math.inf, np.float32(0.5), np.float32("nan")], "steps": np.arange(2)})
    row = json.loads(path.read_bytes(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert (row["loss"], row["norms"], row["steps"]) == (None, [None, 0.5, None], [0, 1])


def test_every_line_has_its_time_in_utc_and_the_stamp(tmp_path: Path) -> None:
    before = parse_time(utc_now())
    with JsonLines(tmp_path / "log.jsonl", {"incarnation": 3}) as log:
        log.append({"step": 1})
        log.append({"step": 2, "time": "2026-01-31T12:00:00.000Z"})
    first, second = read_jsonl(tmp_path / "log.jsonl")
    assert first["incarnation"] == 3
    assert first["time"].endswith("Z")
    assert before <= parse_time(first["time"]) <= before + 10
    assert parse_time(second["time"]) == 1_769_860_800.0
    assert math.isnan(parse_time(None))


def test_two_processes_may_append_to_one_record(tmp_path: Path) -> None:
    path = tmp_path / "exposures.jsonl"
    children = []
    for writer in range(3):
        child = os.fork()
        if child == 0:
            for number in range(200):
                with JsonLines(path) as log:  # opening looks for a torn line, while others write theirs
                    log.append({"writer": writer, "number": number, "padding": "x" * 3000})
            os._exit(0)
        children.append(child)
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
    rows = [(row["writer"], row["number"]) for row in read_jsonl(path)]
    assert sorted(rows) == [(writer, number) for writer in range(3) for number in range(200)]


def test_a_killed_replacement_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    seen = set()
    for _ in crashes(lambda: atomic_write(path, "new" * 1000), prepare=lambda: path.write_text("old")):
        assert path.read_text() in ("old", "new" * 1000)
        seen.add(path.read_text()[:3])
    assert seen == {"old", "new"}
    assert path.read_text() == "new" * 1000


def test_a_full_disk_leaves_the_old_file_and_no_other(small_disk: Path) -> None:
    path = small_disk / "status.json"
    write_json(path, {"step": 1})
    filler = fill(small_disk)
    with pytest.raises(RunError, match=r"status\.json: the disk is full; free some space"):
        write_json(path, {"step": 2, "padding": "x" * 10_000})
    assert read_json(path) == {"step": 1}
    assert sorted(os.listdir(small_disk)) == ["filler", "status.json"]
    filler.unlink()
    write_json(path, {"step": 2})
    assert read_json(path) == {"step": 2}


def test_a_log_on_a_full_disk_stays_readable_and_goes_on(small_disk: Path) -> None:
    with JsonLines(small_disk / "metrics.jsonl") as log:
        log.append({"step": 1})
        filler = fill(small_disk)
        with pytest.raises(RunError, match=r"metrics\.jsonl: the disk is full"):
            for step in range(2, 5000):  # the page it stands in may still have room
                log.append({"step": step, "padding": "x" * 100})
        written = [row["step"] for row in read_jsonl(small_disk / "metrics.jsonl")]
        assert written == list(range(1, step))
        filler.unlink()
        log.append({"step": step})
        assert [row["step"] for row in read_jsonl(small_disk / "metrics.jsonl")] == [*written, step]


def test_damaged_and_unwritable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "probes.json").write_text("{")
    with pytest.raises(RunError, match=r"probes\.json: is not JSON"):
        read_json(tmp_path / "probes.json")
    with pytest.raises(RunError, match=r"x: cannot be written \(No such file or directory\)"):
        atomic_write(tmp_path / "absent" / "x", "")
