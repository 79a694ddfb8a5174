"""Other people's dashboards, behind a queue that can never block or fail a step."""

from __future__ import annotations

import hashlib
import queue
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from calledshot.recipe import Recipe, UsageError, to_dict

QUEUE_ROWS = 10_000
CLOSE_SECONDS = 10.0

Write = Callable[[int, Mapping[str, float]], None]


def _tensorboard(recipe: Recipe, name: str, folder: Path) -> tuple[Write, Callable[[], None]]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def write(step: int, row: Mapping[str, float]) -> None:
        for key, value in row.items():
            writer.add_scalar(key, value, step)

    return write, writer.close


def _wandb(recipe: Recipe, name: str, folder: Path) -> tuple[Write, Callable[[], None]]:
    import wandb

    # The same for every incarnation, and another one's for a run that takes the name of one that was deleted.
    identifier = hashlib.sha256((folder / "run.json").read_bytes()).hexdigest()[:16]
    run = wandb.init(
        project="calledshot", name=name, id=identifier, resume="allow", dir=str(folder), config=to_dict(recipe)
    )
    return (lambda step, row: run.log(dict(row), step=step)), run.finish


SINKS: dict[str, Callable[[Recipe, str, Path], tuple[Write, Callable[[], None]]]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}


class Sink:
    """Hands rows to a dashboard on a thread of its own. When the dashboard is slow, rows are dropped and counted; when
    it fails, it is said once and the run goes on."""

    def __init__(self, kind: str, recipe: Recipe, name: str, folder: Path) -> None:
        """UsageError when `kind` is unknown or its library is not installed."""
        if kind not in SINKS:
            raise UsageError(f"--sink {kind}: is not known; there are {', '.join(SINKS)}")
        module = {"tensorboard": "tensorboard", "wandb": "wandb"}[kind]
        import importlib.util

        if importlib.util.find_spec(module) is None:
            raise UsageError(f"--sink {kind}: needs `pip install 'calledshot[{kind}]'`")
        self.kind, self.dropped = kind, 0
        self._rows: queue.Queue[tuple[int, dict[str, float]] | None] = queue.Queue(QUEUE_ROWS)
        self._arguments = (recipe, name, folder)
        self._thread = threading.Thread(target=self._work, daemon=True, name=f"sink-{kind}")
        self._thread.start()

    def send(self, step: int, row: Mapping[str, Any]) -> None:
        """Never waits."""
        numbers = {key: float(value) for key, value in row.items() if isinstance(value, int | float)}
        try:
            self._rows.put_nowait((step, numbers))
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Give what is queued a bounded time to leave."""
        with suppress(queue.Full):
            self._rows.put(None, timeout=CLOSE_SECONDS)
            self._thread.join(CLOSE_SECONDS)
        unsent = self.dropped + (self._rows.qsize() if self._thread.is_alive() else 0)
        if unsent:
            print(
                f"shot: {self.kind} was too slow, {unsent} rows were not sent; metrics.jsonl has all", file=sys.stderr
            )

    def _work(self) -> None:
        write: Write | None = None
        finish: Callable[[], None] | None = None
        try:
            write, finish = SINKS[self.kind](*self._arguments)
        except BaseException as error:  # any failure of a dashboard is its own, its wish to exit too
            self._complain(error)
        while (item := self._rows.get()) is not None:
            if write is None:
                continue
            try:
                write(*item)
            except BaseException as error:  # as above
                self._complain(error)
                write = None
        if finish is not None:
            try:
                finish()
            except BaseException as error:  # as above
                self._complain(error)

    def _complain(self, error: BaseException) -> None:
        why = str(error) or type(error).__name__
        print(f"shot: {self.kind} failed and is left out from here ({why}); the run goes on", file=sys.stderr)
