"""Chunks spread over processes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import Empty, SimpleQueue

from calledshot.data.tokenizer import Tokenizer
from calledshot.data.work import Task, tokenise
from calledshot.recipe import RunError, ShotError, UsageError

ALONE = 4 << 20
"""Bytes of source below which no other process is worth its start."""


def work_off(
    tasks: Sequence[Task],
    tokenizer: Tokenizer,
    everything: Sequence[Task],
    lock: int,
    progress: Callable[[str, int, int], None],
) -> None:
    """Tokenise chunks on every core that this process may use; `everything` counts what earlier attempts have done.

    The processes inherit `lock`, so that nobody else begins while one outlives a killed parent to the end of its chunk.
    """
    total = sum(task.chunk.size for task in everything)
    done = total - sum(task.chunk.size for task in tasks)
    guard = threading.Lock()

    def advance(size: int) -> None:
        nonlocal done
        with guard:
            done += size
            progress("tokens", min(done, total), total)

    progress("tokens", done, total)
    workers = min(_cores(), len(tasks))
    if workers <= 1 or total - done < ALONE:
        for task in tasks:
            try:
                _counted(task, advance, lambda told, task=task: tokenise(task, tokenizer, told))
            except OSError as error:
                raise _failure(error.errno, error.filename, str(error)) from None
        return
    queue: SimpleQueue[Task] = SimpleQueue()
    for task in tasks:
        queue.put(task)
    processes = [_start(lock) for _ in range(workers)]
    try:
        with ThreadPoolExecutor(workers) as pool:
            try:
                for future in as_completed([pool.submit(_drive, process, queue, advance) for process in processes]):
                    future.result()
            finally:
                # On an error or Ctrl-C the others stop too; the chunks that are done stay done.
                for process in processes:
                    process.kill()
    finally:
        for process in processes:
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream:
                    stream.close()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(lock: int) -> subprocess.Popen[str]:
    one_thread = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        # -P: a file in the current folder must not stand in for a module.
        [sys.executable, "-P", "-c", "from calledshot.data.work import main; main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=(lock,),
        env={**os.environ, **one_thread},
        # Ctrl-C is for the parent to act on.
        start_new_session=True,
    )


def _drive(process: subprocess.Popen[str], queue: SimpleQueue[Task], advance: Callable[[int], None]) -> None:
    while True:
        try:
            task = queue.get_nowait()
        except Empty:
            return
        _counted(task, advance, lambda told, task=task: _hand_over(process, task, told))


def _counted(task: Task, advance: Callable[[int], None], action: Callable[[Callable[[int], None]], None]) -> None:
    """Run a chunk so that the bytes it reports add up to its size."""
    reported = 0

    def told(size: int) -> None:
        nonlocal reported
        size = min(size, task.chunk.size - reported)
        reported += size
        advance(size)

    action(told)
    advance(task.chunk.size - reported)


def _hand_over(process: subprocess.Popen[str], task: Task, advance: Callable[[int], None]) -> None:
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps(task.to_json()) + "\n")
        process.stdin.flush()
    except OSError:
        raise RunError("a tokenising process ended unexpectedly; repeat the command, what is done is kept") from None
    for line in process.stdout:
        message = json.loads(line)
        if "advance" in message:
            advance(message["advance"])
        elif "done" in message:
            return
        else:
            raise _reported(message)
    raise RunError(
        f"{task.chunk.files[0].path}: the process that tokenised it ended unexpectedly (out of memory?); "
        "repeat the command, what is done is kept"
    )


def _reported(message: dict) -> ShotError:
    if "exit_code" in message:
        return (UsageError if message["exit_code"] == UsageError.exit_code else RunError)(message["error"])
    return _failure(message["errno"], message["path"], message["error"])


def _failure(number: int | None, path: str | None, text: str) -> RunError:
    if number in (errno.ENOSPC, errno.EDQUOT):
        where = f"{Path(path).parent}: " if path else ""
        return RunError(f"{where}the disk is full; free some space and repeat the command, what is done is kept")
    return RunError(text)
