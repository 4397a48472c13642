"""Compiles the kernels at first use and keeps the result. No torch ABI: the library speaks the stable tvm-ffi calling convention."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

CUDA_ARCHITECTURE = "9.0"
CACHE_VARIABLE = "SGLANG_KERNEL_DCP_CACHE"
CUDA_FLAGS = ["--expt-relaxed-constexpr", "-lineinfo"]


def source_root() -> Path:
    """The folder that holds include/ and csrc/: beside the package when installed, two levels up in a checkout."""
    package = Path(__file__).resolve().parent
    for root in (package, package.parents[1]):
        if (root / "csrc").is_dir() and (root / "include").is_dir():
            return root
    raise FileNotFoundError(f"sgl_kernel_dcp: no csrc/ and include/ in {package} or {package.parents[1]}")


def source_files() -> list[Path]:
    root = source_root()
    return sorted([*(root / "csrc").glob("*"), *(root / "include").rglob("*.cuh")])


def build_directory() -> Path:
    """One folder per content of the sources, flags and tvm-ffi version, so that a change never meets an old library."""
    import tvm_ffi

    digest = hashlib.sha256(repr((CUDA_FLAGS, CUDA_ARCHITECTURE, tvm_ffi.__version__)).encode())
    for path in source_files():
        digest.update(path.name.encode() + path.read_bytes())
    cache = os.environ.get(CACHE_VARIABLE) or str(Path.home() / ".cache" / "sgl_kernel_dcp")
    return Path(cache) / digest.hexdigest()[:16]


def cuda_library_directories() -> list[Path]:
    """Where libcudart may lie; tvm-ffi looks only beside nvcc, which some systems reach through a wrapper."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    nvcc = shutil.which("nvcc")
    roots += [Path(nvcc).resolve().parents[1]] if nvcc else []
    roots.append(Path("/usr/local/cuda"))
    return [root / "lib64" for root in roots if (root / "lib64").is_dir()]


def build_library() -> Path:
    """Compiles (or finds) the shared library and returns its path. Needs nvcc and no GPU."""
    import tvm_ffi.cpp

    os.environ.setdefault("TVM_FFI_CUDA_ARCH_LIST", CUDA_ARCHITECTURE)
    target = build_directory()
    library = target / "sgl_kernel_dcp.so"
    if library.is_file() and (target / "complete").is_file():
        return library
    target.mkdir(parents=True, exist_ok=True)
    # Ranks of a server come here together; one compiles. tvm-ffi takes a lock of its own, the file "lock" in this folder.
    with (target / "ranks.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "complete").is_file():
            tvm_ffi.cpp.build(
                "sgl_kernel_dcp",
                sources=[str(path) for path in source_files() if path.suffix == ".cu"],
                extra_cuda_cflags=CUDA_FLAGS,
                extra_ldflags=[f"-L{path}" for path in cuda_library_directories()],
                extra_include_paths=[str(source_root() / "include")],
                build_directory=str(target),
                backend="cuda",
            )
            (target / "complete").touch()
    return library


@functools.cache
def load_library() -> Any:
    """The loaded tvm-ffi module; its functions are those exported in csrc/."""
    import tvm_ffi

    return tvm_ffi.load_module(str(build_library()))
