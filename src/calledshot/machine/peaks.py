"""How much of what a machine can do was used: peaks from data sheets, and MFU as a range against measured peaks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

_HALF = ("bfloat16", "float16")

PEAKS: dict[str, dict[str, float]] = {
    name: dict.fromkeys(dtypes, peak)
    for names, dtypes, peak in (
        (("NVIDIA B200",), _HALF, 2250e12),
        (("NVIDIA H200",), _HALF, 989e12),
        (("NVIDIA H100 80GB HBM3",), _HALF, 989e12),
        (("NVIDIA H100 PCIe",), _HALF, 756e12),
        (("NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB"), _HALF, 312e12),
        (("NVIDIA A100-PCIE-40GB", "NVIDIA A100 80GB PCIe"), _HALF, 312e12),
        (("NVIDIA L40S",), _HALF, 362e12),
        (("NVIDIA L4",), _HALF, 121e12),
        (("NVIDIA GeForce RTX 4090",), _HALF, 165e12),
        (("Tesla V100-SXM2-16GB", "Tesla V100-SXM2-32GB"), ("float16",), 125e12),
    )
    for name in names
}
"""Dense peak in FLOP/s by the name that NVML and torch give and by dtype, from the makers' data sheets."""


def table_peak(name: str, dtype: str = "bfloat16") -> float | None:
    """The data sheet's dense FLOP/s of exactly this card; None for any other, never that of a similar one."""
    return PEAKS.get(name, {}).get(dtype)


class MfuRange(NamedTuple):
    """Model FLOPs utilization, as shares of the highest and of the lowest peak; an end not to be trusted is None."""

    low: float | None
    high: float | None
    reason: str
    """Why an end is missing; empty when none is."""


def mfu_range(flops_per_second: float, peaks: Sequence[float]) -> MfuRange:
    """MFU of a model that does so many FLOP/s on a machine whose matmul peak was probed so often (FLOP/s each).

    More than the highest peak refuses both ends: the FLOPs are miscounted or the probes were disturbed. More than the
    lowest refuses the upper end alone.

    >>> mfu_range(40e12, [80e12, 100e12])
    MfuRange(low=0.4, high=0.5, reason='')
    """
    good = [peak for peak in peaks if math.isfinite(peak) and peak > 0]
    if not good:
        return MfuRange(None, None, "no peak was probed")
    if not math.isfinite(flops_per_second) or flops_per_second < 0:
        return MfuRange(None, None, "the model's FLOP/s are not known")
    low, high = flops_per_second / max(good), flops_per_second / min(good)
    if low > 1:
        return MfuRange(None, None, f"{low:.0%} of the highest peak probed: miscounted FLOPs or a disturbed probe")
    if high > 1:
        return MfuRange(low, None, f"{high:.0%} of the lowest peak probed: that probe was disturbed")
    return MfuRange(low, high, "")
