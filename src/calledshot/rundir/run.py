"""One run's folder, append-only logs with one writer each, records replaced whole, checkpoints."""

from __future__ import annotations

import fcntl
import os
import secrets
import shlex
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, Self

from calledshot.recipe.errors import UsageError
from calledshot.rundir.checkpoints import Checkpoints
from calledshot.rundir.files import (
    JsonLines,
    atomic_write,
    parse_time,
    read_json,
    read_jsonl,
    stream_jsonl,
    tail_jsonl,
    to_json,
    utc_now,
    write_failure,
    write_json,
)
from calledshot.rundir.lock import RunLock, is_locked
from calledshot.rundir.merge import merge, standing, starts
from calledshot.rundir.retention import Keep, held_out_by_step, uses

State = Literal["running", "done", "failed", "interrupted"]
Log = Literal["metrics", "validation", "events", "samples", "skips", "supervisor"]
Document = Literal["probes", "lineage", "data", "summary"]

HEARTBEAT_SECONDS = 120.0
"""How old a heartbeat may be that stands for a lock which cannot be seen from here."""
_FORMAT = 1
_BY_INCARNATION = ("metrics", "validation", "events", "samples")


class RunDirectory(Checkpoints):
    """A run on disk. Anyone may read it at any time; who writes holds `lock()`, except for labels and evaluations."""

    def __init__(self, path: Path) -> None:
        """Use `create` or `open`."""
        super().__init__(path)
        self._writers: dict[str, JsonLines] = {}
        self._incarnation = 0
        self._status: dict[str, Any] | None = None

    def __repr__(self) -> str:
        return f"RunDirectory({str(self.path)!r})"

    @classmethod
    def create(
        cls,
        path: Path | str,
        *,
        recipe_toml: str,
        identity: str,
        lineage: Mapping[str, Any] | None = None,
        files: Sequence[Path] = (),
    ) -> Self:
        """Makes a new run, whole or not at all: `recipe.toml`, `run.json` (format, identity, when it was created), a
        fork's `lineage.json`, and copies of `files`, the user's own code.

        UsageError when `path` exists and is not an empty folder. `identity` is what `recipe.identity` gives.
        """
        path = Path(path)
        # Under a hidden name, so that a kill halfway leaves nothing that looks like a run.
        draft = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
        try:
            draft.mkdir(parents=True)
            atomic_write(draft / "recipe.toml", recipe_toml)
            write_json(draft / "run.json", {"format": _FORMAT, "identity": identity, "created": utc_now()})
            if lineage is not None:
                write_json(draft / "lineage.json", lineage)
            for file in files:
                shutil.copy2(file, draft)
            try:
                draft.rename(path)
            except OSError as error:
                if not path.exists():
                    raise
                what = "is a run already: resume it" if is_run(path) else "exists and is not a run: move it away"
                raise UsageError(f"{path}: {what}, or choose another name") from error
        except OSError as error:
            raise write_failure(path, error) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return cls(path)

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """An existing run, of this trainer or of one that writes through the shim. UsageError when `path` is none."""
        path = Path(path)
        if not is_run(path):
            what = "is not a run (no recipe.toml or status.json in it)" if path.exists() else "does not exist"
            raise UsageError(f"{path}: {what}; `shot runs` lists the runs of this lab")
        return cls(path)

    @property
    def name(self) -> str:
        return self.path.absolute().name

    @property
    def identity(self) -> str:
        """Hash of what was asked for; empty for a run of another trainer."""
        return str((read_json(self.path / "run.json") or {}).get("identity", ""))

    def recipe_toml(self) -> str:
        """The resolved recipe; empty for a run of another trainer."""
        with suppress(FileNotFoundError):
            return (self.path / "recipe.toml").read_text(encoding="utf-8")
        return ""

    # Writing: the lock, incarnations, state

    def lock(self) -> RunLock:
        """Exclusive use for writing, until released or the process ends; RunError names the process that has it.

        Also clears away what a killed writer left.
        """
        lock = RunLock(self.path / ".lock")
        try:
            self.repair_checkpoints()
        except OSError as error:
            lock.release()
            raise write_failure(self.folder, error) from error
        for leftover in [*self.path.glob(".*.tmp"), *self.path.glob("*/.*.tmp")]:
            with suppress(OSError):  # young ones may be another process's labels on their way
                if time.time() - leftover.stat().st_mtime > HEARTBEAT_SECONDS:
                    leftover.unlink()
        return lock

    @property
    def incarnation(self) -> int:
        """Number of the incarnation begun here, else of the last one on disk; 0 before the first."""
        if self._incarnation:
            return self._incarnation
        numbers = [
            int(folder.name) for folder in (self.path / "incarnations").glob("[0-9]*") if folder.name.isdecimal()
        ]
        return max(numbers, default=0)

    def incarnation_path(self, incarnation: int | None = None) -> Path:
        """Folder of an incarnation (the present one): environment.json, command, code.diff, logs/, ranks/."""
        return self.path / "incarnations" / f"{self.incarnation if incarnation is None else incarnation:04d}"

    def begin_incarnation(self, environment: Mapping[str, Any], command: Sequence[str], code_diff: str = "") -> int:
        """Opens the next incarnation, sets the state to running and returns the incarnation's number, from 1."""
        self.close()
        self._incarnation = self.incarnation + 1
        folder = self.incarnation_path()
        try:
            (folder / "logs").mkdir(parents=True)
            (folder / "ranks").mkdir()
        except OSError as error:
            raise write_failure(folder, error) from error
        write_json(folder / "environment.json", environment)
        atomic_write(folder / "command", shlex.join(command) + "\n")
        atomic_write(folder / "code.diff", code_diff)
        self.set_status(state="running", incarnation=self._incarnation)
        return self._incarnation

    def set_status(
        self, *, state: State, step: int | None = None, tokens: int | None = None, message: str = "", **fields: Any
    ) -> None:
        """Replaces status.json whole, with a fresh heartbeat; step, tokens and other fields stay unless given anew."""
        before = self.status() if self._status is None else self._status
        given = {"step": step, "tokens": tokens}
        self._status = {
            **before,
            **{key: value for key, value in given.items() if value is not None},
            **fields,
            "state": state,
            "message": message,
            "heartbeat": utc_now(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
        }
        write_json(self.path / "status.json", self._status)

    def status(self) -> dict[str, Any]:
        """status.json as it was written, {} before the first; ask `state` for what is true now."""
        status = read_json(self.path / "status.json")
        return status if isinstance(status, dict) else {}

    def state(self) -> State:
        """What is true now. A status of `running` that nobody stands behind any more is `interrupted`.

        The lock decides; where it cannot be seen (another host on a shared disk, a trainer without locks), a fresh
        heartbeat does.
        """
        status = self.status()
        locked = is_locked(self.path / ".lock")
        if status.get("state") in ("done", "failed", "interrupted"):
            return status["state"]
        if locked:
            return "running"
        elsewhere = locked is None or status.get("host") != socket.gethostname()
        fresh = time.time() - parse_time(status.get("heartbeat")) < HEARTBEAT_SECONDS
        return "running" if elsewhere and fresh else "interrupted"

    # Logs

    def writer(self, log: Log) -> JsonLines:
        """The append-only log `LOG.jsonl`, opened once; the trainer's logs carry the incarnation in every row."""
        if log not in self._writers:
            stamp = {"incarnation": self.incarnation} if log in _BY_INCARNATION else {}
            self._writers[log] = JsonLines(self.path / f"{log}.jsonl", stamp)
        return self._writers[log]

    def rank_writer(self, rank: int) -> JsonLines:
        """`incarnations/N/ranks/RANK.jsonl` of the present incarnation, for step times; every rank has its own."""
        return JsonLines(self.incarnation_path() / "ranks" / f"{rank}.jsonl")

    def rows(self, log: Log) -> list[dict[str, Any]]:
        """All rows of a log as they were written, every incarnation's."""
        return list(self.stream(log))

    def stream(self, log: Log) -> Iterator[dict[str, Any]]:
        """What `rows` gives, one at a time: a long run's metrics do not fit into memory as dictionaries."""
        return stream_jsonl(self.path / f"{log}.jsonl")

    def tail(self, log: Log) -> list[dict[str, Any]]:
        """The newest rows of a log, some hundred of them, whatever its length."""
        return tail_jsonl(self.path / f"{log}.jsonl")

    def metrics(self) -> list[dict[str, Any]]:
        """One row a step, sorted: incarnations merged as `merge` says."""
        return merge(self.rows("metrics"))

    def standing_rows(self, log: Literal["validation", "samples"]) -> list[dict[str, Any]]:
        """Rows of a log without those that a later incarnation went back behind, sorted by step."""
        rows = self.rows(log)
        first = starts(self.stream("metrics"))
        for incarnation, step in starts(rows).items():
            first[incarnation] = min(step, first.get(incarnation, step))
        return standing(rows, first)

    def publish_checkpoint(self, step: int, incarnation: int | None = None, *, latest: bool = True) -> Path:
        """As `Checkpoints.publish_checkpoint`; the logs up to it are made to survive a power cut first."""
        for writer in list(self._writers.values()):  # the trainer may open another one meanwhile
            writer.sync()
        return super().publish_checkpoint(step, self.incarnation if incarnation is None else incarnation, latest=latest)

    def checkpoints(self, rule: Keep) -> list[dict[str, Any]]:
        """What is known of each checkpoint, in the order of steps: step, bytes, time, incarnation, files, `latest`
        (whether it is to be continued from), bits_per_byte on held-out text, when it was verified, what is wrong with
        it by size, and why the rule keeps it. None where something is not known, or nothing is wrong or kept.
        """
        held_out, latest = held_out_by_step(self.rows("validation")), self.latest()
        kept = self.kept(rule, held_out, uses(self.path))
        found = []
        for step in self.checkpoint_steps():
            fault = self.fault(step, hashes=False)
            manifest = {} if fault else self.manifest(step)
            files = manifest.get("files", {})
            found.append(
                {
                    "step": step,
                    "bytes": sum(entry["bytes"] for entry in files.values()) if files else None,
                    "time": manifest.get("time"),
                    "incarnation": manifest.get("incarnation"),
                    "files": len(files) or None,
                    "latest": step == latest,
                    "bits_per_byte": held_out.get(step),
                    "verified": self.verified(step),
                    "fault": fault,
                    "kept": kept.get(step),
                }
            )
        return found

    def close(self) -> None:
        """Closes the logs; the next `writer` opens them again."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()

    # Records replaced whole

    def load(self, document: Document) -> dict[str, Any]:
        """probes.json, lineage.json, data.json or summary.json; {} where there is none."""
        return read_json(self.path / f"{document}.json") or {}

    def save(self, document: Document, content: Mapping[str, Any]) -> None:
        """Replaces such a record whole."""
        write_json(self.path / f"{document}.json", content)

    # Evaluations: one file each, one writer each, and no need of the lock

    def eval_writer(self, identifier: str) -> JsonLines:
        """`evals/ID.jsonl`, a row an item; `save_eval` says that it is finished."""
        return JsonLines(self.path / "evals" / f"{identifier}.jsonl")

    def save_eval(
        self, identifier: str, summary: Mapping[str, Any], rows: Iterable[Mapping[str, Any]] | None = None
    ) -> None:
        """Writes an evaluation's summary, `evals/ID.json`, whole; with `rows`, its `evals/ID.jsonl` too.

        An earlier one of that name is replaced. A kill leaves either of them, or rows without a summary, which are not
        finished: never the summary of the one beside rows of the other.
        """
        path = self.path / "evals" / f"{identifier}.json"
        path.parent.mkdir(exist_ok=True)
        if rows is not None:
            draft = path.with_name(f".{identifier}.jsonl.{secrets.token_hex(6)}.tmp")
            atomic_write(draft, "".join(f"{to_json(row)}\n" for row in rows))
            path.unlink(missing_ok=True)
            draft.rename(path.with_name(f"{identifier}.jsonl"))
        write_json(path, summary)

    def evals(self) -> dict[str, dict[str, Any]]:
        """Summaries of the finished evaluations by identifier."""
        return {file.stem: read_json(file) for file in sorted((self.path / "evals").glob("[!.]*.json"))}

    def eval_rows(self, identifier: str) -> list[dict[str, Any]]:
        """The items of an evaluation, finished or not."""
        return read_jsonl(self.path / "evals" / f"{identifier}.jsonl")

    # Labels: the user's

    def labels(self) -> dict[str, Any]:
        """`notes` (list of {time, text}), `tags` (sorted list of str), `archived` (bool), and what else it holds."""
        return {"notes": [], "tags": [], "archived": False, **(read_json(self.path / "labels.json") or {})}

    def note(self, text: str) -> None:
        """Adds a note."""
        with self._editing_labels() as labels:
            labels["notes"] = [*labels["notes"], {"time": utc_now(), "text": text}]

    def tag(self, *add: str, remove: Sequence[str] = ()) -> None:
        """Adds and removes tags."""
        with self._editing_labels() as labels:
            labels["tags"] = sorted({*labels["tags"], *add} - set(remove))

    def archive(self, archived: bool = True) -> None:
        """Archives the run, or brings it back."""
        with self._editing_labels() as labels:
            labels["archived"] = archived

    @contextmanager
    def _editing_labels(self) -> Iterator[dict[str, Any]]:
        try:
            descriptor = os.open(self.path / ".labels.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise write_failure(self.path / "labels.json", error) from error
        try:
            with suppress(OSError):  # without locks the last of two people wins
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            labels = self.labels()
            yield labels
            write_json(self.path / "labels.json", labels)
        finally:
            os.close(descriptor)


def is_run(path: Path) -> bool:
    """Whether a folder is a run directory."""
    return (path / "recipe.toml").is_file() or (path / "status.json").is_file()


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The merged metrics of the run at `path`, one row a step. UsageError when it is no run."""
    return RunDirectory.open(path).metrics()
