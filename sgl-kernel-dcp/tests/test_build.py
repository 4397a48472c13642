"""Building once for all ranks, with the compiler replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sgl_kernel_dcp import build

tvm_ffi_cpp = pytest.importorskip("tvm_ffi.cpp")


def test_the_lock_of_the_ranks_is_not_the_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """tvm-ffi locks a file in the folder too; were it ours, the first build would wait for itself."""
    from tvm_ffi.utils import FileLock

    calls = []

    def fake_build(name: str, *, build_directory: str, **given: Any) -> None:
        lock = FileLock(str(Path(build_directory) / "lock"))
        assert lock.acquire(), "held already"
        lock.release()
        (Path(build_directory) / f"{name}.so").touch()
        calls.append(name)

    monkeypatch.setenv(build.CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(tvm_ffi_cpp, "build", fake_build)
    assert build.build_library() == build.build_library() == build.build_directory() / "sgl_kernel_dcp.so"
    assert calls == ["sgl_kernel_dcp"]
