from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest

from calledshot.machine import Gpu, gpus, read_gpu


class NVMLError(Exception):
    pass


class Driver(SimpleNamespace):
    """An NVML with two cards, the second of which knows little about itself."""

    NVMLError = NVMLError
    NVML_TEMPERATURE_GPU = 0

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetIndex(self, handle: int) -> int:
        return handle

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        if uuid not in ("GPU-0000", "GPU-0001"):
            raise NVMLError("not found")
        return int(uuid[-1])

    def nvmlDeviceGetName(self, handle: int) -> str | bytes:
        return ["NVIDIA H200", b"GRID T4-1Q"][handle]

    def nvmlDeviceGetUUID(self, handle: int) -> str:
        return f"GPU-000{handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: int) -> SimpleNamespace:
        return self.known(handle, SimpleNamespace(total=150_000_000_000, used=7))

    def nvmlDeviceGetTemperature(self, handle: int, sensor: int) -> int:
        return self.known(handle, 41)

    def nvmlDeviceGetPowerUsage(self, handle: int) -> int:
        return self.known(handle, 700_000)  # milliwatts

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: int) -> int:
        return self.known(handle, 3_600_000)  # millijoules

    def known(self, handle: int, value: Any) -> Any:
        if handle:
            raise NVMLError("not supported")
        return value


def test_readings_and_those_a_card_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver())
    full, bare = gpus()
    assert full == Gpu(0, "NVIDIA H200", "GPU-0000", 150_000_000_000, 7, 41, 700.0, 3600.0)
    assert bare == Gpu(1, "GRID T4-1Q", "GPU-0001", None, None, None, None, None)
    assert read_gpu("0001") == read_gpu("GPU-0001") == bare
    assert read_gpu("0002") is None


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise NVMLError("library not found")

    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace(nvmlInit=fails, NVMLError=NVMLError))
    assert gpus() == []
    assert read_gpu("0000") is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert gpus() == []
