"""What the first start finds out about a machine: dtype, compilation, threads, and how many tokens fit the minutes
asked for.

The answers go to probes.json under the machine's fingerprint; later incarnations on that machine obey them, so that
their arithmetic, and with it every loss, is the same.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from calledshot import machine
from calledshot.recipe import Recipe, cost, memory, shape
from calledshot.rundir import RunDirectory

COMPILE_PAYS_SECONDS = 90.0
"""Uncompiled training that takes less than this is not worth compiling: that alone takes 10 to 45 s on two cores."""
BFLOAT16_PAYS = 1.3
"""bfloat16 is taken where its matmuls are so many times quicker than float32's."""
PROBES = 9
"""Pairs of matmuls that are timed for that."""


@dataclass(frozen=True)
class Machine:
    """How this run computes on this machine."""

    device: str
    dtype: str
    compile: bool
    threads: int
    micro_tokens: int


def set_threads(recipe: Recipe, ranks: int = 1) -> int:
    """Make torch compute with as many threads as the recipe says, or as there are cores for each of the `ranks` on this
    machine. To be called before anything is traced: changing it later crashes dynamo."""
    threads = recipe.parallel.threads or max(1, machine.usable_cores() // ranks)
    if not torch.cuda.is_available() and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    return threads


def choose(recipe: Recipe, run: RunDirectory, device: torch.device, ranks: int = 1) -> Machine:
    """The decisions of an earlier incarnation on this machine, with as many ranks on it, else new ones; what the recipe
    fixes is never probed."""
    threads = set_threads(recipe, ranks)
    key = f"{machine.fingerprint()} {device.type}" + (f" x{ranks}" if ranks > 1 else "")
    known = run.load("probes").get("machines", {}).get(key)
    asked = recipe.parallel
    probed = Machine(**known) if known else None
    dtype = asked.dtype if asked.dtype != "auto" else probed.dtype if probed else _dtype(device)
    micro = asked.micro_tokens or (probed.micro_tokens if probed else micro_tokens(recipe, device))
    if asked.compile == "auto":
        compiled = probed.compile if probed else _compile(recipe, device, dtype)
    else:
        compiled = asked.compile == "on"
    chosen = Machine(device.type, dtype, compiled, threads, micro)
    if probed != chosen:
        probes = run.load("probes")
        run.save("probes", {**probes, "machines": {**probes.get("machines", {}), key: asdict(chosen)}})
    return chosen


def micro_tokens(recipe: Recipe, device: torch.device) -> int:
    """Largest divisor of the batch, in whole sequences, that is known to be quick: 4,096 tokens on a CPU (caches),
    65,536 on a GPU as far as memory goes."""
    row = shape(recipe.model).row_positions
    rows = recipe.batch.tokens // row
    limit = 4096 if device.type == "cpu" else 65_536
    if device.type == "cuda":
        fits = memory(recipe, memory=torch.cuda.get_device_properties(device).total_memory).micro_tokens
        limit = min(limit, fits or row)
    best = max((n for n in range(1, rows + 1) if rows % n == 0 and n * row <= limit), default=1)
    return best * row


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _dtype(device: torch.device) -> str:
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    wide = torch.randn(1024, 1024)
    narrow = wide.bfloat16()
    products = (lambda: wide @ wide), (lambda: narrow @ narrow)
    for product in products:
        product()
    # In turns: beside other work the fastest of either type alone can be off by half (2 of 30 runs took float32 so).
    ratios = [_seconds(products[0]) / _seconds(products[1]) for _ in range(PROBES)]
    return "bfloat16" if statistics.median(ratios) > BFLOAT16_PAYS else "float32"


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which compiled code for a CPU needs."""
    return bool(shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++"))


def _compile(recipe: Recipe, device: torch.device, dtype: str) -> bool:
    """Whether compiling repays itself: not for runs that are short anyhow, and not without a C++ compiler."""
    if device.type == "cpu" and not has_compiler():
        return False
    if recipe.duration.minutes:
        return recipe.duration.minutes * 60 > COMPILE_PAYS_SECONDS
    costs = cost(recipe)
    peak = machine.matmul_peak(dtype, seconds=0.3, device=device.type)
    assert costs.flops is not None
    return costs.flops / (0.3 * max(peak)) > COMPILE_PAYS_SECONDS
