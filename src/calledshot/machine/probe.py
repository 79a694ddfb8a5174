"""What this machine can do now: matmul FLOP/s and copy bandwidth, measured. torch is imported inside."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

_CPU_SHAPES = ((512, 512, 512), (1024, 1024, 1024), (2048, 512, 2048), (2048, 2048, 2048))
_GPU_SHAPES = ((4096, 4096, 4096), (8192, 8192, 8192), (16384, 4096, 4096), (8192, 8192, 28672))
_LEAST_REPEATS = 3
_BLOCK_SECONDS = {"cpu": 0.005, "cuda": 0.02}


class Peak(NamedTuple):
    """FLOP/s of the shape that does best: its slowest and its quickest block of repetitions."""

    lowest: float
    highest: float


def matmul_peak(dtype: str = "bfloat16", seconds: float = 1.0, device: str = "cpu") -> Peak:
    """FLOP/s of dense matmuls on random data, over several shapes, for about so many seconds.

    The peak is that of the best shape, judged by the median of its blocks. Machines drift: probe again during a run.
    `dtype` is torch's name for it; `device` is `cpu` or `cuda[:N]`.
    """
    import torch

    kind = torch.device(device).type
    shapes = _CPU_SHAPES if kind == "cpu" else _GPU_SHAPES
    kept = getattr(torch, dtype)
    generator = torch.Generator(device).manual_seed(0)  # a probe within a run must not move the run's random numbers
    deadline = time.perf_counter() + seconds
    best: list[float] = []
    for number, (m, k, n) in enumerate(shapes):
        left = deadline - time.perf_counter()
        if best and left <= 0:
            break
        try:
            a_MK = torch.randn(m, k, device=device, dtype=kept, generator=generator)
            b_KN = torch.randn(k, n, device=device, dtype=kept, generator=generator)
            out_MN = torch.empty(m, n, device=device, dtype=kept)
        except torch.OutOfMemoryError:  # a run that is being measured has taken what there is
            if best:
                break
            raise

        def work(a_MK: torch.Tensor = a_MK, b_KN: torch.Tensor = b_KN, out_MN: torch.Tensor = out_MN) -> None:
            torch.mm(a_MK, b_KN, out=out_MN)

        times = _times(work, max(left, 0) / (len(shapes) - number), device)
        rates = [2 * m * k * n / one for one in times]
        if not best or statistics.median(rates) > statistics.median(best):
            best = rates
    return Peak(min(best), max(best))


def memory_bandwidth(seconds: float = 0.5, device: str = "cpu") -> float:
    """Bytes a second, read and written both counted, of copying a buffer that no cache holds."""
    import torch

    kind = torch.device(device).type
    source = torch.ones((256 if kind == "cpu" else 1024) * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    times = _times(lambda: target.copy_(source), seconds, device)
    return 2 * source.nbytes / min(times)


def _times(work: Callable[[], object], seconds: float, device: str) -> list[float]:
    """Seconds one call takes, in blocks long enough to be timed well, for about so many seconds."""
    import torch

    kind = torch.device(device).type

    def block(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            work()
        if kind == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / calls

    deadline = time.perf_counter() + seconds
    block(1)
    calls = max(1, round(_BLOCK_SECONDS[kind] / block(1)))
    times = [block(calls) for _ in range(_LEAST_REPEATS)]
    while time.perf_counter() < deadline:
        times.append(block(calls))
    return times
