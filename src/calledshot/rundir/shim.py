"""Copy this one file (standard library only) into any trainer, and its runs can be read like ours:

run = Shim("runs/mine")                                  # on rank 0
run.step(100, loss=2.31, tokens=819_200)                 # once a step, or as often as you log
run.step(200, loss=2.12, checkpoint="saves/200")         # after a save
run.end()                                                # or run.end("failed", "why")
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time


class Shim:
    def __init__(self, path: str, heartbeat_seconds: float = 10.0) -> None:
        """Begins an incarnation of the run at `path`, created if need be; BlockingIOError when the run is in use."""
        self.path, self.every, self.last = path, heartbeat_seconds, float("-inf")
        incarnations = os.path.join(path, "incarnations")
        os.makedirs(incarnations, exist_ok=True)
        self.lock = open(os.path.join(path, ".lock"), "a")  # noqa: SIM115 - held until the process dies
        fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.incarnation = 1 + max([int(name) for name in os.listdir(incarnations) if name.isdecimal()], default=0)
        os.mkdir(os.path.join(incarnations, f"{self.incarnation:04d}"))
        self.status = {"pid": os.getpid(), "host": socket.gethostname(), "incarnation": self.incarnation}
        self.metrics = os.open(os.path.join(path, "metrics.jsonl"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.write(self.metrics, b"\n" if os.fstat(self.metrics).st_size else b"")  # ends a line torn by a kill
        self._write("running")

    def step(self, step: int, loss: float | None = None, checkpoint: str = "", **fields: float | str | None) -> None:
        """Logs a step; `checkpoint` says where the last save lies; `fields` are named as in metrics.jsonl."""
        row = {"step": step, "incarnation": self.incarnation, "time": self._now(), "loss": loss, **fields}
        row = {key: None if isinstance(value, float) and value - value != 0 else value for key, value in row.items()}
        os.write(self.metrics, (json.dumps(row) + "\n").encode())
        self.status.update({"step": step, "loss": row["loss"], **({"checkpoint": checkpoint} if checkpoint else {})})
        if checkpoint or time.monotonic() - self.last > self.every:
            self._write("running")

    def end(self, state: str = "done", message: str = "") -> None:
        """The last word: done, failed or interrupted. Without it, a run whose process died reads as interrupted."""
        self._write(state, message)

    def _now(self) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())

    def _write(self, state: str, message: str = "") -> None:
        self.last, target = time.monotonic(), os.path.join(self.path, "status.json")
        with open(target + ".tmp", "w") as file:
            json.dump({**self.status, "state": state, "message": message, "heartbeat": self._now()}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(target + ".tmp", target)
