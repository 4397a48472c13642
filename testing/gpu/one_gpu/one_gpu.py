"""SGLang plugin for tests: all ranks of a server on GPU 0. Right answers, meaningless speed.

NCCL refuses two ranks on one GPU of one host, so each rank names another host, and NCCL talks over loopback sockets. Needs
SGLANG_ONE_VISIBLE_DEVICE_PER_PROCESS=1, NCCL_SOCKET_IFNAME=lo and NCCL_IB_DISABLE=1 in the environment.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


def register() -> None:
    import sglang.srt.utils.common as common

    common.maybe_reindex_device_id = _first_device
    import sglang.srt.entrypoints.engine as engine
    import sglang.srt.managers.data_parallel_controller as controller

    for module in (controller, engine):
        module.maybe_reindex_device_id = _first_device


@contextlib.contextmanager
def _first_device(gpu_id: int) -> Iterator[int]:
    os.environ["NCCL_HOSTID"] = f"rank{gpu_id}"
    yield 0
