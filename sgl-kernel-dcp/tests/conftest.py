"""The two reasons for which a test here may be skipped."""

from __future__ import annotations

import os
import shutil

import pytest

# Instances are streams of one process here; each needs a hardware queue of its own, or one waits behind another.
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a Hopper GPU")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not any(item.get_closest_marker("gpu") for item in items):
        return
    import torch

    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no Hopper GPU on this machine"))


@pytest.fixture(scope="session")
def library():
    """The compiled kernels; compiling needs nvcc and no GPU."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc on this machine")
    from sgl_kernel_dcp.build import load_library

    return load_library()
