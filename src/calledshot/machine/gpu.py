"""What NVML says about GPUs. Without a driver there are none; a reading that a card lacks is None."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """One GPU at one moment."""

    index: int
    name: str
    uuid: str
    memory_bytes: int | None
    memory_used_bytes: int | None
    temperature: float | None
    """Degrees Celsius."""
    power_watts: float | None
    energy_joules: float | None
    """Since the driver was loaded: the difference of two readings is what went in between."""


def gpus() -> list[Gpu]:
    """Every GPU of this machine, whatever CUDA_VISIBLE_DEVICES says; [] without one or without its driver."""

    def read(nvml: Any) -> list[Gpu]:
        return [_read(nvml, nvml.nvmlDeviceGetHandleByIndex(index)) for index in range(nvml.nvmlDeviceGetCount())]

    return _with_nvml(read) or []


def read_gpu(uuid: str) -> Gpu | None:
    """The GPU of that UUID (with `GPU-` or, as torch gives it, without); None where it cannot be read."""
    full = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
    return _with_nvml(lambda nvml: _read(nvml, nvml.nvmlDeviceGetHandleByUUID(full)))


def driver_version() -> str | None:
    """Version of the NVIDIA driver; None without one."""
    return _with_nvml(lambda nvml: _text(nvml.nvmlSystemGetDriverVersion()))


def _with_nvml(read: Callable[[Any], Any]) -> Any:
    """What `read` gives of an initialised NVML; None where there is none.

    NVML is left open: only the first call of a process then costs tens of milliseconds.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:  # no driver, no library, a driver in trouble: the module has an exception class for each
        return None
    try:
        return read(pynvml)
    except pynvml.NVMLError:
        return None


def _read(nvml: Any, handle: Any) -> Gpu:
    def reading(read: Callable[[], float], scale: float = 1.0) -> float | None:
        try:
            return read() * scale
        except nvml.NVMLError:  # older cards have no energy counter, virtual ones no temperature
            return None

    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    except nvml.NVMLError:  # cards that share the host's memory
        memory = None
    return Gpu(
        index=int(nvml.nvmlDeviceGetIndex(handle)),
        name=_text(nvml.nvmlDeviceGetName(handle)),
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        memory_bytes=None if memory is None else int(memory.total),
        memory_used_bytes=None if memory is None else int(memory.used),
        temperature=reading(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
        power_watts=reading(lambda: nvml.nvmlDeviceGetPowerUsage(handle), 1e-3),
        energy_joules=reading(lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle), 1e-3),
    )


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
