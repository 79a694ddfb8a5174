"""Kills training runs again and again, damages what they have saved, and checks that nothing of it shows at the end.

    python benchmarks/torture.py --kills 200 --out docs/torture.md

Small runs on generated text, in real processes, one a rank, in three series: one rank, two shards, and a series whose
number of ranks and layout change from start to start. At random moments ranks are killed, stopped, sent SIGTERM, run
out of disk; files of the newest checkpoint are cut off or get a flipped bit. The same command is repeated each time,
until the run is done. Then hostile checkpoints are offered.

The seed decides what is done, to whom and after how many steps; the moment within a step is up to the machine.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "training"))

from processes import TINY, write_corpus

from calledshot import machine
from calledshot.cli.ranks import GRACE_SECONDS
from calledshot.rundir import RunDirectory
from hostile import Attempt, attempts
from job import EVERY, OVERRIDES, STEPS, Disk, Job, Layout
from ordeal import ASYNCHRONOUS, FLIPPED, KINDS, TOLERANCE, TRUNCATED, Deck, Event, Ordeal, Report, what_of

SOURCE = 'sources = [{ path = "corpus" }]'
ALONE, SHARDS = Layout("1 rank"), Layout("2 shards", 2, ("parallel.shard=2",))
SERIES: Mapping[str, tuple[Layout, ...]] = {
    "1 rank": (ALONE,),
    "2 shards": (SHARDS,),
    "changing": (
        ALONE,
        SHARDS,
        Layout("2 replicas", 2),
        Layout("tensor 2", 2, ("parallel.tensor=2",)),
        Layout("3 replicas", 3),
        Layout("3 shards", 3, ("parallel.shard=3",)),
        Layout("2 replicas of 2 shards", 4, ("parallel.replicate=2", "parallel.shard=2")),
        Layout("2 shards of tensor 2", 4, ("parallel.shard=2", "parallel.tensor=2")),
    ),
}
HOPELESS = 20
"""Failures in a series after which the rest of it is left out."""


@contextmanager
def laboratory(folder: Path) -> Iterator[tuple[Path, Disk]]:
    """A lab with two sources of generated text, the recipe tiny.toml, and its disk."""
    write_corpus(folder / "corpus", documents=60)
    write_corpus(folder / "other", documents=40, seed=1)
    recipe = TINY.replace(SOURCE, SOURCE.replace("]", ', { path = "other" }]'))
    (folder / "tiny.toml").write_text(recipe, encoding="utf-8")
    disk = Disk(folder / "runs")
    try:
        yield folder, disk
    finally:
        disk.close()


def undisturbed(lab: Path, layout: Layout) -> RunDirectory:
    """A run that nothing is done to."""
    run = RunDirectory(lab / "runs" / f"undisturbed-{layout.name}".replace(" ", "-"))
    if not run.path.exists():
        codes, said = Job(lab, run.name, layout).end()
        assert not any(codes), said
    return run


def torture(
    lab: Path,
    disk: Disk,
    kills: int,
    seed: int,
    *,
    series: Sequence[str] = tuple(SERIES),
    kinds: Sequence[str] = KINDS,
    sabotage: Callable[[], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Report:
    """Torments so many times, shared by some of SERIES. `sabotage` breaks something in every process of the tormented
    runs: to prove that it is noticed."""
    report = Report()
    for place, name in enumerate(series):
        share = kills * (place + 1) // len(series) - kills * place // len(series)
        most, worst = len(report.events) + share, len(report.failures) + HOPELESS
        deck = Deck(random.Random(f"{seed} {name}"), kinds)
        reference = undisturbed(lab, SERIES[name][0])
        while len(report.events) < most and len(report.failures) < worst:
            ordeal = Ordeal(lab, disk, name, SERIES[name], deck, report, sabotage)
            failures = len(report.failures)
            if ordeal.go(most - len(report.events)):
                ordeal.compare(reference)
            if len(report.failures) == failures:
                shutil.rmtree(ordeal.run.path)
            say(f"{name}: {len(report.events)} of {kills} events, {report.done[name]} runs done, "
                f"{len(report.failures)} failures")  # fmt: skip
    return report


def spread(values: Sequence[float], form: str) -> str:
    """Median and largest."""
    return f"{statistics.median(values):{form}} ({max(values):{form}})" if values else ""


def table(report: Report) -> list[str]:
    """A line for each kind of event, Markdown."""
    lines = [
        "| event | times | resumed | steps repeated | seconds to the first step | seconds to the last rank's end | "
        "failures |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    of_kind: dict[str, list[Event]] = {kind: [] for kind in dict.fromkeys(KINDS)}
    for event in report.events:
        of_kind[event.kind].append(event)
    failed = Counter("" if event is None else event.kind for event, _ in report.failures)
    for kind, events in [*of_kind.items(), ("all", report.events)]:
        if not events:
            continue
        seconds = [event.seconds for event in events if event.seconds is not None]
        lines.append(
            f"| {kind} | {len(events)} | {sum(event.resumed for event in events)} | "
            f"{spread([event.repeated for event in events], '.0f')} | {spread(seconds, '.1f')} | "
            f"{spread([event.ending for event in events], '.1f')} | "
            f"{len(report.failures) if kind == 'all' else failed[kind]} |"
        )
    return lines


def series_table(report: Report) -> list[str]:
    """A line for each series, Markdown."""
    lines = [
        "| series | runs done | starts | largest difference of a loss | of the weights | allowed |",
        "|---|--:|---|--:|--:|--:|",
    ]
    for name, (loss, weights) in report.largest.items():
        layouts = {one.name: report.starts[name, one.name] for one in SERIES[name]}
        starts = ", ".join(f"{layout} {count}" for layout, count in layouts.items())
        allowed = f"{TOLERANCE}" if len(layouts) > 1 else "not a bit, of moments neither"
        lines.append(f"| {name} | {report.done[name]} | {starts} | {loss:.1e} | {weights:.1e} | {allowed} |")
    return lines


def hostile_text(hostile: Sequence[Attempt]) -> str:
    """What came of the attacks, in a paragraph."""
    harmless, failed = sum(one.harmless for one in hostile), sum(not one.refused for one in hostile)
    return (
        f"{len(hostile)} attacks on the only checkpoint of a run, by somebody who has made its hashes right: "
        f"{len(hostile) - harmless - failed} refused in one line with exit code 1 or 2, {harmless} on files that "
        f"decide nothing and are passed over, {sum(one.carried_out for one in hostile)} payloads carried out, "
        f"{failed} failures. They put a pickle, an archive of `torch.save` or brackets 100,000 deep in place of each "
        "file, a pickle after the tensors, `..` and absolute paths into `manifest.json`, `pieces.json` and `latest`, "
        "tensors beyond the end of a file or larger than any memory."
    )


def document(report: Report, hostile: Sequence[Attempt], command: str, mounted: bool, seconds: float) -> str:
    """All that came of it, Markdown."""
    damaged = Counter(
        what_of(event.detail.partition(",")[0]) for event in report.events if event.kind in (TRUNCATED, FLIPPED)
    )
    room = (
        "a tmpfs with room for 0 to 1.2 checkpoints"
        if mounted
        else "a limit on the size of files (RLIMIT_FSIZE), since no file system can be mounted here"
    )
    lines = [
        "# Torture",
        "",
        f"`{command}`: {len(report.events)} events in {report.done.total()} runs of {STEPS} steps, "
        f"{report.starts.total()} starts, {report.changes} of them with another layout than the one before. "
        f"{machine.describe()['cpu']['model']}, {machine.usable_cores()} cores, busy with other work too; "
        f"{seconds / 60:.0f} minutes. Starts are forked from a process that has imported PyTorch. "
        f"A full disk is {room}.",
        "",
        f"**{report.unrecoverable} unrecoverable states, {report.lost} steps lost that a whole checkpoint had, "
        f"{sum(event.resumed for event in report.events)} of {len(report.events)} events resumed from, "
        f"{len(report.failures)} failures.**",
        "",
        *table(report),
        "",
        f"Median (largest). Every {EVERY} steps are saved, by {ASYNCHRONOUS:.0%} of the starts in the background; what "
        "was made since the last whole checkpoint is repeated, or since the one before where that was damaged. Seconds "
        "to the first step are from "
        "the next start, those to the last rank's end from the event: a rank that waits for one that never came is "
        f"ended after {GRACE_SECONDS:.0f}, as `--ranks` does. Files damaged: "
        f"{', '.join(f'{name} {count}' for name, count in sorted(damaged.items()))}.",
        "",
        *series_table(report),
        "",
        "Relative differences to a run that nothing was done to; that of the changing series has one rank.",
        "",
        "## Hostile checkpoints",
        "",
        hostile_text(hostile),
        *(["", "## Failures", ""] if report.failures or not all(one.refused for one in hostile) else []),
        *(f"- {what}" for _, what in report.failures),
        *(f"- {one.what}: exit code {one.code}, {one.said}" for one in hostile if not one.refused),
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="without it, another one each time")
    parser.add_argument("--series", nargs="+", choices=list(SERIES), default=list(SERIES))
    parser.add_argument("--kinds", nargs="+", choices=list(dict.fromkeys(KINDS)), default=KINDS)
    parser.add_argument("--folder", type=Path, help="where the runs are; those that failed are left there")
    parser.add_argument("--out", type=Path, help="write the Markdown there")
    arguments = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if arguments.seed is None else arguments.seed
    print(f"seed {seed}", flush=True)
    began = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {line}", flush=True)

    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    with laboratory(folder) as (lab, disk):
        report = torture(
            lab, disk, arguments.kills, seed, series=arguments.series, kinds=arguments.kinds, say=say,
        )  # fmt: skip
        for event, what in report.failures:
            print(f"after {event}: {what}")
        seconds = time.monotonic() - began
        hostile = attempts(lab, OVERRIDES)
        if report.failures and arguments.folder:
            shutil.copytree(lab / "runs", folder / "failed")
        command = f"python benchmarks/torture.py --kills {arguments.kills} --seed {seed}"
        text = document(report, hostile, command, disk.mounted, seconds).replace(str(lab), "LAB")
    if not (report.failures and arguments.folder):
        shutil.rmtree(folder)
    print(text)
    if arguments.out:
        arguments.out.write_text(text, encoding="utf-8")
    return 1 if report.failures or not all(one.refused for one in hostile) else 0


if __name__ == "__main__":
    sys.exit(main())
