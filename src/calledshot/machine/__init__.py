"""What this machine is and can do: description, fingerprint, measured peaks, NVML. Only what measures imports torch."""

from calledshot.machine.cpu import keep_freed_memory, usable_cores
from calledshot.machine.describe import describe, fingerprint
from calledshot.machine.doctor import Finding, diagnose
from calledshot.machine.gpu import Gpu, gpus, read_gpu
from calledshot.machine.peaks import PEAKS, MfuRange, mfu_range, table_peak
from calledshot.machine.probe import Peak, matmul_peak, memory_bandwidth

__all__ = [
    "PEAKS",
    "Finding",
    "Gpu",
    "MfuRange",
    "Peak",
    "describe",
    "diagnose",
    "fingerprint",
    "gpus",
    "keep_freed_memory",
    "matmul_peak",
    "memory_bandwidth",
    "mfu_range",
    "read_gpu",
    "table_peak",
    "usable_cores",
]
