"""Bad input through the real command line: one clear line, the exit code, and everything as it was.

What a person types is `python -m calledshot`; where that would only repeat a start of three seconds, `shot` stands in.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import Ended, Shot, curve, make_lab, shot, stop_at, weights

from calledshot.rundir import RunDirectory

Train = Callable[..., tuple[RunDirectory, Ended]]


def command(lab: Path, *arguments: str) -> Ended:
    """`python -m calledshot ARGUMENTS`, as a person types it."""
    done = subprocess.run(
        [sys.executable, "-m", "calledshot", *arguments], cwd=lab, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == ""
    return Ended(done.returncode, done.stderr)


def everything(folder: Path) -> dict[str, bytes]:
    """Every file under a folder with its content, but the locks and what is remembered of hashes."""
    paths = (path for path in folder.rglob("*") if path.is_file() and "lock" not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def runs(lab: Path) -> set[str]:
    """Everything under runs/, hidden or not."""
    return {path.name for path in (lab / "runs").iterdir()} if (lab / "runs").exists() else set()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "tiny.toml", "model.layrs=3"), ("model.layrs", "layers")),
        (("train", "dmo"), ("no preset 'dmo'", "demo")),
        (("train", "tiny.toml"), ("--name",)),
        (("train", "tiny.toml", "--name", "../elsewhere"), ("--name", "without /")),
        (("train", "tiny.toml", "--name", "x@3"), ("--name", "without / and @")),
        (("train", "tiny.toml", "--name", "x" * 300), ("--name", "at most 128 bytes")),
        (("train", "tiny.toml", "--name", "x", "model.vocabulary=300"), ("model.vocabulary", "at least")),
        (
            ("train", "tiny.toml", "--name", "x", "batch.tokens=65536", "duration.tokens=1M"),
            ("batch.tokens", "add text"),
        ),
        (("train", "tiny.toml", "--name", "x", "optimizer.name=gone.py:Class"), ("optimizer.name", "gone.py")),
        (("train", "tiny.toml", "--name", "x", "--from", "nothing@3"), ("there is no run 'nothing'",)),
        (("resume", "nothing"), ("there is no run 'nothing'",)),
    ],
)
def test_what_can_be_typed_otherwise_is_said_in_one_line(
    lab: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    before = runs(lab)
    real = arguments[-1] in ("model.layrs=3", "dmo", "model.vocabulary=300")
    ended = (command if real else shot)(lab, *arguments)
    assert ended.code == 2, ended.said
    for word in words:
        assert word in ended.complaint
    assert runs(lab) == before


def test_a_folder_that_is_no_run_is_left_alone(lab: Path) -> None:
    (lab / "runs" / "mine").mkdir(parents=True)
    (lab / "runs" / "mine" / "thesis.txt").write_text("precious", encoding="utf-8")
    (lab / "runs" / "file").write_text("a file", encoding="utf-8")
    for name in ("mine", "file"):
        ended = shot(lab, "train", "tiny.toml", "--name", name)
        assert ended.code == 2
        assert "exists and is not a run" in ended.complaint
    assert everything(lab / "runs" / "mine") == {"thesis.txt": b"precious"}
    assert (lab / "runs" / "file").read_text(encoding="utf-8") == "a file"


def test_a_corrupt_shard_is_named(tmp_path: Path) -> None:
    make_lab(tmp_path)
    assert shot(tmp_path, "train", "tiny.toml", "--name", "whole").code == 0
    (shard,) = tmp_path.glob("data/*/sources/*/*train*.bin")
    content = bytearray(shard.read_bytes())
    content[100] ^= 0xFF
    shard.write_bytes(content)
    before = everything(tmp_path)
    ended = command(tmp_path, "train", "tiny.toml", "--name", "broken")
    assert ended.code == 1
    assert str(shard.relative_to(tmp_path)) in ended.complaint and "corrupt" in ended.complaint
    assert everything(tmp_path) == before
    shard.unlink()
    assert shot(tmp_path, "train", "tiny.toml", "--name", "broken").code == 0, "as the line said"


@pytest.mark.parametrize("damage", ["cut", "flipped", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    lab: Path, train: Train, reference: RunDirectory, damage: str
) -> None:
    options = ("duration.tokens=7680", "checkpoint.every_steps=10")
    run, ended = train(f"damaged-{damage}", *options, before=functools.partial(stop_at, 24))
    assert ended.code == 143 and run.complete_checkpoints() == [20, 24]
    file = run.checkpoint_path(24) / ("manifest.json" if damage == "manifest" else "model.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-1] ^= 0x01
    else:
        del content[len(content) // 2 :]
    file.write_bytes(content)
    metrics = (run.path / "metrics.jsonl").read_bytes()

    ended = shot(lab, "resume", run.name)
    assert ended.code == 0, ended.said
    warnings = [line for line in ended.said.splitlines() if "warning" in line]
    assert len(warnings) == 1 and str(file.relative_to(lab)) in warnings[0]
    assert "going on from step 20" in ended.said
    assert (run.path / "metrics.jsonl").read_bytes().startswith(metrics), "nothing of what was written is lost"
    assert curve(run) == curve(reference)
    assert weights(run, 60) == weights(reference, 60)
    (event,) = [row for row in run.rows("events") if row["kind"] == "damaged_checkpoint"]
    assert event["step"] == 20


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(lab: Path, train: Train) -> None:
    run, ended = train("replaced", "checkpoint.every_steps=5", before=functools.partial(stop_at, 15))
    assert ended.code == 143
    file = run.checkpoint_path(15) / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 0x01
    file.write_bytes(content)
    _, ended = train("replaced", "checkpoint.every_steps=5", before=functools.partial(stop_at, 15))
    assert ended.code == 143 and "going on from step 10" in ended.said
    run.verify(15)


def test_when_no_checkpoint_is_whole_nothing_is_begun_anew(lab: Path, train: Train) -> None:
    run, ended = train("hopeless", before=functools.partial(stop_at, 5))
    assert ended.code == 143
    file = run.checkpoint_path(5) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    rows = run.rows("metrics")
    ended = shot(lab, "resume", "hopeless")
    assert ended.code == 1
    assert "no checkpoint is whole" in ended.complaint and "model.safetensors" in ended.complaint
    assert run.rows("metrics") == rows and file.stat().st_size == 1000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A lab whose runs are on a disk of 1,640 KiB: room for two checkpoints, and not for a third."""
    make_lab(tmp_path)
    disk = tmp_path / "runs"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1640k", "tmpfs", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here (it takes root)")
    yield tmp_path
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_stops_a_run_without_harm(small_disk: Path, reference: RunDirectory) -> None:
    arguments = ("train", "tiny.toml", "--name", "full", "duration.tokens=7680", "checkpoint.every_steps=10")
    ended = command(small_disk, *arguments)
    run = RunDirectory(small_disk / "runs" / "full")
    assert ended.code == 1
    assert "the disk is full" in ended.complaint and "checkpoints" in ended.complaint
    assert run.state() == "failed" and "the disk is full" in run.status()["message"]
    assert run.complete_checkpoints() == [10, 20], "the earlier ones are intact, the half-written one is gone"
    assert not [path for path in (run.path / "checkpoints").iterdir() if path.name.startswith(".")]
    run.verify(10)
    run.verify(20)
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk / "runs")], check=True)
    ended = shot(small_disk, *arguments)
    assert ended.code == 0, ended.said
    assert "going on from step 20" in ended.said
    assert curve(run) == curve(reference)
    assert weights(run, 60) == weights(reference, 60)


def fill_the_disk(folder: Path) -> None:
    """To the last byte."""
    with open(folder / "filler", "wb", buffering=0) as file:
        size = 1 << 20
        while size:
            try:
                size = size if file.write(b"\0" * size) else 0
            except OSError:
                size //= 2


def test_a_disk_that_fills_up_between_steps_stops_a_run_without_harm(small_disk: Path, reference: RunDirectory) -> None:
    arguments = ("train", "tiny.toml", "--name", "filled", "duration.tokens=7680", "checkpoint.every_steps=10")
    run = RunDirectory(small_disk / "runs" / "filled")
    process = Shot(small_disk, *arguments, before=functools.partial(pause_at, 12))
    assert process.wait_for(lambda: (small_disk / "paused").exists() and run.latest() == 10)
    fill_the_disk(small_disk / "runs")
    (small_disk / "paused").unlink()
    ended = process.end()
    assert ended.code == 1
    assert "the disk is full" in ended.complaint
    assert run.complete_checkpoints() == [10]
    run.verify(10)
    assert run.state() in ("failed", "interrupted"), "where not even that could be written, the missing lock says it"
    (small_disk / "runs" / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk / "runs")], check=True)
    ended = shot(small_disk, *arguments)
    assert ended.code == 0, ended.said
    assert curve(run) == curve(reference)


def pause_at(step: int) -> None:
    """For `before`: when a step is recorded, the process writes a file `paused` and waits until it is gone."""
    import time

    from calledshot.training.trainer import Trainer

    record = Trainer._record

    def recorded(self: Trainer, row: dict, steps: int) -> None:
        record(self, row, steps)
        if row["step"] == step:
            Path("paused").touch()
            while Path("paused").exists():
                time.sleep(0.01)

    Trainer._record = recorded


def test_a_run_that_memory_cannot_hold_is_refused_before_it_is_tried(lab: Path) -> None:
    """A mask of 2^20 positions squared; no machine of today has it."""
    for layers, context, words in ((2, 2**20, "lower parallel.micro_tokens, model.context"), (10**20, 32, "more than")):
        ended = shot(lab, "train", "tiny.toml", f"model.context={context}", f"model.layers={layers}", "--name", "huge",
                     f"batch.tokens={context}", f"duration.tokens={context}")  # fmt: skip
        assert ended.code == 2 and words in ended.complaint, ended.said
        assert not (lab / "runs" / "huge").exists()


def test_a_run_without_its_data_is_not_resumed_on_others(lab: Path, train: Train, tmp_path: Path) -> None:
    run, ended = train("copied", before=functools.partial(stop_at, 12))
    assert ended.code == 143
    copy = tmp_path / "runs" / "copied"
    shutil.copytree(run.path, copy)
    before = everything(tmp_path)
    ended = shot(tmp_path, "resume", "copied")
    assert ended.code == 2
    assert str(copy) in ended.complaint and run.load("data")["folder"] in ended.complaint
    assert everything(tmp_path) == before and not (tmp_path / "data").exists()
    # In the lab that it comes from they are at hand; and whoever names the recipe means it to be prepared.
    ended = shot(lab, "resume", str(copy))
    assert ended.code == 0, ended.said
    for part in ("corpus", "tiny.toml"):
        (shutil.copytree if (lab / part).is_dir() else shutil.copy)(lab / part, tmp_path / part)
    shutil.rmtree(copy)
    shutil.copytree(run.path, copy)
    ended = shot(tmp_path, "train", "tiny.toml", "--name", "copied")
    assert ended.code == 0, ended.said
    assert len(RunDirectory(copy).metrics()) == 20
