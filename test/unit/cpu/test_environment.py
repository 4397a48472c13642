"""What the CUDA driver says about its devices, through a driver that is made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dcp.cli import doctor
from sglang_dcp.cpu import environment


class FakeDriver:
    """libcuda's functions, with devices of the given compute capability. A handle is not its place, and attributes are those of cuda.h."""

    FIRST_HANDLE = 40
    NOT_FOUND = 500

    def __init__(self, capabilities: list[tuple[int, int]], silent: bool = False) -> None:
        self.capabilities, self.silent = capabilities, silent

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGet(self, device: Any, place: int) -> int:
        device._obj.value = self.FIRST_HANDLE + place
        return 0

    def cuDeviceGetAttribute(self, number: Any, attribute: int, device: Any) -> int:
        if self.silent:
            return self.NOT_FOUND
        number._obj.value = self.capabilities[device.value - self.FIRST_HANDLE][{75: 0, 76: 1}[attribute]]
        return 0


def with_driver(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver | None) -> None:
    def load(name: str) -> FakeDriver:
        assert name == "libcuda.so.1"
        if driver is None:
            raise OSError("cannot open shared object file")
        return driver

    real = environment.ctypes
    monkeypatch.setattr(environment, "ctypes", SimpleNamespace(CDLL=load, c_int=real.c_int, byref=real.byref))


@pytest.mark.parametrize("capabilities", [[], [(9, 0)], [(9, 0), (8, 6), (12, 1)]])
def test_every_device_is_asked(monkeypatch: pytest.MonkeyPatch, capabilities: list[tuple[int, int]]) -> None:
    with_driver(monkeypatch, FakeDriver(capabilities))
    assert environment.cuda_capabilities() == capabilities


def test_without_a_driver_there_is_nothing_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, None)
    assert environment.count_cuda_devices() is None
    assert environment.cuda_capabilities() == []


def test_doctor_names_the_one_card_that_is_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, FakeDriver([(9, 0), (8, 6)]))
    finding = doctor._device()
    assert (finding.ok, finding.detail) == (False, "2 CUDA device(s) of compute capability 8.6: --enable-dyncp needs Hopper (9.0)")


def test_a_driver_that_does_not_say_is_not_taken_for_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    with_driver(monkeypatch, FakeDriver([(9, 0)], silent=True))
    finding = doctor._device()
    assert finding.ok is False
    assert finding.detail == "the CUDA driver does not tell the compute capability of device 0 (CUresult 500)"
