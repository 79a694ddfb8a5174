from __future__ import annotations

import os
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
from rundir_crash import crashes, fill

from calledshot.recipe.errors import RunError, UsageError
from calledshot.rundir import RunDirectory, read_json


def save(run: RunDirectory, step: int, content: str = "") -> None:
    with run.checkpoint_writer(step) as folder:
        run.write_checkpoint_file(step, "model.bin", [(content or f"weights {step}").encode()])
        (folder / "ranks").mkdir()
        (folder / "ranks" / "0.bin").write_text(f"rank 0 at {step}")


def content(run: RunDirectory, step: int) -> str:
    return (run.checkpoint_path(step) / "model.bin").read_text()


def damage(path: Path) -> None:
    """Flips one bit, which the size does not tell."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_save_is_listed_hashed_and_the_latest(run: RunDirectory) -> None:
    assert run.latest_checkpoint() is None
    save(run, 10)
    save(run, 20)
    assert run.complete_checkpoints() == [10, 20]
    found = run.latest_checkpoint()
    assert found is not None
    assert (found.step, found.path, found.passed_over) == (20, run.checkpoint_path(20), ())
    manifest = read_json(found.path / "manifest.json")
    assert sorted(manifest["files"]) == ["model.bin", "ranks/0.bin"]
    assert manifest["files"]["model.bin"] == {
        "bytes": 10,
        "sha256": "6ed338b4f9eb15ed88fbfd6c56a877815e06545289d361b473d20185360dac08",
    }
    assert (found.path / "verified.json").exists()
    assert (run.folder / "latest").read_text().splitlines()[0] == "step-0000020"


def test_a_kill_at_any_point_of_a_save_leaves_a_checkpoint_to_continue_from(run: RunDirectory) -> None:
    def prepare() -> None:
        shutil.rmtree(run.folder, ignore_errors=True)
        save(run, 10)

    seen = set()
    for _ in crashes(lambda: save(run, 20), prepare):
        with run.lock():
            found = run.latest_checkpoint()
        assert found is not None
        assert found.passed_over == ()
        seen.add(found.step)
        assert set(run.complete_checkpoints()) <= {10, 20}
        assert found.step == max(run.complete_checkpoints()) == run.latest_pointer()
        assert not list(run.folder.glob(".partial-*"))
    assert seen == {10, 20}


def test_a_kill_while_the_only_checkpoint_is_saved_again_loses_nothing(run: RunDirectory) -> None:
    def prepare() -> None:
        shutil.rmtree(run.folder, ignore_errors=True)
        save(run, 10, "before")

    seen = set()
    for _ in crashes(lambda: save(run, 10, "after"), prepare):
        with run.lock():
            pass
        run.verify(10)
        seen.add(content(run, 10))
        assert sorted(entry.name for entry in run.folder.iterdir() if entry.is_dir()) == ["step-0000010"]
    assert seen == {"before", "after"}


def test_a_kill_while_pruning_leaves_only_whole_checkpoints(run: RunDirectory) -> None:
    def prepare() -> None:
        shutil.rmtree(run.folder, ignore_errors=True)
        for step in (10, 20, 30):
            save(run, step)

    for _ in crashes(lambda: run.prune(1), prepare):
        with run.lock():
            for step in run.complete_checkpoints():
                run.verify(step)
        assert run.latest() == 30
    assert run.complete_checkpoints() == [30]


def test_damage_is_named_and_passed_over(run: RunDirectory) -> None:
    for step in (10, 20, 30):
        save(run, step)
    damage(run.checkpoint_path(30) / "ranks" / "0.bin")
    damage(run.checkpoint_path(20) / "model.bin")
    with pytest.raises(
        RunError, match=r"step-0000030/ranks/0\.bin: is damaged.*newest other good checkpoint is step 10"
    ):
        run.verify(30)
    found = run.latest_checkpoint()
    assert found is not None
    assert found.step == 10
    assert [Path(line.split(":")[0]).name for line in found.passed_over] == ["0.bin", "model.bin"]
    damage(run.checkpoint_path(10) / "model.bin")
    with pytest.raises(RunError, match="no checkpoint is whole"):
        run.latest_checkpoint()
    with pytest.raises(RunError, match="no other checkpoint is good"):
        run.verify(10)
    with pytest.raises(UsageError, match="no checkpoint of step 11; complete ones: 10, 20, 30"):
        run.verify(11)


def test_a_checkpoint_cut_in_half_does_not_count(run: RunDirectory) -> None:
    for step in (10, 20, 30, 40):
        save(run, step)
    os.truncate(run.checkpoint_path(40) / "model.bin", 4)
    (run.checkpoint_path(30) / "manifest.json").write_text('{"step": 30, "fi')
    (run.checkpoint_path(20) / "model.bin").unlink()
    assert run.complete_checkpoints() == [10]
    assert run.latest() == 10
    found = run.latest_checkpoint()
    assert found is not None
    assert found.step == 10
    assert "has 4 bytes where its manifest says 10" in found.passed_over[0]


def test_after_a_rollback_the_abandoned_future_is_not_continued_from(run: RunDirectory) -> None:
    for step in (10, 20, 30, 15):
        save(run, step)
    assert run.latest() == 15
    damage(run.checkpoint_path(15) / "model.bin")
    found = run.latest_checkpoint()
    assert found is not None
    assert found.step == 10
    assert run.prune(2) == [20, 30]


def test_a_rollback_between_a_kill_and_the_next_start_is_heeded(run: RunDirectory) -> None:
    def prepare() -> None:
        shutil.rmtree(run.folder, ignore_errors=True)
        save(run, 10)
        save(run, 20)

    for _ in crashes(lambda: save(run, 30), prepare):
        (run.folder / "latest").write_text("step-0000010\n")
        with run.lock():
            assert run.latest() == 10


def test_a_damaged_pointer_is_passed_over(run: RunDirectory) -> None:
    for step in (0, 10, 20, 30):
        save(run, step)
    latest = run.folder / "latest"
    content = latest.read_bytes()
    damaged = [content[:length] for length in range(len(content))]
    for place in range(len(content)):
        damaged += [content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :] for bit in range(8)]
    for one in damaged:
        latest.write_bytes(one)
        assert run.latest() == 30, one
    latest.write_text("step-0000020\n")
    assert run.latest() == 20


def test_pruning_keeps_the_newest_and_one_not_known_to_be_damaged(run: RunDirectory) -> None:
    for step in (10, 20, 30, 40, 50, 60):
        save(run, step)
    for step in (50, 60):
        damage(run.checkpoint_path(step) / "model.bin")
        with pytest.raises(RunError):
            run.verify(step)
    assert run.prune(1) == [10, 20, 30, 50]
    assert run.complete_checkpoints() == [40, 60]
    damage(run.checkpoint_path(40) / "model.bin")
    with pytest.raises(RunError):
        run.verify(40)
    assert run.prune(1) == []
    save(run, 70)
    assert run.prune(1) == [40, 60]


def test_pruning_verifies_where_nothing_is_known(run: RunDirectory) -> None:
    for step in (10, 20, 30, 40):
        save(run, step)
        (run.checkpoint_path(step) / "verified.json").unlink()
    damage(run.checkpoint_path(40) / "model.bin")
    assert run.prune(1) == [10, 20]
    assert run.complete_checkpoints() == [30, 40]


def test_what_is_hashed_while_it_is_written_is_not_read_again(run: RunDirectory) -> None:
    folder = run.begin_checkpoint(10)
    run.write_checkpoint_file(10, "model.bin", (b"weights ", memoryview(b"10")))
    assert (folder / "model.bin").read_bytes() == b"weights 10"
    damage(folder / "model.bin")  # as a disk might do it: what was meant to be written decides
    run.publish_checkpoint(10)
    with pytest.raises(RunError, match=r"model\.bin: is damaged"):
        run.verify(10)
    # The next attempt at the same step forgets it, and files written in other ways are hashed as they lie there.
    with run.checkpoint_writer(10) as folder:
        (folder / "model.bin").write_bytes(b"weights 10")
    run.verify(10)
    manifest = read_json(run.checkpoint_path(10) / "manifest.json")
    assert manifest["files"]["model.bin"]["sha256"] == sha256(b"weights 10").hexdigest()


def test_an_error_while_saving_leaves_no_trace(run: RunDirectory) -> None:
    save(run, 10)
    with pytest.raises(ZeroDivisionError), run.checkpoint_writer(20) as folder:
        (folder / "model.bin").write_text("half")
        raise ZeroDivisionError
    assert sorted(entry.name for entry in run.folder.iterdir()) == ["latest", "step-0000010"]


def test_a_full_disk_keeps_the_checkpoints_there_were(small_disk: Path) -> None:
    run = RunDirectory.create(small_disk / "a", recipe_toml="", identity="")
    save(run, 10)
    with pytest.raises(RunError, match="the disk is full"), run.checkpoint_writer(20) as folder:
        (folder / "model.bin").write_bytes(b"x" * 1_000_000)
    with pytest.raises(RunError, match="the disk is full"), run.checkpoint_writer(20):
        run.write_checkpoint_file(20, "model.bin", [b"x" * 1_000_000])
    with run.checkpoint_writer(20) as folder:
        (folder / "model.bin").write_bytes(b"x" * 10)
    folder = run.begin_checkpoint(30)
    (folder / "model.bin").write_bytes(b"x" * 10)
    filler = fill(small_disk)
    with pytest.raises(RunError, match="the disk is full"):
        run.publish_checkpoint(30)
    assert run.complete_checkpoints() == [10, 20]
    filler.unlink()
    save(run, 30)
    assert run.complete_checkpoints() == [10, 20, 30]
