"""Memory and energy of this process, as the metrics have them."""

from __future__ import annotations

import psutil
import torch

from calledshot import machine


def memory_bytes(device: torch.device) -> int:
    """What the process holds now: resident memory on a CPU, PyTorch's live tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def peak_memory_bytes(device: torch.device) -> int:
    """The most that it held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class EnergyMeter:
    """Joules that a GPU has drawn since this was made; None where NVML does not say."""

    def __init__(self, device: torch.device) -> None:
        self._uuid = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""
        self._start = self._reading()

    def _reading(self) -> float | None:
        gpu = machine.read_gpu(self._uuid) if self._uuid else None
        return gpu.energy_joules if gpu else None

    @property
    def joules(self) -> float | None:
        now = self._reading()
        return None if now is None or self._start is None else now - self._start
