"""Checkpoints written while the run goes on, by any number of ranks.

A save copies what this rank has to write into host memory that is kept from one save to the next, and everything else
(hashing, writing, flushing, publishing, deleting, uploading) happens in a thread of low priority. The ranks agree
through files alone, since a collective there would run into those of the step: see `rundir.Checkpoints`.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from calledshot import machine
from calledshot.recipe import RunError, schema
from calledshot.rundir import Keep, RunDirectory, atomic_write, held_out_by_step, uses
from calledshot.rundir.files import write_failure
from calledshot.training.pieces import Piece
from calledshot.training.placement import PIECES, Holding, Whole, assign, document, from_bytes, holding, to_bytes
from calledshot.training.remote import Uploads
from calledshot.training.state import COUNTERS, MODEL, OPTIMIZER, Counters, file_name
from calledshot.training.tensorfiles import WRITE_BYTES, bytes_of, lay_out

Tensors = Mapping[str, tuple[Tensor, Piece]]
Gather = Callable[[bytes], list[bytes]]
DEADLINE_SECONDS = 600.0
"""How long no rank may write anything before a save is given up."""
NICENESS = 10
"""Of the thread that writes: a step beside it keeps nine tenths of a core that both want."""
COPIERS = 8
"""Threads, at most, that copy to host memory; one core cannot use all the bandwidth that there is."""
COPY_BYTES = 32 * 2**20
SPARE_SHARE = 0.9
"""Of the memory that is available, at most so much is taken to copy a state into."""


@dataclass
class _File:
    """A file that this rank writes."""

    name: str
    header: bytes
    places: dict[str, tuple[int, int]]
    dtypes: dict[str, str]
    buffer: np.ndarray | None = None
    """Where its bytes are staged; uint8, as in the file after the header."""

    @property
    def size(self) -> int:
        """Bytes after the header."""
        return max((end for _, end in self.places.values()), default=0)


@dataclass
class _Plan:
    """Who writes what, as long as the ranks hold the same pieces."""

    wholes: dict[str, dict[str, Whole]]
    files: dict[str, _File]
    """By kind: model, optimizer."""


@dataclass
class _Save:
    """One checkpoint on its way."""

    counters: dict[str, Any]
    token: str
    plan: _Plan
    tensors: dict[str, Tensors] = field(default_factory=dict)
    """What is written from where it lies; empty when it was staged."""
    started: float = field(default_factory=time.perf_counter)
    blocked: float | None = None

    @property
    def step(self) -> int:
        return self.counters["step"]


class Saver:
    """Saves a run's state, one checkpoint at a time. Every rank has one and calls it at the same steps."""

    def __init__(
        self,
        run: RunDirectory,
        rank: int,
        world: int,
        settings: schema.Checkpoint,
        *,
        local: int = 1,
        gather: Gather | None = None,
        deadline_seconds: float = DEADLINE_SECONDS,
    ) -> None:
        """`local` ranks share this machine's memory. `gather` gives every rank the bytes of all of them, in order; a
        collective, called by `save` and `prepare` alone, and needed where there are several ranks. Rank 0 holds the
        run's lock. UsageError when the remote tier cannot be used.
        """
        self.run, self.rank, self.world, self.settings, self.local = run, rank, world, settings, local
        self.deadline_seconds = deadline_seconds
        self._gather = gather or (lambda content: [content])
        self._events = run.writer("events") if rank == 0 else None
        self._uploads = Uploads(run, settings) if rank == 0 and settings.remote else None
        self._incarnation, self._saves = run.incarnation, 0
        self._own: Holding = {}
        self._digest = b""
        self._known: list[bytes] = []
        self._plan: _Plan | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def prepare(self, model: Tensors, optimizer: Tensors) -> None:
        """Makes the memory to copy into ready in the background, so that the first save blocks as shortly as later
        ones. Worth a call where saves are to come while the run goes on."""
        plan = self._planned(model, optimizer)
        if self.settings.asynchronous and self._staging(plan, model):
            self._begin(lambda: [_touch(file.buffer) for file in plan.files.values() if file.buffer is not None])

    def save(self, counters: Counters, model: Tensors, optimizer: Tensors, *, wait: bool = False) -> None:
        """A checkpoint of step `counters.step`: masters and buffers of the model, and the optimizer's state, each with
        the piece of the whole that this rank holds (several ranks may hold the same).

        Returns when the tensors may change again; with `wait`, or where the recipe wants no asynchronous saves or
        memory lacks, when this rank's part is on the disk and, on rank 0, the checkpoint published. A save in flight is
        waited for first. RunError when that failed, or this one with `wait`.
        """
        started = time.perf_counter()
        self.wait()
        plan = self._planned(model, optimizer)
        self._saves += 1
        save = _Save(asdict(counters), f"{self._incarnation}-{self._saves}", plan, started=started)
        tensors = {"model": model, "optimizer": optimizer}
        if wait or not self.settings.asynchronous or not self._staging(plan, model):
            save.tensors = tensors
            self._carry_out(save)
            return
        for kind, file in plan.files.items():
            _stage(file, tensors[kind])
        save.blocked = time.perf_counter() - started
        self._begin(lambda: self._carry_out(save))

    def poll(self) -> None:
        """Raises what went wrong in the background, once: RunError for full disks, weights that are not finite, ranks
        that did not write their part."""
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    @property
    def busy(self) -> bool:
        """Whether a save is in flight."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Returns when the save in flight is published, or on ranks other than 0 written. Raises as `poll` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.poll()

    def close(self, seconds: float = 600.0) -> None:
        """Waits for the save in flight, then at most so long for its upload. To be called before the run's logs are
        closed. Raises as `poll` does."""
        try:
            self.wait()
        finally:
            if self._uploads is not None:
                self._uploads.close(seconds)

    def _planned(self, model: Tensors, optimizer: Tensors) -> _Plan:
        """Who writes what; a new plan when any rank holds something else than at the last save."""
        own = holding({"model": model, "optimizer": optimizer})
        if own != self._own:
            self._own, self._digest = own, hashlib.sha256(to_bytes(own)).digest()
        known = self._gather(self._digest)
        if self._plan is None or known != self._known:
            holdings = [own] if self.world == 1 else [from_bytes(one) for one in self._gather(to_bytes(own))]
            wholes = assign(holdings)
            kinds = (("model", MODEL), ("optimizer", OPTIMIZER))
            files = {kind: self._file(name, wholes[kind]) for kind, name in kinds}
            self._known, self._plan = known, _Plan(wholes, files)
        return self._plan

    def _file(self, name: str, wholes: Mapping[str, Whole]) -> _File:
        mine = {
            key: (whole.dtype, piece.local_shape)
            for key, whole in wholes.items()
            for number, piece in whole.pieces
            if number == self.rank
        }
        header, places = lay_out(mine)
        dtypes = {key: dtype for key, (dtype, _) in mine.items()}
        return _File(file_name(name, self.rank, self.world), header, places, dtypes)

    def _staging(self, plan: _Plan, model: Tensors) -> bool:
        """Makes the host memory that the state is copied to, once; False when there is too little of it."""
        files = [file for file in plan.files.values() if file.buffer is None]
        needed = sum(file.size for file in files)
        if needed and needed * self.local > SPARE_SHARE * machine.describe()["memory"]["available_bytes"]:
            return False
        cuda = any(tensor.is_cuda for tensor, _ in model.values())
        for file in files:
            file.buffer = _buffer(file.size, cuda)
        return True

    def _begin(self, task: Callable[[], object]) -> None:
        def background() -> None:
            try:
                if sys.platform == "linux":  # elsewhere that is no thread's number
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
                task()
            except BaseException as error:
                self._failure = error

        self.wait()
        self._thread = threading.Thread(target=background, name="checkpoint", daemon=True)
        self._thread.start()

    # What follows runs in the background, unless somebody waits for it.

    def _carry_out(self, save: _Save) -> None:
        """Writes this rank's files; rank 0 then publishes what all of them wrote."""
        run, step = self.run, save.step
        partial = run.partial_checkpoint_path(step)
        try:
            if self.rank:
                run.join_checkpoint(step, save.token, 2 * self.deadline_seconds)
            else:
                run.begin_checkpoint(step, save.token if self.world > 1 else "")
            self._write(save)
            if self.rank:
                run.seal_checkpoint(step, self.rank)
                return
            atomic_write(partial / COUNTERS, json.dumps(save.counters, indent=1))
            if self.world > 1:
                atomic_write(partial / PIECES, json.dumps(document(save.plan.wholes, self.world)))
                run.await_seals(step, self.world, self.deadline_seconds)
            run.publish_checkpoint(step)
        except BaseException as error:
            failure = write_failure(partial, error) if isinstance(error, OSError) else error
            if self.rank:
                with suppress(RunError):  # then rank 0 waits until the deadline
                    run.seal_checkpoint(step, self.rank, str(failure) or type(failure).__name__)
            else:
                shutil.rmtree(partial, ignore_errors=True)
            if failure is error:
                raise
            raise failure from error
        try:
            self._published(save)
        except OSError as error:
            raise write_failure(run.folder, error) from error

    def _write(self, save: _Save) -> None:
        with ThreadPoolExecutor(len(save.plan.files)) as pool:
            writing = [
                pool.submit(self.run.write_checkpoint_file, save.step, file.name, self._parts(save, kind, file))
                for kind, file in save.plan.files.items()
            ]
        for one in writing:
            one.result()

    def _parts(self, save: _Save, kind: str, file: _File) -> Iterator[bytes | memoryview]:
        """The bytes of a file. RunError when they are weights that are not finite: saving them would in the end push
        out the last good ones."""
        yield file.header
        for name, (begin, end) in file.places.items():
            if save.tensors:
                content = bytes_of(save.tensors[kind][name][0])
            else:
                assert file.buffer is not None
                content = file.buffer[begin:end]
            for start in range(0, end - begin, WRITE_BYTES):
                chunk = content[start : start + WRITE_BYTES]
                if kind == "model" and not finite(chunk, file.dtypes[name]):
                    raise RunError(
                        f"{self.run.path}: the weights are not finite at step {save.step} ({name}), so they were not "
                        "saved; fork from an earlier checkpoint with a lower optimizer.learning_rate"
                    )
                yield chunk.data

    def _published(self, save: _Save) -> None:
        """Says so, deletes what need not be kept, and hands the checkpoint to the remote tier."""
        assert self._events is not None
        seconds = time.perf_counter() - save.started
        blocked = seconds if save.blocked is None else save.blocked
        event = {"kind": "checkpoint", "step": save.step, "blocked_seconds": blocked, "seconds": seconds}
        self._events.append({**event, "bytes": self.run.checkpoint_bytes(save.step)})
        needed = uses(self.run.path)
        if self._uploads is not None:
            self._uploads.submit(save.step)
            needed |= self._uploads.needed()
        held_out = held_out_by_step(self.run.rows("validation")) if self.settings.keep_best else {}
        self.run.prune(Keep.of(self.settings), held_out, needed)


def _buffer(size: int, cuda: bool) -> np.ndarray:
    """Host memory for a file: page-locked where the tensors come from a GPU, else in large pages where there are any,
    which makes touching it the first time four times as quick."""
    if cuda:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    if not size:
        return np.empty(0, np.uint8)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError, AttributeError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _touch(buffer: np.ndarray) -> None:
    for start in range(0, len(buffer), COPY_BYTES):
        buffer[start : start + COPY_BYTES : mmap.PAGESIZE] = 0


def _stage(file: _File, tensors: Tensors) -> None:
    """Copies the tensors of a file into its buffer."""
    assert file.buffer is not None
    copies = []
    for name, (begin, end) in file.places.items():
        tensor, into = tensors[name][0].detach(), file.buffer[begin:end]
        if tensor.is_cuda:
            torch.from_numpy(into).view(tensor.dtype).copy_(tensor.contiguous().view(-1), non_blocking=True)
            continue
        content = bytes_of(tensor)
        for start in range(0, end - begin, COPY_BYTES):
            copies.append((into[start : start + COPY_BYTES], content[start : start + COPY_BYTES]))
    # Not Tensor.copy_, which writes through the caches and, where another process holds up one of its threads, waits
    # for it: memcpy took a half of its time on an idle machine and a ninth on a busy one.
    with ThreadPoolExecutor(min(COPIERS, machine.usable_cores())) as pool:
        for done in [pool.submit(np.copyto, *copy) for copy in copies]:
            done.result()
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()


def finite(content: np.ndarray, dtype: str) -> bool:
    """Whether all the numbers in these bytes are finite; one pass in the usual case."""
    if dtype == "BF16":
        return not ((content.view(np.uint16) & 0x7F80) == 0x7F80).any()
    if not dtype.startswith("F"):
        return True
    values = content.view({"F64": np.float64, "F32": np.float32, "F16": np.float16}[dtype])
    with np.errstate(all="ignore"):  # the sum of large numbers may be infinite, too
        return bool(np.isfinite(values.sum()) or np.isfinite(values).all())
