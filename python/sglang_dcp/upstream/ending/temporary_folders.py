"""Takes away temporary folders that libraries make in each process for its orderly end to remove: SGLang ends processes by SIGKILL.

They are known by whom they belong to, never by name: a machine's temporary folder holds other people's.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile

CUDA_TILE_VARIABLE = "CUDA_TILE_TEMP_DIR"
"""Where cuda.tile, which FlashInfer imports, compiles; unset, every process that imports it makes a folder."""

_shared: list[tempfile.TemporaryDirectory[str]] = []


def share_folder() -> None:
    """Before processes are started: they share one folder of this process. One that the user names stays as it is."""
    if not os.environ.get(CUDA_TILE_VARIABLE):
        _shared.append(tempfile.TemporaryDirectory(prefix="sglang_dcp_"))
        os.environ[CUDA_TILE_VARIABLE] = _shared[-1].name


def remove_folders() -> None:
    """For an end by os._exit: what this process and its children made. An orderly end of this process does it by itself."""
    shared = [folder.name for folder in _shared]
    user_named = os.environ.get(CUDA_TILE_VARIABLE) if not shared else None
    for folder in (*shared, _folder_of_cuda_tile(), _folder_of_metrics()):
        if folder not in (None, user_named):
            shutil.rmtree(folder, ignore_errors=True)


def _folder_of_cuda_tile() -> str | None:
    """This process may have imported it before a folder could be named."""
    module = sys.modules.get("cuda.tile._cext")
    return None if module is None else str(module.default_tile_context.config.temp_dir)


def _folder_of_metrics() -> str | None:
    """prometheus_client's files, one per process; inside a folder of the user's where PROMETHEUS_MULTIPROC_DIR named one."""
    made = getattr(sys.modules.get("sglang.srt.utils.common"), "prometheus_multiproc_dir", None)
    return None if made is None else str(made.name)
