"""How long a request may be: over the pools that the policy lets one request use."""

from __future__ import annotations

from typing import Any

from sglang_dcp.config import DynCpConfig
from sglang_dcp.upstream.router.placement_request import most_pools


def pools_per_request() -> int:
    """Most pools that one request may use in this process's server."""
    from sglang.srt.runtime_context import get_parallel

    config = DynCpConfig.from_environment()
    return 1 if config is None else most_pools(config, int(get_parallel().num_dp_ranks))


def raise_worker_limits(result: tuple[Any, ...], worker: Any) -> tuple[Any, ...]:
    """AFTER TpModelWorker.get_worker_info: max_req_len [4] and max_req_input_len [5] follow the cluster, not one pool."""
    max_total_num_tokens, max_req_len, max_req_input_len = result[0], result[4], result[5]
    capacity = pools_per_request() * max_total_num_tokens
    raised = min(worker.model_config.context_len - 1, capacity - 1)
    return (*result[:4], raised, raised - (max_req_len - max_req_input_len), *result[6:])
