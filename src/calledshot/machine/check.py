"""Health checks, each in a process of its own: `python -m calledshot.machine.check NAME [FOLDER]`.

One JSON line on stdout: `check`, `passed`, `message`, `seconds`, measurements. Exit code 0 passed, 1 failed, 2 usage.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from calledshot.machine.cpu import memory as memory_state

MEMORY_BYTES = 256 * 2**20
DISK_BYTES = 32 * 2**20
CLOCK_SKEW_SECONDS = 2.0
SLOW_CORE = 3.0
"""A core that needs so many times the median's time is called slow; neighbors on shared hosts cost less than that."""


class Result(NamedTuple):
    passed: bool
    message: str
    measured: Mapping[str, Any] = MappingProxyType({})


def memory(folder: Path) -> Result:
    """Whether memory gives back what was written to it, in four patterns over 256 MiB or half of what is free."""
    del folder
    import numpy

    available = memory_state()["available_bytes"] or 0
    words = min(MEMORY_BYTES, available // 2) // 8
    if words < 2**17:
        return Result(False, f"only {available:,} bytes of memory are free", {"available_bytes": available})
    values = numpy.empty(words, numpy.uint64)
    addresses = numpy.arange(words, dtype=numpy.uint64)
    for pattern in (0x5555555555555555, 0xAAAAAAAAAAAAAAAA):
        values.fill(pattern)
        if wrong := int(numpy.count_nonzero(values != numpy.uint64(pattern))):
            return Result(False, f"{wrong} of {words} words came back changed (pattern {pattern:x})")
    for flip in (0, 0xFFFFFFFFFFFFFFFF):
        numpy.bitwise_xor(addresses, numpy.uint64(flip), out=values)
        if wrong := int(numpy.count_nonzero(numpy.bitwise_xor(values, numpy.uint64(flip)) != addresses)):
            return Result(False, f"{wrong} of {words} words came back changed (their own addresses)")
    return Result(True, f"{words * 8:,} bytes hold what is written", {"bytes": words * 8, "available_bytes": available})


def disk(folder: Path) -> Result:
    """Whether a folder's disk takes 32 MiB and gives the same back, and how quickly (through its cache)."""
    block = os.urandom(2**20)
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    if free < 2 * DISK_BYTES:
        return Result(False, f"{folder}: only {free:,} bytes are free", {"free_bytes": free})
    written, read = hashlib.sha256(), hashlib.sha256()
    with tempfile.TemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for number in range(DISK_BYTES // len(block)):
            piece = number.to_bytes(8, "little") + block[8:]
            written.update(piece)
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
        seconds = time.perf_counter() - start
        file.seek(0)
        while piece := file.read(2**20):
            read.update(piece)
    measured = {"free_bytes": free, "write_bytes_per_second": round(DISK_BYTES / seconds)}
    if written.digest() != read.digest():
        return Result(False, f"{folder}: gives back other bytes than were written", measured)
    return Result(True, f"{folder}: {free:,} bytes free, gives back what is written", measured)


def clock(folder: Path) -> Result:
    """Whether the clock runs evenly and agrees with that of the folder's disk, which may be another machine's."""
    wall, steady = time.time(), time.monotonic()
    time.sleep(0.5)
    jump = (time.time() - wall) - (time.monotonic() - steady)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(b"x")
        file.flush()
        os.fsync(file.fileno())
        skew = os.stat(file.name).st_mtime - time.time()
    measured = {"jump_seconds": round(jump, 6), "skew_seconds": round(skew, 6)}
    if abs(jump) > 0.05:
        return Result(False, f"the clock jumped by {jump:+.3f} s within half a second", measured)
    if abs(skew) > CLOCK_SKEW_SECONDS:
        return Result(False, f"the clock differs from that of {folder} by {skew:+.1f} s", measured)
    return Result(True, "the clock runs evenly", measured)


def cpu(folder: Path) -> Result:
    """Whether every core that this process may use computes the same, and none is far slower than the others."""
    del folder
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    data = bytes(range(256)) * 4096

    def work() -> tuple[str, float]:
        start = time.perf_counter()
        digest = hashlib.sha256(data).hexdigest()
        return digest, time.perf_counter() - start

    expected, times = hashlib.sha256(data).hexdigest(), {}
    for core in cores:
        os.sched_setaffinity(0, {core})
        runs = [work() for _ in range(20)]
        if any(digest != expected for digest, _ in runs):
            return Result(False, f"core {core} computes a wrong result")
        times[core] = min(seconds for _, seconds in runs)
    median = statistics.median(times.values()) if times else 0.0
    slow = [core for core, seconds in times.items() if seconds > SLOW_CORE * median]
    measured = {"cores": len(cores), "slow_cores": slow}
    if slow:
        return Result(False, f"cores {slow} take more than {SLOW_CORE:g} times the median's time", measured)
    return Result(True, f"{len(cores)} cores compute alike", measured)


def matmul(folder: Path) -> Result:
    """Whether the same matmul gives the same bits again and again, on the CPU and every GPU, and the right ones."""
    del folder
    import torch

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for device in devices:
        size, repeats = (512, 10) if device == "cpu" else (4096, 50)
        for dtype, tolerance in ((torch.float32, 2e-3), (torch.bfloat16, 2e-2)):
            a = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
            b = torch.randn(size, size, generator=torch.Generator().manual_seed(1)).to(device, dtype)
            first = a @ b
            if not all(torch.equal(first, a @ b) for _ in range(repeats)):
                return Result(False, f"{device}: the same {dtype} matmul gives other bits when repeated")
            exact = a[:64].double() @ b.double()
            error = float((first[:64].double() - exact).norm() / exact.norm())
            if not error < tolerance:
                return Result(False, f"{device}: a {dtype} matmul is wrong by {error:.1e} of its norm")
    return Result(True, f"matmuls repeat bit for bit on {', '.join(devices)}", {"devices": devices})


CHECKS: dict[str, Callable[[Path], Result]] = {check.__name__: check for check in (memory, disk, clock, matmul, cpu)}


def main(arguments: list[str]) -> int:
    """Runs the check that the arguments name."""
    if not 1 <= len(arguments) <= 2 or arguments[0] not in CHECKS:
        print(f"usage: python -m calledshot.machine.check {{{'|'.join(CHECKS)}}} [FOLDER]", file=sys.stderr)
        return 2
    start = time.perf_counter()
    try:
        result = CHECKS[arguments[0]](Path(arguments[1] if len(arguments) == 2 else "."))
    except Exception as error:  # a broken driver or disk raises anything, and that is the answer
        result = Result(False, f"{type(error).__name__}: {error}")
    seconds = round(time.perf_counter() - start, 3)
    verdict = {"check": arguments[0], "passed": result.passed, "message": result.message, "seconds": seconds}
    print(json.dumps({**verdict, **result.measured}))
    return 0 if result.passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
