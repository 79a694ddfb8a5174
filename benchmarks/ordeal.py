"""One run, started again and again, and what is done to it meanwhile.

Beside the code that it tests, this reads manifests, hashes and logs by itself.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
import secrets
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from processes import PATIENCE_SECONDS, curve, held_out

from calledshot.rundir import RunDirectory
from job import STEPS, Disk, Job, Layout, die_after, in_turn, limit_files, read_rows

TOLERANCE = 1e-3
"""Of losses and weights, relative, where the layout changes on the way."""

ASYNCHRONOUS = 0.8
"""Share of the starts that save in the background."""

ONE, ALL, TERM, STOP = "SIGKILL, one rank", "SIGKILL", "SIGTERM", "SIGSTOP, then SIGKILL"
SAVE, STARTING, RESTORING, SAVING, PRUNING = (
    f"SIGKILL {when}"
    for when in ("in a save", "in a start", "in a restore", "between two files of a save", "in a prune")
)
DISK, TRUNCATED, FLIPPED, TORN = "disk full", "file truncated", "bit flipped", "log line half written"
KINDS = (
    ONE, ALL, ALL, TERM, STOP, SAVE, SAVE, STARTING, RESTORING, SAVING, SAVING, PRUNING, DISK, DISK, TRUNCATED,
    TRUNCATED, FLIPPED, FLIPPED, TORN,
)  # fmt: skip
"""As often as they are to happen."""
MARKS = {STARTING: "runs/", RESTORING: "checkpoints/step-", SAVING: ".partial-", PRUNING: ".trash-"}
"""Part of the path with which a phase begins in which a rank is to die."""
TOUCHES = {STARTING: 60, RESTORING: 20, SAVING: 30, PRUNING: 12}
"""Uses of files in such a phase, about."""


@dataclass
class Event:
    """Something done to a run."""

    kind: str
    layout: str
    detail: str = ""
    reached: int | None = None
    """The last step that was made before, since the start."""
    resumed: bool = False
    repeated: int = 0
    """Steps made again."""
    seconds: float | None = None
    """From the next start to its first step, where it got so far."""
    ending: float = 0.0
    """Seconds until the last rank had ended."""
    outlasted: int = 0


@dataclass
class Report:
    """What was done, and what went wrong."""

    events: list[Event] = field(default_factory=list)
    failures: list[tuple[Event | None, str]] = field(default_factory=list)
    """What the tests say, and after which event."""
    done: Counter[str] = field(default_factory=Counter)
    """Runs that came to their end, by series."""
    unrecoverable: int = 0
    """Runs that did not go on."""
    lost: int = 0
    """Steps made again that a whole checkpoint had."""
    starts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """By series and layout."""
    changes: int = 0
    """Starts with another layout than the one before."""
    largest: dict[str, tuple[float, float]] = field(default_factory=dict)
    """The largest relative difference of a loss, and that of the weights, by series."""


class Deck:
    """What is done next: every kind as often as it was asked for, in any order."""

    def __init__(self, chance: random.Random, kinds: Sequence[str] = KINDS) -> None:
        self.chance, self.kinds = chance, kinds
        self._cards: list[str] = []
        self._files: Counter[str] = Counter()

    def draw(self, layout: Layout, floor: int) -> Event:
        """The next that makes sense with a layout, and with a checkpoint of step `floor`."""
        while True:
            for card in self._cards:
                if (card != ONE or layout.ranks > 1) and (card != RESTORING or floor):
                    self._cards.remove(card)
                    return Event(card, layout.name)
            self._cards += self.chance.sample(self.kinds, len(self.kinds))

    def back(self, event: Event) -> None:
        """Takes one back that did not come to pass."""
        self._cards.insert(self.chance.randint(0, len(self._cards)), event.kind)

    def file(self, files: Sequence[Path]) -> Path:
        """One of those that were chosen least often."""
        rarest = min(self._files[what_of(file.name)] for file in files)
        chosen = self.chance.choice([file for file in files if self._files[what_of(file.name)] == rarest])
        self._files[what_of(chosen.name)] += 1
        return chosen


def what_of(name: str) -> str:
    """A checkpoint's file, whichever rank wrote it: `model-00001-of-00002.safetensors` is a `model.safetensors`."""
    return re.sub(r"-\d+-of-\d+", "", name)


class Ordeal:
    """One run, tormented until it is done."""

    def __init__(
        self,
        lab: Path,
        disk: Disk,
        series: str,
        layouts: Sequence[Layout],
        deck: Deck,
        report: Report,
        sabotage: Callable[[], None] | None = None,
    ) -> None:
        self.lab, self.disk, self.series, self.layouts = lab, disk, series, layouts
        self.deck, self.chance, self.report, self.sabotage = deck, deck.chance, report, sabotage
        self.name = f"run-{secrets.token_hex(4)}"
        self.run = RunDirectory(lab / "runs" / self.name)
        self.pending: list[Event] = []
        """Events that no start has come through yet."""
        self.floor = 0
        """Step of the newest whole checkpoint when the last event was over."""
        self.named = 0
        """What `latest` was moved to between a start and its event."""

    def go(self, most: int) -> bool:
        """Torments the run up to so many times, then lets it end; False when it does not go on."""
        before, layout = len(self.report.events), None
        while self.state() != "done":
            layout, last = self.chance.choice(self.layouts), layout
            self.report.starts[self.series, layout.name] += 1
            self.report.changes += last not in (None, layout)
            more = len(self.report.events) - before < most
            if not self.start(layout, self.deck.draw(layout, self.floor) if more else None):
                self.report.unrecoverable += 1
                return False
        self.report.done[self.series] += 1
        return True

    def state(self) -> str:
        """What the status file says."""
        try:
            return json.loads((self.run.path / "status.json").read_bytes())["state"]
        except FileNotFoundError:
            return ""

    def fail(self, event: Event | None, what: str) -> None:
        """Notes a failure."""
        self.report.failures.append((event, f"{self.series}, {self.name}: {what}"))

    def saved(self) -> list[Path]:
        """The folders of checkpoints, whole or not."""
        return sorted(self.run.folder.glob("step-*"))

    def newest_whole(self) -> int:
        """Step of the newest checkpoint that can be relied on."""
        return next((int(each.name[5:]) for each in reversed(self.saved()) if is_whole(each)), 0)

    def latest(self) -> bytes:
        """The content of `latest`."""
        try:
            return (self.run.folder / "latest").read_bytes()
        except FileNotFoundError:
            return b""

    def start(self, layout: Layout, event: Event | None) -> bool:
        """One start, and the event that ends it, if it comes to that; False when the run does not go on."""
        tasks = [task for task in (self.sabotage, self.prepared(event, layout.ranks)) if task is not None]
        saves = () if self.chance.random() < ASYNCHRONOUS else ("checkpoint.asynchronous=false",)
        job = Job(self.lab, self.name, layout, functools.partial(in_turn, *tasks) if tasks else None, saves)
        struck = False
        try:
            struck = event is not None and self.strike(event, job)
            hit = time.monotonic()
            codes, said = job.end()
        except TimeoutError:
            job.signal(signal.SIGKILL, job.ranks)
            self.fail(event, f"neither goes on nor ends within {PATIENCE_SECONDS:g} s: {job.end()[1]}")
            return False
        finally:
            self.disk.clear()
        if any("Traceback" in one for one in said):
            self.fail(event, f"a traceback: {said}")
        self.came_up(job, said[0])
        if struck and self.state() != "done":
            assert event is not None
            event.ending, event.outlasted = time.monotonic() - hit, job.outlasted
            self.over(event, codes, said, job)
            return True
        if event is not None:
            self.deck.back(event)
        if not struck and any(codes):
            self.fail(self.pending[-1] if self.pending else None, f"does not go on: {codes} {said}")
            return False
        return True

    # The event

    def prepared(self, event: Event | None, ranks: int) -> Callable[[], None] | None:
        """What an event needs to be done in the processes."""
        if event is not None and event.kind in MARKS:
            number, victim = self.chance.randint(1, TOUCHES[event.kind]), self.chance.randrange(ranks)
            if event.kind == PRUNING:
                victim = 0
            event.detail = f"file {number}, rank {victim}"
            return functools.partial(die_after, MARKS[event.kind], number, victim)
        if event is not None and event.kind == DISK and not self.disk.mounted:
            size = int(10 ** self.chance.uniform(3, 6))
            event.detail = f"files of at most {size} bytes"
            return functools.partial(limit_files, size)
        return None

    def strike(self, event: Event, job: Job) -> bool:
        """Waits for the moment and does what is to be done; False when a rank ended before."""
        chance, latest = self.chance, self.latest()
        if event.kind in MARKS:
            return job.wait_for(lambda: any(rank.process.exitcode == -signal.SIGKILL for rank in job.ranks))
        steps = chance.randint(1, 8)
        if event.kind == DISK:
            if self.disk.mounted:
                free = int(chance.uniform(0, 1.2) * self.saved_bytes())
                event.detail = f"{free} bytes left"
                if chance.random() < 0.7 and not job.wait_for(lambda: len(job.rows()) >= steps):
                    return False
                self.disk.fill(free)
            job.wait_for(lambda: not all(rank.alive for rank in job.ranks))
            return True
        damages = event.kind in (TRUNCATED, FLIPPED)
        if not job.wait_for(lambda: len(job.rows()) >= steps and (not damages or len(self.saved()) > 1)):
            return False
        if event.kind == SAVE:
            if not job.wait_for(lambda: any(self.run.folder.glob(".partial-*"))):
                return False
            time.sleep(chance.choice((0.0, chance.uniform(0.0, 0.02))))
        else:
            time.sleep(chance.uniform(0.0, 0.02))
        everyone = event.kind in (ALL, TORN, TRUNCATED, FLIPPED) or (event.kind != ONE and chance.random() < 0.5)
        ranks = job.ranks if everyone else [chance.choice(job.ranks)]
        event.detail = f"{len(ranks)} of {len(job.ranks)} ranks after {steps} steps"
        if (moved := self.latest()) != latest:
            self.named = int(moved.split()[0].removeprefix(b"step-"))
        if event.kind == STOP:
            job.signal(signal.SIGSTOP, ranks)
            time.sleep(chance.uniform(0.02, 0.3))
        job.signal(signal.SIGTERM if event.kind == TERM else signal.SIGKILL, ranks)
        return True

    def saved_bytes(self) -> int:
        """Of a checkpoint of this run; about, before there is one."""
        sizes = [sum(file.stat().st_size for file in each.iterdir()) for each in self.saved()]
        return max(sizes, default=1_500_000)

    def over(self, event: Event, codes: list[int], said: list[str], job: Job) -> None:
        """Looks at what an event left, and damages it further where that is the event."""
        rows, whole = job.rows(), self.newest_whole()
        event.reached = rows[-1]["step"] if rows else None
        if event.kind == TERM:
            if set(codes) != {143} or self.state() != "interrupted":
                self.fail(event, f"SIGTERM did not end it in order: {codes} {self.state()} {said}")
            if whole != event.reached:
                self.fail(event, f"after SIGTERM it made step {event.reached} and has saved step {whole}")
        if event.kind == DISK and not any("the disk is full" in one or "cannot be written" in one for one in said):
            self.fail(event, f"does not say that the disk is full: {codes} {said}")
        if whole < max(self.floor, self.named):
            self.fail(event, f"had step {max(self.floor, self.named)} saved, and now {whole} is the newest whole one")
        if event.kind in (TRUNCATED, FLIPPED):
            self.damage(event)
        elif event.kind == TORN:
            self.tear(event)
        self.named, self.floor = 0, self.newest_whole()
        self.pending.append(event)
        self.report.events.append(event)

    def damage(self, event: Event) -> None:
        """Cuts off a file of the newest whole checkpoint, or flips a bit in it; never of the only one."""
        whole = [each for each in self.saved() if is_whole(each)]
        if len(whole) < 2:
            event.kind = ALL
            return
        file = self.deck.file([*sorted(whole[-1].iterdir()), self.run.folder / "latest"])
        content = bytearray(file.read_bytes())
        place = self.chance.randrange(len(content))
        if event.kind == TRUNCATED:
            del content[place:]
        else:
            content[place] ^= 1 << self.chance.randrange(8)
        file.write_bytes(content)
        event.detail = f"{file.name}, byte {place}"

    def tear(self, event: Event) -> None:
        """Appends half of the next row to a log."""
        log = self.chance.choice(("metrics", "metrics", "events", "validation"))
        path = self.run.path / f"{log}.jsonl"
        rows = read_rows(path) or [{}]
        line = json.dumps({**rows[-1], "step": rows[-1].get("step", 0) + 1}).encode()
        with open(path, "ab") as file:
            file.write(line[: self.chance.randrange(1, len(line) - 1)])
        event.detail = path.name

    # Whether it goes on

    def came_up(self, job: Job, said: str) -> None:
        """Where a start began, if it got so far; the events before it are settled then."""
        if " parameters (" not in said:
            return
        found = re.search(r"going on from step (\d+)", said)
        start, last = int(found[1]) if found else 0, self.pending[-1] if self.pending else None
        if start != self.floor:
            self.report.lost += max(0, self.floor - start)
            self.fail(last, f"begins at step {start}, and {self.floor} is whole: {said.splitlines()[:3]}")
        rows = job.rows()
        steps = [row["step"] for row in rows]
        if steps != list(range(start + 1, start + 1 + len(steps))) or len({row["incarnation"] for row in rows}) > 1:
            self.fail(last, f"began at step {start}, and has rows of the steps {steps}")
        for event in self.pending:
            event.resumed = True
            event.repeated = max(0, (event.reached or 0) - start)
        if last is not None:
            last.seconds = job.first_row
        self.pending = []

    def compare(self, reference: RunDirectory) -> None:
        """Whether the finished run is the one that was left alone."""
        runs = (self.run, reference)
        if (steps := [row["step"] for row in self.run.metrics()]) != list(range(1, STEPS + 1)):
            self.fail(None, f"its metrics are of the steps {steps}")
            return
        if self.newest_whole() != STEPS:
            self.fail(None, f"its newest whole checkpoint is of step {self.newest_whole()}")
            return
        measured = [[(row["step"], row["source"]) for row in run.standing_rows("validation")] for run in runs]
        if measured[0] != measured[1]:
            self.fail(None, f"its held-out losses are of {measured[0]}")
        losses = [[row["loss"] for row in run.metrics()] for run in runs]
        loss = max(abs(ours - theirs) / abs(theirs) for ours, theirs in zip(*losses, strict=True))
        folders = [run.checkpoint_path(STEPS) for run in runs]
        weights = distance(*folders)
        before = self.report.largest.get(self.series, (0.0, 0.0))
        self.report.largest[self.series] = (max(loss, before[0]), max(weights, before[1]))
        if len(self.layouts) > 1:
            if loss > TOLERANCE or weights > TOLERANCE:
                self.fail(None, f"its losses differ by {loss:.1e}, its weights by {weights:.1e}")
        else:
            if curve(self.run) != curve(reference) or held_out(self.run) != held_out(reference):
                self.fail(None, f"its losses are not those of the run that was left alone ({loss:.1e})")
            if tensor_files(folders[0]) != tensor_files(folders[1]):
                self.fail(None, f"its weights or its optimizer are not those of the run left alone ({weights:.1e})")
        # Files that were to be renamed stay for some minutes.
        if left := [each.name for each in self.run.folder.glob(".*") if each.is_dir()]:
            self.fail(None, f"leaves {left}")


# What is on the disk


def is_whole(folder: Path) -> bool:
    """Whether every file of a checkpoint is what its manifest says."""
    try:
        files = json.loads((folder / "manifest.json").read_bytes())["files"]
        for name, entry in files.items():
            content = (folder / name).read_bytes()
            if len(content) != entry["bytes"] or hashlib.sha256(content).hexdigest() != entry["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return "state.json" in files


def distance(one: Path, other: Path) -> float:
    """Between two checkpoints' weights, relative to their norm."""
    from calledshot.training import state

    ours, theirs = (state.read_tensors(folder / state.MODEL) for folder in (one, other))
    apart = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in theirs)
    return (apart / sum(float(tensor.double().square().sum()) for tensor in theirs.values())) ** 0.5


def tensor_files(folder: Path) -> dict[str, bytes]:
    """A checkpoint's files of tensors."""
    return {file.name: file.read_bytes() for file in folder.glob("*.safetensors")}
