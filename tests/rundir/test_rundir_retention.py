"""Which checkpoints stay by a rule, and which whatever the rule says."""

from __future__ import annotations

from pathlib import Path

import pytest

from calledshot.recipe.errors import RunError
from calledshot.rundir import JsonLines, Keep, RunDirectory, held_out_by_step, uses, write_json


def saved(run: RunDirectory, steps: range, size: int = 100) -> RunDirectory:
    for step in steps:
        with run.checkpoint_writer(step) as folder:
            (folder / "model.bin").write_bytes(bytes(size))
    return run


def test_newest_periodic_and_best_stay(run: RunDirectory) -> None:
    saved(run, range(10, 101, 10))
    held_out = {10: 1.5, 30: 1.1, 70: 1.2, 80: float("nan"), 90: 1.3, 110: 0.1}
    rule = Keep(newest=2, every_steps=40, best=2)
    assert run.kept(rule, held_out) == {
        30: "best 1",
        40: "every 40 steps",
        70: "best 2",
        80: "every 40 steps",
        90: "newest 2",
        100: "newest 1",
    }
    assert run.prune(rule, held_out) == [10, 20, 50, 60]
    assert run.complete_checkpoints() == [30, 40, 70, 80, 90, 100]


def test_a_budget_takes_the_least_wanted_first_and_never_the_newest(run: RunDirectory) -> None:
    saved(run, range(10, 101, 10))
    held_out = {10: 1.5, 30: 1.1, 70: 1.2}
    kept = [
        list(run.kept(Keep(newest=2, every_steps=20, best=2, bytes=100 * size), held_out))
        for size in (7, 6, 4, 3, 2, 1)
    ]
    # Periodic ones go first, oldest first (not 100, which is the newest), then the best from the worst on.
    assert kept == [
        [30, 40, 60, 70, 80, 90, 100],
        [30, 60, 70, 80, 90, 100],
        [30, 70, 90, 100],
        [30, 90, 100],
        [90, 100],
        [100],
    ]
    assert list(run.kept(Keep(newest=3, bytes=1))) == [100]


def test_what_was_last_known_to_be_good_stays_whatever_the_budget(run: RunDirectory) -> None:
    saved(run, range(10, 51, 10))
    for step in (40, 50):
        (run.checkpoint_path(step) / "model.bin").write_bytes(b"x" * 100)
        with pytest.raises(RunError, match="is damaged"):
            run.verify(step)
    assert run.prune(Keep(newest=1, bytes=1)) == [10, 20, 40]
    assert run.kept(Keep(newest=1, bytes=1)) == {30: "newest that is good", 50: "newest 1"}


def test_what_a_fork_an_average_or_an_export_came_from_stays(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    run = saved(RunDirectory.create(folder / "a", recipe_toml="", identity=""), range(10, 91, 10))
    lineages = {
        "fork": {"parent": "a", "step": 10},
        "average": {"parent": "a", "step": 40, "steps": [30, 40]},
        "path": {"parent": str(folder / "a"), "step": 50},
        "other": {"parent": "b", "step": 60},
        "elsewhere": {"parent": "/somewhere/a", "step": 60},
        "odd": {"parent": 7, "step": "60"},
    }
    for name, lineage in lineages.items():
        RunDirectory.create(folder / name, recipe_toml="", identity="", lineage=lineage)
    (folder / "broken").mkdir()
    (folder / "broken" / "lineage.json").write_text("{")
    with JsonLines(run.path / "exports.jsonl") as exports:
        exports.append({"step": 70, "folder": "/models/a"})
    assert uses(run.path) == {
        10: "fork was made of it",
        30: "average was made of it",
        40: "average was made of it",
        50: "path was made of it",
        70: "exported to /models/a",
    }
    assert run.prune(Keep(newest=1, bytes=1), needed=uses(run.path)) == [20, 60, 80]


def test_bits_per_byte_of_several_sources_are_one_figure() -> None:
    rows = [
        {"step": 1, "source": "a", "bits_per_byte": 1.0, "bytes_evaluated": 300},
        {"step": 1, "source": "b", "bits_per_byte": 2.0, "bytes_evaluated": 100},
        {"step": 2, "source": "a", "bits_per_byte": 1.0, "bytes_evaluated": 300},
        {"step": 2, "source": "b", "bits_per_byte": None, "bytes_evaluated": 100},
        {"step": 3, "source": "a", "bits_per_byte": 3.0},
        {"step": 3, "source": "a", "bits_per_byte": 2.5},
        {"source": "a", "bits_per_byte": "?"},
    ]
    assert held_out_by_step(rows) == {1: 1.25, 3: 2.5}


def test_a_manifest_cannot_name_what_lies_elsewhere(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x")
    saved(run, range(10, 21, 10))
    manifest = run.checkpoint_path(20) / "manifest.json"
    for name in (str(tmp_path / "secret"), "../../../../secret", "a/../../../../../secret"):
        write_json(manifest, {"step": 20, "files": {name: {"bytes": 1, "sha256": "0" * 64}}})
        with pytest.raises(RunError, match=r"names .*secret.*which is not a file of its folder"):
            run.verify(20)
        assert run.complete_checkpoints() == [10]
    hostile = ["[" * 100_000, '{"files": []}', '{"files": {"model.bin": {"bytes": 1e999, "sha256": "0"}}}', "\x80\x04."]
    for text in hostile:
        manifest.write_text(text)
        with pytest.raises(RunError, match=r"manifest\.json: is missing or damaged") as error:
            run.verify(20)
        assert "\n" not in str(error.value)
    found = run.latest_checkpoint()
    assert found is not None
    assert found.step == 10
