"""How long a request may be: over the pools that the policy lets one request use."""

from __future__ import annotations

from typing import Any

from sglang_dcp.config import DynCpConfig


def reach_tokens(pool_tokens: int, page_size: int) -> int:
    """Most tokens of one request in this process's server, each of whose pools holds `pool_tokens`."""
    from sglang.srt.runtime_context import get_parallel

    config = DynCpConfig.from_environment()
    if config is None:
        return pool_tokens
    return config.split_limits(int(get_parallel().num_dp_ranks), pool_tokens // page_size).reach_pages * page_size


def raise_worker_limits(result: tuple[Any, ...], worker: Any) -> tuple[Any, ...]:
    """AFTER TpModelWorker.get_worker_info: max_req_len [4] and max_req_input_len [5] follow the cluster, not one pool."""
    max_total_num_tokens, max_req_len, max_req_input_len = result[0], result[4], result[5]
    capacity = reach_tokens(max_total_num_tokens, worker.model_runner.page_size)
    raised = min(worker.model_config.context_len - 1, capacity - 1)
    return (*result[:4], raised, raised - (max_req_len - max_req_input_len), *result[6:])
