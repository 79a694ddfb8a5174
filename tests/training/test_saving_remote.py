"""The remote tier: whatever happens to it, no step is blocked or failed, and what it holds is whole or not there."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from calledshot.recipe import RunError, UsageError, schema
from calledshot.rundir import RunDirectory
from calledshot.training import remote, state
from calledshot.training.pieces import Piece
from calledshot.training.remote import Remote, fetch
from calledshot.training.saving import Saver
from calledshot.training.state import Counters


class Flaky(LocalFileSystem):
    """A folder on which every eighth operation fails, and sometimes after half of it is done."""

    protocol = "flaky"
    chance = random.Random(7)
    share = 0.12
    log: list[str] = []  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(path.removeprefix("flaky://") if isinstance(path, str) else path)

    def _may_fail(self, what: str) -> None:
        if self.chance.random() < self.share:
            raise self.chance.choice([OSError("connection reset"), TimeoutError(what), ValueError(f"503 for {what}")])

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        if self.chance.random() < self.share:
            with open(rpath, "wb") as file:
                file.write(b"half")
            if self.chance.random() < 0.5:  # a store that takes half a file and says nothing
                return
        self._may_fail(rpath)
        super().put_file(lpath, rpath, **options)
        Flaky.log.append(Path(rpath).name)

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        self._may_fail(path)
        super().pipe_file(path, value, **options)

    def cat_file(self, path: str, **options: Any) -> bytes:
        self._may_fail(path)
        return super().cat_file(path, **options)

    def ls(self, path: str, detail: bool = False, **options: Any) -> Any:
        self._may_fail(path)
        return super().ls(path, detail, **options)

    def rm(self, path: Any, **options: Any) -> None:
        self._may_fail(path)
        super().rm(path, **options)

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        self._may_fail(path)
        return super().open(path, mode, **options)


fsspec.register_implementation("flaky", Flaky, clobber=True)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(remote, "FIRST_WAIT_SECONDS", 0.001)
    Flaky.chance.seed(7)
    yield
    MemoryFileSystem.store.clear()
    Flaky.share = 0.12


def make(folder: Path, identity: str = "0" * 64) -> RunDirectory:
    run = RunDirectory.create(folder / "run", recipe_toml="", identity=identity)
    run.begin_incarnation({}, [])
    return run


def tensors(step: int) -> dict[str, torch.Tensor]:
    return {"w": torch.full((8, 8), float(step)), "v": torch.arange(5) + step}


def saved(run: RunDirectory, url: str, steps: list[int], **rule: int) -> Saver:
    """Each step saved and uploaded before the next is."""
    saver = Saver(run, 0, 1, schema.Checkpoint(remote=url, **rule))
    for step in steps:
        held = {name: (tensor, Piece.whole(tuple(tensor.shape))) for name, tensor in tensors(step).items()}
        saver.save(Counters(step=step), held, {})
        saver.wait()
        assert saver._uploads is not None
        deadline = time.monotonic() + 20
        while saver._uploads.needed() and time.monotonic() < deadline:
            time.sleep(0.002)
    return saver


def events(run: RunDirectory, kind: str) -> list[dict[str, Any]]:
    return [row for row in run.rows("events") if row["kind"] == kind]


def check(run: RunDirectory, step: int) -> None:
    found = state.find(run)
    assert found is not None
    assert (found.step, found.passed_over) == (step, ())
    read = state.read_tensors(found.path / state.MODEL)
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors(step).items())
    assert state.read_counters(found.path).step == step


@pytest.mark.parametrize("scheme", ["", "memory://", "flaky://"])
def test_what_was_published_can_be_had_again_from_anywhere(tmp_path: Path, scheme: str) -> None:
    url = f"{scheme}{tmp_path}/far"
    run = make(tmp_path / "here")
    saved(run, url, [10, 20, 30], keep=2).close()
    uploads = events(run, "upload")
    assert [row["step"] for row in uploads] == [10, 20, 30]
    assert all(row["bytes"] == run.checkpoint_bytes(30) and row["seconds"] > 0 for row in uploads)
    assert bool(sum(row["failed_attempts"] for row in uploads)) == (scheme == "flaky://")
    assert not events(run, "upload_failed")
    Flaky.share = 0.0
    assert Remote(run, url).steps() == [30, 20]  # the same rule there
    Flaky.share = 0.12
    # A new machine: the same recipe, nothing on its disk.
    other, said = make(tmp_path / "there"), []
    assert fetch(other, url, said.append) == 30
    check(other, 30)
    assert other.latest() == 30
    (event,) = events(other, "fetched_checkpoint")
    assert event["step"] == 30
    assert event["bytes"] == run.checkpoint_bytes(30)
    assert "step 30: fetched from" in said[0]
    assert fetch(other, url, said.append) is None  # nothing newer
    assert fetch(run, url, said.append) is None
    assert fetch(run, "", said.append) is None


def test_the_manifest_comes_last(tmp_path: Path) -> None:
    Flaky.share, Flaky.log = 0.0, []
    run = make(tmp_path)
    saver = saved(run, f"flaky://{tmp_path}/far", [1])
    saver.close()
    assert sorted(Flaky.log) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert Flaky.log[-1] == "manifest.json"
    folder = tmp_path / "far" / "run" / "step-0000001"
    assert json.loads((folder / "manifest.json").read_text()) == run.manifest(1)
    assert (tmp_path / "far" / "run" / "latest").read_text().splitlines()[0] == "step-0000001"


def test_an_upload_cut_short_does_not_count(tmp_path: Path) -> None:
    run = make(tmp_path / "here")
    saved(run, f"{tmp_path}/far", [1, 2]).close()
    (tmp_path / "far" / "run" / "step-0000002" / "manifest.json").unlink()
    other = make(tmp_path / "there")
    assert fetch(other, f"{tmp_path}/far", print) == 1
    check(other, 1)


def test_a_tier_that_never_works_is_told_and_stops_nothing(tmp_path: Path) -> None:
    Flaky.share = 1.0
    run = make(tmp_path)
    saved(run, f"flaky://{tmp_path}/far", [1, 2]).close()
    assert run.complete_checkpoints() == [1, 2]
    assert not events(run, "upload")
    failed = events(run, "upload_failed")
    assert [row["step"] for row in failed] == [1, 2]
    assert all(row["message"] for row in failed)
    said: list[str] = []
    assert fetch(run, f"flaky://{tmp_path}/far", said.append) is None
    assert "cannot be read" in said[0]
    with pytest.raises(RunError, match="no whole checkpoint is here; try again, or begin anew"):
        fetch(make(tmp_path / "there"), f"flaky://{tmp_path}/far", said.append)


def test_a_slow_tier_holds_up_nothing_and_gets_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release, put = threading.Event(), Remote.put

    def slow(self: Remote, step: int, name: str) -> None:
        release.wait(20)
        put(self, step, name)

    monkeypatch.setattr(Remote, "put", slow)
    run = make(tmp_path)
    saver = Saver(run, 0, 1, schema.Checkpoint(remote=f"{tmp_path}/far", keep=1))
    begun = time.monotonic()
    for step in (1, 2, 3, 4):
        held = {name: (tensor, Piece.whole(tuple(tensor.shape))) for name, tensor in tensors(step).items()}
        saver.save(Counters(step=step), held, {})
        saver.wait()
        time.sleep(0.05)
    assert time.monotonic() - begun < 10
    assert run.complete_checkpoints() == [1, 4]  # the first is still on its way
    release.set()
    saver.close()
    assert [row["step"] for row in events(run, "upload")] == [1, 4]
    release.clear()
    saver = Saver(run, 0, 1, schema.Checkpoint(remote=f"{tmp_path}/far", keep=1))
    saver.save(Counters(step=5), {"w": (torch.ones(2), Piece.whole((2,)))}, {})
    saver.close(seconds=0.2)
    assert events(run, "upload_failed")[0]["message"] == "not done within 0.2 seconds"
    release.set()


def test_a_damaged_copy_is_passed_over(tmp_path: Path) -> None:
    run = make(tmp_path / "here")
    saved(run, f"{tmp_path}/far", [1, 2], keep=3).close()
    file = tmp_path / "far" / "run" / "step-0000002" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    other, said = make(tmp_path / "there"), []
    assert fetch(other, f"{tmp_path}/far", said.append) == 1
    check(other, 1)
    assert "is damaged (it is not what its manifest says)" in said[0]
    assert [row["step"] for row in events(other, "damaged_checkpoint")] == [2]
    assert sorted(path.name for path in other.folder.iterdir()) == ["latest", "step-0000001"]
    # Here the local copy of step 2 is whole, and of step 1 nothing is wanted.
    assert fetch(run, f"{tmp_path}/far", said.append) is None


def test_the_remote_copy_of_what_was_damaged_here_is_taken(tmp_path: Path) -> None:
    run = make(tmp_path)
    saved(run, f"{tmp_path}/far", [1, 2]).close()
    (run.checkpoint_path(2) / "model.safetensors").write_bytes(b"")
    assert fetch(run, f"{tmp_path}/far", print) == 2
    check(run, 2)
    for step in (1, 2):
        (run.checkpoint_path(step) / "state.json").write_bytes(b"")
    assert fetch(run, f"{tmp_path}/far", print) == 2
    check(run, 2)


def test_an_older_copy_of_the_run_catches_up_and_a_rollback_is_heeded(tmp_path: Path) -> None:
    run = make(tmp_path / "here")
    saved(run, f"{tmp_path}/far", [10, 20, 30], keep=9).close()
    # `latest` was set back by somebody: the run directory knows of step 30, and does not want it.
    (run.folder / "latest").write_text("step-0000020\n")
    assert fetch(run, f"{tmp_path}/far", print) is None
    check(run, 20)
    saved(run, f"{tmp_path}/far", [25], keep=9).close()
    assert Remote(run, f"{tmp_path}/far").steps() == [25, 20, 10]
    # A copy of the run made at step 10 knows nothing of what came after.
    other = make(tmp_path / "there")
    state.save(other, Counters(step=10), tensors(10), {})
    assert fetch(other, f"{tmp_path}/far", print) == 25
    check(other, 25)


def test_another_runs_place_is_left_alone(tmp_path: Path) -> None:
    saved(make(tmp_path / "here"), f"{tmp_path}/far", [1]).close()
    before = {path: path.read_bytes() for path in (tmp_path / "far").rglob("*") if path.is_file()}
    other = make(tmp_path / "there", identity="1" * 64)
    with pytest.raises(RunError, match="holds checkpoints of another run"):
        fetch(other, f"{tmp_path}/far", print)
    saved(other, f"{tmp_path}/far", [2]).close()
    assert "holds checkpoints of another run" in events(other, "upload_failed")[0]["message"]
    assert {path: path.read_bytes() for path in (tmp_path / "far").rglob("*") if path.is_file()} == before


def test_a_hostile_tier_writes_nothing_elsewhere(tmp_path: Path) -> None:
    run = make(tmp_path / "here")
    saved(run, f"{tmp_path}/far", [1]).close()
    manifest = tmp_path / "far" / "run" / "step-0000001" / "manifest.json"
    good = json.loads(manifest.read_text())
    entry = good["files"]["state.json"]
    secret = tmp_path / "secret"
    bombs = [
        "[" * 100_000,
        "\x80\x04.",
        "[]",
        json.dumps({**good, "files": {"state.json": {**entry, "bytes": 10**15}}}),
    ]
    names = [str(secret), "../../../../secret", "a/../../../../../secret"]
    for content in [*bombs, *(json.dumps({**good, "files": {name: entry}}) for name in names)]:
        manifest.write_text(content)
        other, said = make(tmp_path / f"there-{time.monotonic_ns()}"), []
        assert fetch(other, f"{tmp_path}/far", said.append) is None
        assert len(said) == 1
        assert "\n" not in said[0]
        assert other.complete_checkpoints() == []
        assert not secret.exists()


def test_a_tier_that_cannot_be_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"checkpoint\.remote = 'nosuch://bucket/path'"):
        Saver(make(tmp_path), 0, 1, schema.Checkpoint(remote="nosuch://bucket/path"))
