"""Checkpoints inside a run directory: complete or not there at all, hashed, and never deleted down to none."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from calledshot.recipe.errors import RunError, UsageError
from calledshot.rundir.files import (
    atomic_write,
    is_disk_full,
    read_json,
    sync_folder,
    utc_now,
    write_failure,
    write_json,
)
from calledshot.rundir.retention import Keep

_NAME = re.compile(r"step-(\d+)")
_NAMED = re.compile(r"step-(\d{7,})")  # what is cut off in `latest` is shorter
_PARTIAL, _TRASH, _OLD = ".partial-", ".trash-", ".old-"
_BEGUN, _SEAL = ".begun.json", ".seal-{}.json"
_FOLLOWS = ".follows.json"  # what `latest` named before; in a checkpoint that it does not name yet
_THREADS = 8  # hashlib and fsync both leave Python's lock
_NOT_COMPLETE = "is missing or damaged, so the checkpoint is not complete"
_WATCH_SECONDS = 0.02
MANIFEST, VERIFIED, LATEST = "manifest.json", "verified.json", "latest"
Agree = Callable[[str | None], str | None]
"""Gives every rank the first fault that any rank found, None where none did."""


@dataclass(frozen=True)
class CheckpointFound:
    """The checkpoint to continue from."""

    step: int
    path: Path
    passed_over: tuple[str, ...] = ()
    """Newer checkpoints that were damaged, each as one line that says what is wrong with it."""


class Checkpoints:
    """The checkpoints of the run at `path`, one folder a step: `checkpoints/step-0001000/` with `manifest.json`.

    A save is `begin_checkpoint`, files written into the folder it gives, `publish_checkpoint`; one at a time. Until
    published, nothing of it counts, and what a killed save left goes at the next one. Large files are best written by
    `write_checkpoint_file`, which publishing then need not read again.

    Several processes need nothing but the file system for it: rank 0 begins with a token that all of them know; the
    others `join_checkpoint`, write their files and `seal_checkpoint`; rank 0 does `await_seals` before it publishes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = path / "checkpoints"
        self._sealed: dict[Path, dict[str, Any]] = {}

    def checkpoint_path(self, step: int) -> Path:
        """Where the published checkpoint of a step is."""
        return self.folder / f"step-{step:07d}"

    def partial_checkpoint_path(self, step: int) -> Path:
        """Where the files of a checkpoint that is being written go; the same on every rank."""
        return self.folder / f"{_PARTIAL}{self.checkpoint_path(step).name}"

    def begin_checkpoint(self, step: int, token: str = "") -> Path:
        """Clears what interrupted saves left and returns the empty folder to write into. Only one process calls it.

        `token` tells those who join this save from an earlier attempt at the same step.
        """
        partial = self.partial_checkpoint_path(step)
        self._sealed.clear()
        try:
            self.repair_checkpoints()
            partial.mkdir(parents=True)
        except OSError as error:
            raise write_failure(partial, error) from error
        if token:
            write_json(partial / _BEGUN, token)
        return partial

    def join_checkpoint(self, step: int, token: str, deadline_seconds: float) -> Path:
        """Waits until rank 0 has begun the save with that token, and gives the folder to write into. RunError past the
        deadline."""
        partial = self.partial_checkpoint_path(step)
        self._sealed.clear()
        deadline = time.monotonic() + deadline_seconds
        while _read_or_none(partial / _BEGUN) != token:
            if time.monotonic() > deadline:
                raise RunError(f"{partial}: rank 0 did not begin this save within {deadline_seconds:g} seconds")
            time.sleep(_WATCH_SECONDS)
        return partial

    def seal_checkpoint(self, step: int, rank: int, fault: str = "") -> None:
        """Says to rank 0 that all that this rank writes is on the disk, or what went wrong instead."""
        files = {path.name: entry for path, entry in self._sealed.items()}
        write_json(self.partial_checkpoint_path(step) / _SEAL.format(rank), {"files": files, "fault": fault})

    def await_seals(self, step: int, world: int, deadline_seconds: float) -> None:
        """Waits for the seals of ranks 1 to `world` - 1.

        RunError with the first fault that one tells, or when nothing has been written for the time of the deadline.
        """
        partial = self.partial_checkpoint_path(step)
        missing, written = set(range(1, world)), -1
        changed = time.monotonic()
        while missing:
            for rank in sorted(missing):
                seal = _read_or_none(partial / _SEAL.format(rank))
                if seal is None:
                    continue
                if seal["fault"]:
                    raise RunError(seal["fault"])
                entries = {partial / name: entry for name, entry in seal["files"].items()}
                # On a network disk a rank's small file may show itself before its large ones.
                if all(path.exists() and path.stat().st_size == entry["bytes"] for path, entry in entries.items()):
                    self._sealed |= entries
                    missing.discard(rank)
            size = _size(partial)
            if size != written:
                written, changed = size, time.monotonic()
            elif time.monotonic() > changed + deadline_seconds:
                raise RunError(
                    f"{partial}: rank {min(missing)} has not finished its part, and nothing was written for "
                    f"{deadline_seconds:g} seconds; resume from the checkpoint before"
                )
            if missing:
                time.sleep(_WATCH_SECONDS)
        for name in (_BEGUN, *(_SEAL.format(rank) for rank in range(1, world))):
            (partial / name).unlink()

    def write_checkpoint_file(self, step: int, name: str, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
        """Writes a file of the checkpoint that is being written, and flushes it to the disk; several threads may, each
        its own. It is hashed meanwhile, from memory, so that a mistake in writing it shows; parts that stay in a core's
        own cache cost least. Its entry in the manifest.

        OSError when the disk is full.
        """
        path = self.partial_checkpoint_path(step) / name
        sha256, size = hashlib.sha256(), 0
        with open(path, "xb", buffering=0) as file:
            for part in parts:
                sha256.update(part)
                while part:
                    written = file.write(part)
                    size, part = size + written, part[written:]
            os.fsync(file.fileno())
        self._sealed[path] = {"bytes": size, "sha256": sha256.hexdigest()}
        return self._sealed[path]

    def publish_checkpoint(self, step: int, incarnation: int = 0, *, latest: bool = True) -> Path:
        """Makes what was written under `partial_checkpoint_path(step)` the checkpoint of that step, and the latest.

        Every file that was not yet is flushed to the disk and hashed, then the manifest is written, then the folder
        gets its name, then `latest` moves, unless told not to. An earlier checkpoint of the same step is replaced.
        RunError when the disk is full; older checkpoints are untouched.
        """
        partial, final = self.partial_checkpoint_path(step), self.checkpoint_path(step)
        old = self.folder / f"{_OLD}{final.name}"
        try:
            names = sorted(file.relative_to(partial).as_posix() for file in partial.rglob("*") if file.is_file())
            with ThreadPoolExecutor(_THREADS) as pool:
                entries = list(pool.map(lambda name: self._sealed.get(partial / name) or _seal(partial / name), names))
            for folder in [*(folder for folder in partial.rglob("*") if folder.is_dir()), partial]:
                sync_folder(folder)
            manifest = {
                "step": step,
                "incarnation": incarnation,
                "time": utc_now(),
                "files": dict(zip(names, entries, strict=True)),
            }
            write_json(partial / VERIFIED, {"time": manifest["time"]})
            if latest:
                (partial / _FOLLOWS).write_text(json.dumps(self.latest_pointer()))
            write_json(partial / MANIFEST, manifest)
            if final.exists():
                final.rename(old)
            partial.rename(final)
            sync_folder(self.folder)
            if latest:
                self._move_latest(final)
            shutil.rmtree(old, ignore_errors=True)
        except OSError as error:
            raise write_failure(partial, error) from error
        return final

    @contextmanager
    def checkpoint_writer(self, step: int, incarnation: int = 0, *, latest: bool = True) -> Iterator[Path]:
        """A save by one process: yields the folder to write into, publishes it at the end, removes it on any error."""
        partial = self.begin_checkpoint(step)
        try:
            yield partial
            self.publish_checkpoint(step, incarnation, latest=latest)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if is_disk_full(error) and not isinstance(error, RunError):
                raise write_failure(partial, error) from error
            raise

    def repair_checkpoints(self) -> None:
        """Finishes or removes what a killed save or prune left. Only for the process that holds the run's lock."""
        if not self.folder.is_dir():
            return
        for entry in list(self.folder.iterdir()):
            if entry.name.startswith(_OLD):  # killed between the two renames of a replacement, or just after them
                final = self.folder / entry.name.removeprefix(_OLD)
                if not final.exists():
                    entry.rename(final)
                    continue
            if entry.name.startswith((_PARTIAL, _TRASH, _OLD)):
                shutil.rmtree(entry, ignore_errors=True)
            elif (entry / _FOLLOWS).exists():  # killed before `latest` moved
                self._move_latest(entry)

    def _move_latest(self, final: Path) -> None:
        """Makes `latest` name a checkpoint just published, unless somebody has moved it since."""
        follows = final / _FOLLOWS
        if _read_or_none(follows) == self.latest_pointer():
            atomic_write(self.folder / LATEST, latest_text(final.name))
        follows.unlink()

    def checkpoint_steps(self) -> list[int]:
        """Steps, ascending, that there is a checkpoint of, whole or damaged."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for entry in self.folder.iterdir() if (match := _NAME.fullmatch(entry.name)))

    def complete_checkpoints(self) -> list[int]:
        """Steps, ascending, whose checkpoint has its manifest and every file in full size; hashes are not looked at."""
        return [step for step in self.checkpoint_steps() if self.fault(step, hashes=False) is None]

    def latest(self) -> int | None:
        """Step of the checkpoint to continue from, by name and size alone; None when there is none."""
        return next(iter(self._candidates()), None)

    def latest_checkpoint(
        self, verify: bool = True, *, share: tuple[int, int] = (0, 1), agree: Agree | None = None
    ) -> CheckpointFound | None:
        """The newest checkpoint whose hashes are right; None when no save was ever finished.

        Damaged ones are passed over and named in the answer. RunError when there are some and every one is damaged.
        Of several ranks, `share` (rank, ranks), each hashes some of the files, and `agree` tells them of each other.
        """
        passed_over: list[str] = []
        for step in self._candidates(complete=False):
            fault = self.check(step, share, agree) if verify else self.fault(step, hashes=False)
            if fault is None:
                return CheckpointFound(step, self.checkpoint_path(step), tuple(passed_over))
            passed_over.append(fault)
        if passed_over:
            raise RunError(
                f"no checkpoint is whole: {passed_over[0]}; restore {self.folder} from a copy, or start a new run"
            )
        return None

    def verify(self, step: int, *, share: tuple[int, int] = (0, 1), agree: Agree | None = None) -> None:
        """Checks every file of a checkpoint against its hash; several ranks do so as in `latest_checkpoint`.

        RunError names the damaged file and the checkpoint to fall back on; UsageError when there is none of that step.
        """
        if not self.checkpoint_path(step).is_dir():
            known = ", ".join(map(str, self.complete_checkpoints())) or "none"
            raise UsageError(f"{self.path}: has no checkpoint of step {step}; complete ones: {known}")
        if fault := self.check(step, share, agree):
            others = (other for other in self._candidates() if other != step)
            good = next((other for other in others if self.check(other, share, agree) is None), None)
            way_out = (
                "no other checkpoint is good" if good is None else f"the newest other good checkpoint is step {good}"
            )
            raise RunError(f"{fault}; {way_out}")

    def kept(
        self, rule: Keep, held_out: Mapping[int, float] | None = None, needed: Mapping[int, str] | None = None
    ) -> dict[int, str]:
        """Checkpoints that stay by a rule, and why; empty when not one is good, and then all of them stay.

        Whatever the rule, the newest stays that was not found damaged since it was hashed. Where that is not known they
        are verified now, newest first.
        """
        candidates = self._candidates()
        good = next((step for step in candidates if (self.checkpoint_path(step) / VERIFIED).exists()), None)
        if good is None:
            good = next((step for step in candidates if self.check(step) is None), None)
        if good is None:
            return {}
        sizes = {step: self.checkpoint_bytes(step) for step in self.complete_checkpoints()}
        newest = "newest that is good" if good != candidates[0] else "newest 1"
        return rule.reasons(sizes, candidates, held_out or {}, {**(needed or {}), good: newest})

    def prune(
        self, rule: Keep | int, held_out: Mapping[int, float] | None = None, needed: Mapping[int, str] | None = None
    ) -> list[int]:
        """Deletes the complete checkpoints that do not stay (`kept`) and returns their steps.

        A number is a rule that keeps so many of the newest.
        """
        kept = self.kept(Keep(newest=rule) if isinstance(rule, int) else rule, held_out, needed)
        doomed = sorted(set(self.complete_checkpoints()) - set(kept)) if kept else []
        for step in doomed:
            path = self.checkpoint_path(step)
            trash = self.folder / f"{_TRASH}{path.name}"
            path.rename(trash)  # so that a half-deleted checkpoint never carries the name of a whole one
            shutil.rmtree(trash, ignore_errors=True)
        return doomed

    def checkpoint_bytes(self, step: int) -> int:
        """Size of a complete checkpoint, by its manifest."""
        return sum(entry["bytes"] for entry in self.manifest(step)["files"].values())

    def manifest(self, step: int) -> dict[str, Any]:
        """What a checkpoint says of itself: step, incarnation, time, and bytes and sha256 by file. RunError when it is
        damaged."""
        path = self.checkpoint_path(step) / MANIFEST
        try:
            content = read_json(path)
        except (OSError, RunError, RecursionError) as error:
            raise RunError(f"{path}: {_NOT_COMPLETE}") from error
        return checked_manifest(content, str(path))

    def _candidates(self, complete: bool = True) -> list[int]:
        """Steps to continue from, best first: the latest and those before it; later ones were left by a rollback."""
        steps = self.complete_checkpoints() if complete else self.checkpoint_steps()
        pointer = self.latest_pointer()
        return sorted((step for step in steps if pointer is None or step <= pointer), reverse=True)

    def latest_pointer(self) -> int | None:
        """The step that `latest` names, whether or not that checkpoint is there; None where it is damaged."""
        with suppress(OSError):
            return latest_step((self.folder / LATEST).read_bytes())
        return None

    def verified(self, step: int) -> str | None:
        """When the hashes of a checkpoint were last right, since it was last found damaged; None for never."""
        note = _read_or_none(self.checkpoint_path(step) / VERIFIED)
        return str(note.get("time")) if isinstance(note, dict) else None

    def check(self, step: int, share: tuple[int, int] = (0, 1), agree: Agree | None = None) -> str | None:
        """What is wrong with a checkpoint, None and a note beside it when its hashes are right."""
        fault = self.fault(step, hashes=True, share=share)
        if agree is not None:
            fault = agree(fault)
        if share[0] != 0:
            return fault
        if fault is None:
            with suppress(RunError):  # a run on a read-only disk can be verified too
                write_json(self.checkpoint_path(step) / VERIFIED, {"time": utc_now()})
        else:
            with suppress(OSError):
                (self.checkpoint_path(step) / VERIFIED).unlink()
        return fault

    def fault(self, step: int, hashes: bool, share: tuple[int, int] = (0, 1)) -> str | None:
        """What is wrong with a checkpoint, as one line that begins with the damaged file."""
        path = self.checkpoint_path(step)
        try:
            files: dict[str, dict[str, Any]] = self.manifest(step)["files"]
        except RunError as error:
            return str(error)
        for name, entry in files.items():
            try:
                found = (path / name).stat()
            except OSError as error:
                return f"{path / name}: cannot be read ({error.strerror})"
            if not stat.S_ISREG(found.st_mode):
                return f"{path / name}: is not a file"
            if found.st_size != entry["bytes"]:
                return f"{path / name}: has {found.st_size} bytes where its manifest says {entry['bytes']}"
        if hashes:
            largest_first = sorted(files, key=lambda name: (-files[name]["bytes"], name))
            with ThreadPoolExecutor(_THREADS) as pool:
                faults = pool.map(
                    lambda name: _hash_fault(path / name, files[name]["sha256"]), largest_first[share[0] :: share[1]]
                )
                return next(filter(None, faults), None)
        return None


def _size(folder: Path) -> int:
    """Bytes in the files of a folder that others are writing into."""
    size = 0
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):  # renamed meanwhile
            size += entry.stat().st_size
    return size


def latest_text(name: str) -> str:
    """The content of `latest` for the checkpoint with the folder `name`."""
    return f"{name}\nsha256 {_sum(name)} of the line above: delete this one if you change it\n"


def latest_step(content: bytes) -> int | None:
    """The step that the content of `latest` names; None where it is damaged. A single line, as people write who roll a
    run back, has no checksum and is believed."""
    name, _, check = content.decode("utf-8", "replace").partition("\n")
    match = _NAMED.fullmatch(name := name.strip())
    if match is None or (check and not check.startswith(f"sha256 {_sum(name)} ")):
        return None
    return int(match[1])


def _sum(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def _read_or_none(path: Path) -> Any:
    """A JSON file that another process may not have written yet."""
    with suppress(RunError, OSError):
        return read_json(path)
    return None


def checked_manifest(content: Any, origin: str) -> dict[str, Any]:
    """The content of a manifest, if it is one and names only files of its own folder. RunError names `origin`."""
    try:
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RunError(f"{origin}: {_NOT_COMPLETE}") from error
    for name, (size, sha256) in files.items():
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts or not name.isprintable():
            raise RunError(f"{origin}: names {name!r}, which is not a file of its folder")
        if size < 0 or len(sha256) != 64:
            raise RunError(f"{origin}: {_NOT_COMPLETE}")
    return content


def _seal(path: Path) -> dict[str, Any]:
    """Flushes a file to the disk; its entry in the manifest."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _hash_fault(path: Path, sha256: str) -> str | None:
    try:
        with open(path, "rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return f"{path}: cannot be read ({error.strerror})"
    return None if actual == sha256 else f"{path}: is damaged (its sha256 is not the manifest's)"
