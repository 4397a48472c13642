"""The process environment in which SGLang serves on a CPU. It must be complete before Python imports SGLang.

Standard library only: `sglang-dcp serve` decides here and then replaces itself by the server.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

STAND_IN_FOLDER = Path(__file__).parent / "standin"
COMPUTE_CAPABILITY = (75, 76)
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of the CUDA driver."""


def count_cuda_devices() -> int | None:
    """Number of CUDA devices by the driver's own count; None where no driver can be loaded."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    if driver.cuInit(0) != 0:
        return 0
    count = ctypes.c_int(0)
    if driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def cuda_capabilities() -> list[tuple[int, int]]:
    """Compute capability (major, minor) of every CUDA device, by the driver; empty without one. OSError where the driver does not say."""
    devices = count_cuda_devices()
    if not devices:
        return []
    driver = ctypes.CDLL("libcuda.so.1")
    found = []
    for place in range(devices):
        device, major, minor = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(0)
        status = driver.cuDeviceGet(ctypes.byref(device), place)
        for number, attribute in zip((major, minor), COMPUTE_CAPABILITY, strict=True):
            status = status or driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        if status:
            raise OSError(f"the CUDA driver does not tell the compute capability of device {place} (CUresult {status})")
        found.append((major.value, minor.value))
    return found


def bind_ranks_to_cores(num_ranks: int, cores: Sequence[int]) -> str:
    """One core per rank, round robin over `cores`, in the form of SGLANG_CPU_OMP_THREADS_BIND ("0|1|0|1")."""
    if num_ranks < 1 or not cores:
        raise ValueError(f"cannot bind {num_ranks} ranks to cores {list(cores)}")
    return "|".join(str(cores[rank % len(cores)]) for rank in range(num_ranks))


def available_cores() -> list[int]:
    """Cores that this process may use."""
    return sorted(os.sched_getaffinity(0))


def cpu_additions(num_ranks: int, current: Mapping[str, str], *, has_cuda_driver: bool) -> dict[str, str]:
    """Variables to set for a CPU server of `num_ranks` ranks. A binding or thread count that is set already stays.

    SGLang reads SGLANG_USE_CPU_ENGINE when it is imported, and binds ranks to NUMA nodes unless it is told cores, which fails
    with more ranks than nodes. The stand-in is added only without a CUDA driver: with one the real package loads.
    """
    additions = {"SGLANG_USE_CPU_ENGINE": "1"}
    if "SGLANG_CPU_OMP_THREADS_BIND" not in current:
        additions["SGLANG_CPU_OMP_THREADS_BIND"] = bind_ranks_to_cores(num_ranks, available_cores())
    if "OMP_NUM_THREADS" not in current:
        additions["OMP_NUM_THREADS"] = "1"
    if not has_cuda_driver:
        parts = [part for part in current.get("PYTHONPATH", "").split(os.pathsep) if part and part != str(STAND_IN_FOLDER)]
        additions["PYTHONPATH"] = os.pathsep.join([str(STAND_IN_FOLDER), *parts])
    return additions
