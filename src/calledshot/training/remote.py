"""The slow tier of checkpoints: a folder that is mounted, or any object store that fsspec knows.

`REMOTE/RUN/` holds `run.json` (whose run it is), `step-0001000/` as the run directory has it, and `latest`. A manifest
comes after the files that it lists, and `latest` after the manifest, so that a kill leaves what was there.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import fsspec

from calledshot.recipe import RunError, UsageError, schema
from calledshot.rundir import Keep, RunDirectory, held_out_by_step, uses
from calledshot.rundir.checkpoints import LATEST, MANIFEST, checked_manifest, latest_step, latest_text
from calledshot.rundir.files import to_json
from calledshot.training.tensorfiles import CHUNK_BYTES

ATTEMPTS = 8
FIRST_WAIT_SECONDS = 1.0
"""After the first failure of something; each further one doubles it."""
NICENESS = 10
T = TypeVar("T")
_NAME = re.compile(r"step-(\d+)")
_RUN = "run.json"


class Remote:
    """A run's checkpoints in the remote tier. Everything here may raise anything that a file system raises."""

    def __init__(self, run: RunDirectory, url: str) -> None:
        """UsageError when there is no such file system, or its package is missing."""
        self.run = run
        try:
            self.files, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise UsageError(
                f"checkpoint.remote = {url!r}: {error}; write a mounted path or a URL of fsspec's"
            ) from error
        self.root = f"{root.rstrip('/')}/{run.name}"

    def owner(self) -> str | None:
        """Identity of the run whose checkpoints these are; None before the first."""
        content = self._read(_RUN)
        return None if content is None else str(json.loads(content).get("identity"))

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints to go on from, newest first."""
        self.files.invalidate_cache()
        try:
            names = [str(path).rstrip("/").rpartition("/")[2] for path in self.files.ls(self.root, detail=False)]
        except FileNotFoundError:
            return []
        latest = latest_step(self._read(LATEST) or b"")
        steps = {int(match[1]) for name in names if (match := _NAME.fullmatch(name))}
        current = [step for step in steps if latest is None or step <= latest]
        return sorted((step for step in current if self.files.exists(self._path(step, MANIFEST))), reverse=True)

    def manifest(self, step: int) -> dict[str, Any] | None:
        """Of a checkpoint; None where there is none. RunError when it is damaged."""
        content = self._read(f"{self._folder(step)}/{MANIFEST}")
        if content is None:
            return None
        origin = self._path(step, MANIFEST)
        try:
            return checked_manifest(json.loads(content), origin)
        except (ValueError, RecursionError) as error:
            raise RunError(f"{origin}: is not JSON") from error

    def take_over(self) -> None:
        """Makes the place this run's. RunError when it is another's."""
        owner = self.owner()
        if owner is None:
            self.files.makedirs(self.root, exist_ok=True)
            self._write(_RUN, to_json({"identity": self.run.identity}).encode())
        elif owner != self.run.identity:
            raise RunError(f"{self.root}: holds checkpoints of another run; choose another checkpoint.remote or --name")

    def begin(self, step: int) -> list[str]:
        """Files to be uploaded, none when the checkpoint is there already; what else is there of that step no longer
        counts."""
        ours = self.run.manifest(step)
        with suppress(RunError):
            theirs = self.manifest(step)
            if theirs is not None and theirs["files"] == ours["files"]:
                return []
        if self.files.exists(self._path(step, MANIFEST)):
            self.files.rm_file(self._path(step, MANIFEST))
        self.files.makedirs(f"{self.root}/{self._folder(step)}", exist_ok=True)
        return [*ours["files"], MANIFEST]

    def put(self, step: int, name: str) -> None:
        """Uploads one file. RunError when it did not arrive whole."""
        source, target = self.run.checkpoint_path(step) / name, self._path(step, name)
        self.files.put_file(str(source), target)
        self.files.invalidate_cache()
        if (size := self.files.info(target)["size"]) != source.stat().st_size:
            raise RunError(f"{target}: {size} bytes arrived of {source.stat().st_size}")

    def finish(self, step: int) -> None:
        """Makes an uploaded checkpoint the latest."""
        self._write(LATEST, latest_text(self._folder(step)).encode())

    def prune(self, rule: Keep, held_out: dict[int, float], needed: dict[int, str]) -> list[int]:
        """Deletes what need not stay, but never the newest; the steps deleted."""
        steps = self.steps()
        sizes = {}
        for step in steps:
            with suppress(RunError):
                sizes[step] = sum(entry["bytes"] for entry in (self.manifest(step) or {"files": {}})["files"].values())
        whole = [step for step in steps if step in sizes]
        doomed = sorted(set(whole) - set(rule.reasons(sizes, whole, held_out, needed)))
        for step in doomed:
            self.files.rm_file(self._path(step, MANIFEST))
            self.files.rm(f"{self.root}/{self._folder(step)}", recursive=True)
        return doomed

    def fetch(self, step: int) -> int:
        """Brings a checkpoint into the run directory, hashed on the way; its bytes. RunError when it is damaged, and
        then nothing is left of it."""
        manifest = self.manifest(step)
        if manifest is None:
            raise RunError(f"{self._path(step, MANIFEST)}: is missing")
        with self.run.checkpoint_writer(step, int(manifest.get("incarnation") or 0)) as folder:
            for name, entry in manifest["files"].items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                sealed = self.run.write_checkpoint_file(step, name, self._parts(step, name, entry["bytes"]))
                if sealed != {"bytes": entry["bytes"], "sha256": entry["sha256"]}:
                    raise RunError(f"{self._path(step, name)}: is damaged (it is not what its manifest says)")
        return self.run.checkpoint_bytes(step)

    def _parts(self, step: int, name: str, size: int) -> Iterator[bytes]:
        """A file's bytes, and no more than there should be."""
        with self.files.open(self._path(step, name), "rb") as file:
            while size >= 0 and (part := file.read(min(CHUNK_BYTES, size + 1))):
                size -= len(part)
                yield part

    def _folder(self, step: int) -> str:
        return self.run.checkpoint_path(step).name

    def _path(self, step: int, name: str) -> str:
        return f"{self.root}/{self._folder(step)}/{name}"

    def _read(self, name: str) -> bytes | None:
        try:
            return self.files.cat_file(f"{self.root}/{name}")
        except FileNotFoundError:
            return None

    def _write(self, name: str, content: bytes) -> None:
        self.files.pipe_file(f"{self.root}/{name}", content)


class Uploads:
    """Copies published checkpoints to the remote tier in the background. Nothing here ever blocks or fails a step:
    what goes wrong is tried again, and becomes an event. Of several that wait, only the newest is uploaded."""

    def __init__(self, run: RunDirectory, settings: schema.Checkpoint) -> None:
        """UsageError when the remote tier cannot be used at all."""
        self.run, self.settings = run, settings
        self.remote = Remote(run, settings.remote)
        self._events = run.writer("events")
        self._changed = threading.Condition()
        self._waiting: int | None = None
        self._current: int | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._thread.start()

    def submit(self, step: int) -> None:
        """The next to be uploaded."""
        with self._changed:
            self._waiting = step
            self._changed.notify_all()

    def needed(self) -> dict[int, str]:
        """Steps whose files must stay until they are uploaded."""
        with self._changed:
            return {step: "being uploaded" for step in (self._current, self._waiting) if step is not None}

    def close(self, seconds: float) -> None:
        """Waits at most so long for what is being uploaded."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(seconds)
        for step in self.needed():
            self._events.append(
                {"kind": "upload_failed", "step": step, "message": f"not done within {seconds:g} seconds"}
            )

    def _work(self) -> None:
        if sys.platform == "linux":
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting is not None or self._closing)
                if self._waiting is None:
                    return
                self._current, self._waiting = self._waiting, None
            event: dict[str, Any] = {"step": self._current}
            try:
                event |= {"kind": "upload", **self._upload(self._current)}
            except Exception as error:  # file systems raise what they like
                event |= {"kind": "upload_failed", "message": f"{type(error).__name__}: {error}"}
            with self._changed:
                self._current = None
            with suppress(RunError):
                self._events.append(event)

    def _upload(self, step: int) -> dict[str, Any]:
        remote, started, failures = self.remote, time.perf_counter(), []
        again = partial(persist, failures=failures)
        again(remote.take_over)
        names = again(lambda: remote.begin(step))
        for name in names:
            again(partial(remote.put, step, name))
        again(lambda: remote.finish(step))
        size = self.run.checkpoint_bytes(step) if names else 0
        seconds = time.perf_counter() - started
        event: dict[str, Any] = {"bytes": size, "seconds": seconds, "failed_attempts": len(failures)}
        held_out = held_out_by_step(self.run.rows("validation")) if self.settings.keep_best else {}
        try:
            again(lambda: remote.prune(Keep.of(self.settings), held_out, uses(self.run.path)))
        except Exception as error:  # the next upload tries again
            event["message"] = f"old checkpoints are left there: {type(error).__name__}: {error}"
        return event


def persist(task: Callable[[], T], failures: list[Exception], final: tuple[type[Exception], ...] = ()) -> T:
    """Does something until it works, a few times, with growing pauses; `failures` gets what was raised before. Raises
    the last of it, and what is `final` at once."""
    for number in range(ATTEMPTS):
        try:
            return task()
        except Exception as error:  # file systems raise what they like
            failures.append(error)
            if number == ATTEMPTS - 1 or isinstance(error, final):
                raise
            time.sleep(FIRST_WAIT_SECONDS * 2**number)
    raise AssertionError


def fetch(run: RunDirectory, url: str, say: Callable[[str], None]) -> int | None:
    """Brings the remote tier's newest checkpoint into the run directory where that is newer than any whole one there;
    its step, else None, as where there is no remote tier (`url` empty). For rank 0, which holds the run's lock, before
    the run goes on.

    After a rollback (`latest` set back behind a checkpoint that this run directory knows of) the local tier decides.
    RunError when nothing whole is here and the remote tier cannot be asked, or is another run's.
    """
    if not url:
        return None
    remote, events = Remote(run, url), run.writer("events")
    here = None
    with suppress(RunError):  # every one damaged: whoever reads them next says so, unless there is one to be had
        here = run.latest_checkpoint()
    try:
        owner, steps = persist(lambda: (remote.owner(), remote.steps()), [])
    except Exception as error:
        fault = f"{remote.root}: cannot be read ({type(error).__name__}: {error})"
        if here is None:
            way_out = 'try again, or begin anew with checkpoint.remote=""'
            raise RunError(f"{fault}, and no whole checkpoint is here; {way_out}") from error
        say(f"warning: {fault}; the newest checkpoint of this disk is taken")
        return None
    if owner not in (None, run.identity):
        raise RunError(f"{remote.root}: holds checkpoints of another run; choose another checkpoint.remote or --name")
    known = {row.get("step") for row in run.rows("events") if row.get("kind") == "checkpoint"}
    pointer = run.latest_pointer()
    for step in steps:
        if here is not None and step <= here.step:
            return None
        if pointer is not None and step > pointer and step in known:
            continue
        start = time.perf_counter()
        try:
            size = persist(partial(remote.fetch, step), [], final=(RunError,))
        except Exception as error:
            message = str(error) if isinstance(error, RunError) else f"{type(error).__name__}: {error}"
            say(f"warning: {message}; an older checkpoint is taken")
            events.append({"kind": "damaged_checkpoint", "message": message, "step": step})
            continue
        seconds = time.perf_counter() - start
        say(f"step {step}: fetched from {remote.root} ({size:,} bytes in {seconds:.1f} s)")
        events.append({"kind": "fetched_checkpoint", "step": step, "bytes": size, "seconds": seconds})
        return step
    return None
