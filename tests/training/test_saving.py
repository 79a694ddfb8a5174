"""Checkpoints written in the background and by several ranks: whole or not there, and the same bits for anyone."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_pieces import cuts, shapes
from torch import Tensor

from calledshot import machine
from calledshot.recipe import RunError, UsageError, schema
from calledshot.rundir import RunDirectory
from calledshot.training import saving, state
from calledshot.training.pieces import Piece
from calledshot.training.saving import Saver
from calledshot.training.state import Counters
from calledshot.training.tensorfiles import TensorFile

SETTINGS = schema.Checkpoint(keep=2)
Held = dict[str, tuple[Tensor, Piece]]


def whole(tensors: dict[str, Tensor]) -> Held:
    return {name: (tensor, Piece.whole(tuple(tensor.shape))) for name, tensor in tensors.items()}


def held(tensors: dict[str, Tensor], pieces: dict[str, Piece]) -> Held:
    """What a rank has of whole tensors."""
    found = {}
    for name, piece in pieces.items():
        part = tensors[name] if piece.axis is None else tensors[name].chunk(piece.parts, piece.axis)[piece.part]
        rows = part.reshape(piece.height, piece.width)[piece.start : piece.stop]
        found[name] = (rows.clone(), piece)
    return found


def example(seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    model = {"a": torch.randn(6, 8, generator=generator), "b": torch.randn(5, generator=generator)}
    model |= {"c": torch.randn(3, 4, 4, generator=generator).bfloat16(), "s": torch.tensor(7)}
    return model, {f"{name}.first": torch.randn(tensor.shape) for name, tensor in model.items()}


def make(folder: Path, name: str = "run") -> RunDirectory:
    run = RunDirectory.create(folder / name, recipe_toml="", identity="0" * 64)
    run.begin_incarnation({}, [])
    return run


def ranks(
    run: RunDirectory, world: int, task: Callable[[Saver, int], Any], **options: Any
) -> list[BaseException | None]:
    """Runs `task` with each rank's Saver in a thread of its own; what it raised."""
    barrier, said = threading.Barrier(world), [b""] * world

    def gather(rank: int) -> Callable[[bytes], list[bytes]]:
        def gathered(content: bytes) -> list[bytes]:
            said[rank] = content
            barrier.wait()
            everyone = list(said)
            barrier.wait()
            return everyone

        return gathered

    raised: list[BaseException | None] = [None] * world

    def work(rank: int) -> None:
        own = run if rank == 0 else RunDirectory(run.path)
        try:
            task(Saver(own, rank, world, options.pop("settings", SETTINGS), gather=gather(rank), **options), rank)
        except BaseException as error:
            raised[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def same(found: Tensor, expected: Tensor) -> bool:
    found, expected = found.reshape(-1), expected.reshape(-1)
    return found.dtype == expected.dtype and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


def test_one_rank_writes_what_it_always_wrote(tmp_path: Path) -> None:
    model, optimizer = example()
    before, after = make(tmp_path, "before"), make(tmp_path, "after")
    counters = Counters(step=5, tokens=40, flops=1e9)
    state.save(before, counters, model, optimizer)
    saver = Saver(after, 0, 1, SETTINGS)
    saver.save(counters, whole(model), whole(optimizer))
    saver.close()
    for name in ("model.safetensors", "optimizer.safetensors", "state.json"):
        theirs, ours = (run.checkpoint_path(5) / name for run in (before, after))
        assert ours.read_bytes() == theirs.read_bytes()
    assert {file.name for file in after.checkpoint_path(5).iterdir()} == {
        file.name for file in before.checkpoint_path(5).iterdir()
    }
    (event,) = [row for row in after.rows("events") if row["kind"] == "checkpoint"]
    assert event["step"] == 5
    assert 0 < event["blocked_seconds"] < event["seconds"]
    assert event["bytes"] == after.checkpoint_bytes(5)


@st.composite
def layouts(draw: st.DrawFn, tensors: dict[str, Tensor]) -> list[dict[str, Piece]]:
    """What each of some ranks has of tensors: pieces that are a whole together, some of them on several ranks."""
    world = draw(st.integers(1, 4))
    found: list[dict[str, Piece]] = [{} for _ in range(world)]
    for name, tensor in tensors.items():
        pieces = draw(cuts(tuple(tensor.shape)))
        pieces = [piece for piece in pieces if piece.numel] or pieces[:1]
        if len(pieces) > world:
            pieces = [Piece.whole(tuple(tensor.shape))]
        owners = [*range(len(pieces)), *(draw(st.integers(0, len(pieces) - 1)) for _ in range(world - len(pieces)))]
        for rank, number in enumerate(draw(st.permutations(owners))):
            found[rank][name] = pieces[number]
    return found


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_what_n_ranks_write_m_ranks_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # some thousand times
    dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.uint8])
    tensors = {
        f"t{number}": torch.randint(0, 255, shape, dtype=torch.int64).to(data.draw(dtypes))
        for number, shape in enumerate(data.draw(st.lists(shapes, min_size=1, max_size=4)))
    }
    run = make(tmp_path, f"run-{time.monotonic_ns()}")
    written = data.draw(layouts(tensors))
    moments = {name: tensor.float() + 0.5 for name, tensor in tensors.items()}

    def task(saver: Saver, rank: int) -> None:
        saver.save(Counters(step=3), held(tensors, written[rank]), held(moments, written[rank]))
        saver.close()

    assert ranks(run, len(written), task) == [None] * len(written)
    found = state.find(run)
    assert found is not None
    assert found.passed_over == ()
    for pieces in data.draw(layouts(tensors)):
        for kind, wholes in ((state.MODEL, tensors), (state.OPTIMIZER, moments)):
            expected = {name: tensor for name, (tensor, _) in held(wholes, pieces).items()}
            read = state.read_pieces(found.path, kind, pieces)
            assert all(same(read[name], expected[name]) for name in pieces)
            assert all(read[name].shape == pieces[name].local_shape for name in pieces)
            into = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
            state.read_pieces(found.path, kind, pieces, into=into)
            assert all(same(into[name], expected[name]) for name in pieces)
    everything = state.read_tensors(found.path / state.MODEL)
    assert everything.keys() == tensors.keys()
    assert all(
        same(everything[name], tensors[name]) and everything[name].shape == tensors[name].shape for name in tensors
    )


def test_replicas_are_written_once_and_evenly(tmp_path: Path) -> None:
    run = make(tmp_path)
    tensors = {f"w{number}": torch.randn(100, 10 + number) for number in range(40)}

    def task(saver: Saver, rank: int) -> None:
        saver.save(Counters(step=1), whole(tensors), {})
        saver.close()

    assert ranks(run, 4, task) == [None] * 4
    folder = run.checkpoint_path(1)
    sizes = [(folder / f"model-{rank:05d}-of-00004.safetensors").stat().st_size for rank in range(4)]
    total = sum(tensor.numel() * 4 for tensor in tensors.values())
    assert sum(sizes) < total * 1.05
    assert max(sizes) - min(sizes) < 0.05 * total
    assert {path.name for path in folder.iterdir()} == {
        *(f"{kind}-{rank:05d}-of-00004.safetensors" for kind in ("model", "optimizer") for rank in range(4)),
        "state.json", "pieces.json", "manifest.json", "verified.json",
    }  # fmt: skip


def test_hardly_more_is_read_than_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path)
    tensors = {"wide": torch.randn(64, 40_000), "deep": torch.randn(8, 512, 256)}

    def task(saver: Saver, rank: int) -> None:
        pieces = {
            name: Piece.whole(shape := tuple(tensor.shape)).rows(
                rank * math.prod(shape[:-1]) // 2, (rank + 1) * math.prod(shape[:-1]) // 2
            )
            for name, tensor in tensors.items()
        }
        saver.save(Counters(step=1), held(tensors, pieces), {})
        saver.close()

    assert ranks(run, 2, task) == [None, None]
    read: list[int] = []
    plain = TensorFile.read

    def counted(self: TensorFile, begin: int, target: memoryview) -> None:
        read.append(len(target))
        plain(self, begin, target)

    monkeypatch.setattr(TensorFile, "read", counted)
    pieces = {"wide": Piece.cut((64, 40_000), 1, 1, 4), "deep": Piece.cut((8, 512, 256), 0, 3, 8)}
    found = state.read_pieces(run.checkpoint_path(1), state.MODEL, pieces)
    assert sum(read) == 4 * (64 * 10_000 + 512 * 256)
    assert torch.equal(found["wide"], tensors["wide"][:, 10_000:20_000])
    assert torch.equal(found["deep"], tensors["deep"][3:4])


def test_the_tensors_may_change_once_save_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path)
    model, optimizer = example()
    expected = {name: tensor.clone() for name, tensor in model.items()}
    model["c"] = model["c"].mT  # not contiguous
    expected["c"] = expected["c"].mT.contiguous()
    started = threading.Event()
    write = RunDirectory.write_checkpoint_file

    def held_up(self: RunDirectory, *arguments: Any) -> Any:
        started.wait()
        return write(self, *arguments)

    monkeypatch.setattr(RunDirectory, "write_checkpoint_file", held_up)
    saver = Saver(run, 0, 1, SETTINGS)
    saver.prepare(whole(model), whole(optimizer))
    counters = Counters(step=1)
    saver.save(counters, whole(model), whole(optimizer))
    counters.step = 2
    for tensor in (*model.values(), *optimizer.values()):
        tensor.zero_()
    assert run.complete_checkpoints() == []
    threading.Timer(0.3, started.set).start()
    begun = time.monotonic()
    saver.save(counters, whole(model), whole(optimizer))  # one at a time
    assert time.monotonic() - begun > 0.2
    assert run.complete_checkpoints()[0] == 1
    saver.close()
    assert run.complete_checkpoints() == [1, 2]
    found = state.read_tensors(run.checkpoint_path(1) / state.MODEL)
    assert all(same(found[name], tensor) for name, tensor in expected.items())
    assert state.read_counters(run.checkpoint_path(1)).step == 1
    assert not state.read_tensors(run.checkpoint_path(2) / state.MODEL)["a"].any()


def test_without_memory_or_wish_for_a_copy_the_save_is_done_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, (model, optimizer) = make(tmp_path), example()
    Saver(run, 0, 1, replace(SETTINGS, asynchronous=False)).save(Counters(step=1), whole(model), whole(optimizer))
    Saver(run, 0, 1, SETTINGS).save(Counters(step=2), whole(model), whole(optimizer), wait=True)
    monkeypatch.setattr(machine, "describe", lambda: {"memory": {"available_bytes": 100}})
    Saver(run, 0, 1, replace(SETTINGS, keep=9)).save(Counters(step=3), whole(model), whole(optimizer))
    assert run.complete_checkpoints() == [1, 2, 3]
    for row in run.rows("events"):
        assert row["blocked_seconds"] == row["seconds"]


def test_weights_that_are_not_finite_are_not_saved_by_any_rank(tmp_path: Path) -> None:
    run = make(tmp_path)

    def task(saver: Saver, rank: int) -> None:
        piece = Piece.whole((4, 4)).rows(2 * rank, 2 * rank + 2)
        tensor = torch.ones(2, 4)
        saver.save(Counters(step=1), {"w": (tensor, piece)}, {"w.first": (tensor / 0, piece)})
        saver.wait()
        if rank == 1:
            tensor[1, 3] = math.nan
        saver.save(Counters(step=2), {"w": (tensor, piece)}, {})
        saver.wait()

    raised = ranks(run, 2, task)
    for error in raised:
        assert isinstance(error, RunError)
        assert "the weights are not finite at step 2 (w), so they were not saved" in str(error)
    assert [path.name for path in sorted(run.folder.iterdir())] == ["latest", "step-0000001"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_finite_means_every_number(dtype: torch.dtype) -> None:
    name = {torch.float32: "F32", torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype]
    largest = torch.full((100,), torch.finfo(dtype).max, dtype=dtype)
    as_bytes = lambda tensor: tensor.view(torch.uint8).numpy()  # noqa: E731
    assert saving.finite(as_bytes(largest), name)
    for value in (math.inf, -math.inf, math.nan):
        bad = torch.zeros(100, dtype=dtype)
        bad[57] = value
        assert not saving.finite(as_bytes(bad), name)
    both = torch.zeros(100, dtype=dtype)
    both[3], both[4] = math.inf, -math.inf
    assert not saving.finite(as_bytes(both), name)
    assert saving.finite(as_bytes(torch.arange(10)), "I64")


def test_a_rank_that_does_not_write_its_part_is_named(tmp_path: Path) -> None:
    run, (model, optimizer) = make(tmp_path), example()

    def task(saver: Saver, rank: int) -> None:
        if rank == 1:  # as if it had been stopped between the collective and its first byte
            saver._begin = lambda task: None
        saver.save(Counters(step=1), whole(model), whole(optimizer))
        saver.wait()

    raised = ranks(run, 2, task, deadline_seconds=0.5)
    assert raised[1] is None
    assert isinstance(raised[0], RunError)
    assert "rank 1 has not finished its part, and nothing was written for 0.5 seconds" in str(raised[0])
    assert list(run.folder.iterdir()) == []


def test_an_earlier_attempt_at_the_same_step_is_not_joined(tmp_path: Path) -> None:
    run, (model, optimizer) = make(tmp_path), example()
    stale = run.begin_checkpoint(1, "1-7")
    (stale / "model-00000-of-00002.safetensors").write_text("half")

    def task(saver: Saver, rank: int) -> None:
        if rank == 0:
            time.sleep(0.2)  # so that rank 1 finds the stale folder first
        saver.save(Counters(step=1), whole(model), whole(optimizer))
        saver.close()

    assert ranks(run, 2, task) == [None, None]
    run.verify(1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_told_by_the_next_poll_and_costs_nothing(small_disk: Path) -> None:
    run = make(small_disk)
    model = {"w": torch.randn(100, 100)}
    saver = Saver(run, 0, 1, SETTINGS)
    saver.save(Counters(step=1), whole(model), {})
    saver.save(Counters(step=2), whole({"w": torch.randn(300, 300)}), {})
    deadline = time.monotonic() + 10
    with pytest.raises(RunError, match="the disk is full"):
        while time.monotonic() < deadline:
            saver.poll()
            time.sleep(0.01)
    saver.poll()  # told once
    assert [path.name for path in sorted(run.folder.iterdir())] == ["latest", "step-0000001"]
    saver.save(Counters(step=3), whole(model), {})
    saver.close()
    run.close()
    assert run.complete_checkpoints() == [1, 3]


def _save_and_die(path: Path, world: int, number: int) -> None:
    """Ranks as threads of a process that dies at its Nth operation on files, whichever rank does it."""
    run = RunDirectory(path)
    model, optimizer = example(1)
    seen = 0

    def hook(event: str, _: tuple[object, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"):
            seen += 1
            if seen == number:
                os._exit(77)

    def task(saver: Saver, rank: int) -> None:
        saver.save(Counters(step=2), whole(model), whole(optimizer))
        saver.close()

    os.fsync = lambda descriptor: None
    sys.addaudithook(hook)
    os._exit(0 if ranks(run, world, task, settings=replace(SETTINGS, keep=1)) == [None] * world else 1)


@pytest.mark.parametrize("world", [1, 2])
def test_a_kill_at_any_moment_leaves_the_old_state_or_the_new(tmp_path: Path, world: int) -> None:
    model, optimizer = example()
    origin = make(tmp_path, "origin")
    state.save(origin, Counters(step=1), model, optimizer)
    seen = []
    for number in range(1, 400, 1 if world == 1 else 3):
        path = tmp_path / f"run-{number}"
        shutil.copytree(origin.path, path)
        child = os.fork()
        if child == 0:
            _save_and_die(path, world, number)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 77)
        run = RunDirectory(path)
        with run.lock():
            found = state.find(run)
        assert found is not None
        assert found.passed_over == ()
        assert not [*run.folder.glob(".partial-*"), *run.folder.glob(".old-*"), *run.folder.glob(".trash-*")]
        expected = example(found.step - 1)[0]
        read = state.read_tensors(found.path / state.MODEL)
        assert all(same(read[name], tensor) for name, tensor in expected.items())
        seen.append(found.step)
        if code == 0:
            break
    assert seen == sorted(seen)
    assert set(seen) == {1, 2}


def _sharded(tmp_path: Path) -> Path:
    """A checkpoint of two ranks."""
    run = make(tmp_path)
    tensor = torch.randn(4, 4)

    def task(saver: Saver, rank: int) -> None:
        piece = Piece.whole((4, 4)).rows(2 * rank, 2 * rank + 2)
        saver.save(Counters(step=1), {"w": (tensor[piece.start : piece.stop], piece)}, {})
        saver.close()

    assert ranks(run, 2, task) == [None, None]
    return run.checkpoint_path(1)


class Payload:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


def _refused(folder: Path, kind: str = state.MODEL) -> str:
    with pytest.raises(RunError) as refusal:
        state.read_pieces(folder, kind, {"w": Piece.whole((4, 4))})
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith(str(folder))
    with pytest.raises(RunError):
        state.read_tensors(folder / kind)
    return str(refusal.value)


def test_nothing_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = _sharded(tmp_path)
    files = sorted(path.name for path in folder.iterdir())
    assert len(files) == 8
    for name in files:
        hostile = tmp_path / f"hostile-{name}" / "checkpoints" / "step-0000001"
        shutil.copytree(folder, hostile)
        run = RunDirectory(hostile.parent.parent)
        torch.save(Payload(), hostile / name)
        manifest = json.loads((folder / "manifest.json").read_text())
        for known in manifest["files"]:  # whoever sends such a thing writes a manifest that goes with it
            manifest["files"][known] = saving_entry(hostile / known)
        if name != "manifest.json":
            (hostile / "manifest.json").write_text(json.dumps(manifest))
        refusals = []
        try:
            found = state.find(run)
            assert found is not None
            state.read_counters(found.path)
            for kind in (state.MODEL, state.OPTIMIZER):
                state.read_pieces(
                    found.path, kind, {key: Piece.whole(s) for key, s in state.stored(found.path, kind).items()}
                )
        except RunError as error:
            refusals.append(str(error))
        needed = name != "verified.json" and "optimizer" not in name  # which holds no tensor here, so none is read
        assert len(refusals) == needed, name
        assert all("\n" not in line and name in line for line in refusals), refusals
    assert not (tmp_path / "pwned").exists()


def saving_entry(path: Path) -> dict[str, Any]:
    import hashlib

    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_pieces_that_overlap_lack_something_or_are_impossible_are_refused(tmp_path: Path) -> None:
    folder = _sharded(tmp_path)
    path = folder / "pieces.json"
    good = json.loads(path.read_text())
    first, second = good["model"]["w"]["pieces"]
    bad: dict[str, Any] = {
        "missing": [first],
        "overlap": [first, {**second, "start": 1}],
        "gap": [{**first, "stop": 1}, second],
        "twice": [first, first],
        "beyond": [first, {**second, "stop": 5}],
        "negative": [{**first, "start": -1}, second],
        "far": [{**first, "file": 2}, second],
        "name": [{**first, "file": "../../secret"}, second],
        "fraction": [{**first, "stop": 2.0}, second],
        "mixed": [first, {**second, "axis": 0, "parts": 2, "part": 1, "start": 0, "stop": 2}],
        "uneven": [{**first, "axis": 0, "parts": 3}, second],
        "zero": [{**first, "axis": 0, "parts": 0}, second],
        "nothing": [],
    }
    for name, pieces in bad.items():
        path.write_text(json.dumps({**good, "model": {"w": {**good["model"]["w"], "pieces": pieces}}}))
        assert "pieces.json" in _refused(folder), name
    for content in (
        [],
        {},
        {**good, "writers": 10**9},
        {**good, "writers": 0},
        {**good, "model": {"w": {**good["model"]["w"], "dtype": "F8"}}},
        {**good, "model": {"w": {**good["model"]["w"], "shape": [4, "4"]}}},
        {**good, "model": {"w": {**good["model"]["w"], "shape": [2**62, 2**62]}}},
    ):
        path.write_text(json.dumps(content))
        assert "pieces.json" in _refused(folder), content
    path.write_text("[" * 1_000_000)
    assert "it is not JSON" in _refused(folder)
    huge = {"file": 0, "axis": None, "part": 0, "parts": 1, "start": 0, "stop": 2**31}
    path.write_text(
        json.dumps({"writers": 2, "model": {"w": {"dtype": "F32", "shape": [2**31, 2**31], "pieces": [huge]}}})
    )
    with pytest.raises(RunError, match=r"w is not what pieces\.json says"):  # before memory for it is asked for
        state.read_tensors(folder / state.MODEL)
    path.write_text(json.dumps(good))
    assert state.read_tensors(folder / state.MODEL)["w"].shape == (4, 4)


def test_headers_that_lie_are_refused(tmp_path: Path) -> None:
    run = make(tmp_path)
    state.save(run, Counters(step=1), {"v": torch.ones(4, 4), "w": torch.ones(4, 4)}, {})
    folder = run.checkpoint_path(1)
    path = folder / state.MODEL
    good = path.read_bytes()
    size = int.from_bytes(good[:8], "little")
    header, data = json.loads(good[8 : 8 + size]), good[8 + size :]

    def write(header: Any, data: bytes = data, size: int | None = None) -> None:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data)

    w = header["w"]
    bad = {
        "shape": {**header, "w": {**w, "shape": [4, 5]}},
        "negative": {**header, "w": {**w, "shape": [-4, -4]}},
        "type": {**header, "w": {**w, "dtype": "PICKLE"}},
        "overlap": {**header, "w": {**w, "data_offsets": [32, 96]}},
        "hole": {**header, "w": {**w, "data_offsets": [128, 192]}},
        "before": {**header, "w": {**w, "data_offsets": [-64, 0]}},
        "three": {**header, "w": {**w, "data_offsets": [64, 128, 128]}},
        "missing": {"w": w},
        "list": [],
        "null": {"w": None},
    }
    for name, content in bad.items():
        write(content)
        assert "cannot be read as tensors" in _refused(folder), name
    for size in (0, 2**63, 10**8, len(good)):
        write(header, size=size)
        _refused(folder)
    write(header, data[:-1])
    _refused(folder)
    write(b"[" * 100_000)
    _refused(folder)
    path.write_bytes(b"")
    _refused(folder)
    path.unlink()
    os.mkfifo(path)  # which would wait for a writer for ever
    _refused(folder)
    path.unlink()
    _refused(folder)


def test_counters_and_manifests_that_lie_are_refused(tmp_path: Path) -> None:
    run = make(tmp_path)
    state.save(run, Counters(step=1), {"w": torch.ones(4, 4)}, {})
    folder = run.checkpoint_path(1)
    for content in (
        '{"step": -1}',
        '{"step": 1.5}',
        '{"tokens": "7"}',
        '{"flops": NaN}',
        '{"step": true}',
        "[1]",
        "\x80",
    ):
        (folder / "state.json").write_text(content)
        with pytest.raises(RunError, match=r"state\.json: ") as refusal:
            state.read_counters(folder)
        assert "\n" not in str(refusal.value)
    (folder / "state.json").write_text('{"step": 1, "newer": "field"}')
    assert state.read_counters(folder) == Counters(step=1)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {"state.json": saving_entry(folder / "state.json")}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"its manifest does not know model\.safetensors"):
        state.find(run)


def test_another_models_tensors_are_refused_with_the_way_out(tmp_path: Path) -> None:
    run = make(tmp_path)
    state.save(run, Counters(step=1), {"w": torch.ones(4, 4)}, {})
    for wanted, found in (
        ({"w": Piece.whole((4, 5))}, r"holds \(4, 4\) for w"),
        ({"v": Piece.whole(())}, "holds nothing for v"),
    ):
        with pytest.raises(UsageError, match=found):
            state.read_pieces(run.checkpoint_path(1), state.MODEL, wanted)
