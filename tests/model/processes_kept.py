"""Processes that share a model, kept from test to test: starting them takes longer than what they do."""

from __future__ import annotations

import multiprocessing
import pickle
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = 120.0
"""Seconds."""


class Ranks:
    """So many processes that form one group (gloo)."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.folder = tempfile.TemporaryDirectory()
        meeting = str(Path(self.folder.name) / "meeting")
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            self.processes.append(context.Process(target=_serve, args=(rank, size, meeting, theirs), daemon=True))
            self.processes[-1].start()
            self.pipes.append(ours)

    def run(self, work: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What a function of some module gives on each rank; it may ask `torch.distributed` where it is."""
        for pipe in self.pipes:
            pipe.send_bytes(pickle.dumps((work, arguments)))  # bytes, since tensors would go by shared memory
        answers = [
            pickle.loads(pipe.recv_bytes()) if pipe.poll(PATIENCE) else f"no answer after {PATIENCE} s"
            for pipe in self.pipes
        ]
        faults = [answer for answer in answers if isinstance(answer, str)]
        assert not faults, "\n".join(faults)
        return [answer for (answer,) in answers]

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(rank: int, size: int, meeting: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    patience = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=patience)
    while True:
        work, arguments = pickle.loads(pipe.recv_bytes())
        try:
            answer: Any = (work(*arguments),)
        except BaseException:
            answer = f"rank {rank}: {traceback.format_exc()}"
        pipe.send_bytes(pickle.dumps(answer))
