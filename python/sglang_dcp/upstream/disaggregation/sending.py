"""Prefill server of SGLang's, with this package installed: what a request's shards do not keep is not sent.

Nothing else of ours is in such a server. Without it every shard receives all of a request's K/V, and writes to its padding page what it
does not own.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from typing import Any

PADDING_PAGE = 0
PREFILL_VARIABLE = "SGLANG_DYNCP_PREFILL_SERVER"
"""Set to 1 by the main process of a prefill server, for its children."""


def is_prefill_server(environment: Mapping[str, str] = os.environ) -> bool:
    return environment.get(PREFILL_VARIABLE) == "1"


def mark_prefill_server(is_one: bool) -> None:
    """For the children of this process."""
    os.environ.pop(PREFILL_VARIABLE, None)
    if is_one:
        os.environ[PREFILL_VARIABLE] = "1"


def send_owned(original: Callable[..., int], *args: Any, **kwargs: Any) -> int:
    """AROUND MooncakeKVManager.send_kvcache and send_kvcache_slice: leaves out pages whose destination is the padding page."""
    bound = inspect.signature(original).bind(*args, **kwargs)
    call = bound.arguments
    sources, targets = call["prefill_kv_indices"], call["dst_kv_indices"]
    targets = targets[: len(sources)]
    kept = targets != PADDING_PAGE
    if not kept.all():
        if not kept.any():
            return 0
        call["prefill_kv_indices"], call["dst_kv_indices"] = sources[kept], targets[kept]
    return original(*bound.args, **bound.kwargs)


def read_indices_on_host() -> None:
    """On a CPU: MooncakeKVSender would read page numbers by pinned memory and a CUDA event."""
    from sglang.srt.disaggregation.mooncake.conn import MooncakeKVSender
    from sglang.srt.utils import is_cpu

    if is_cpu():
        MooncakeKVSender.supports_host_tensor_indices = False
