"""SGLang's functions that a step passes through, each with the method of the StepDriver that it calls."""

from __future__ import annotations

from typing import Any

from sglang_dcp.upstream.step.attached import after, around, before, driver_method
from sglang_dcp.upstream.step.runtime import Runtime


@around
def get_next_batch(runtime: Runtime, original: Any, scheduler: Any, running_batch: Any, last_batch: Any) -> Any:
    """AROUND Scheduler.get_next_batch_to_run."""
    return original(scheduler, running_batch=runtime.driver.rejoin(running_batch), last_batch=last_batch)


@around
def get_next_decode_batch(runtime: Runtime, original: Any, scheduler: Any, running_batch: Any) -> Any:
    """AROUND SchedulerDisaggregationDecodeMixin.get_next_disagg_decode_batch_to_run."""
    return original(scheduler, running_batch=runtime.driver.rejoin(running_batch))


@around
def update_running_batch(runtime: Runtime, original: Any, scheduler: Any, batch: Any) -> Any:
    """AROUND Scheduler.update_running_batch."""
    return original(scheduler, batch) if runtime.driver.secure(batch) else batch


@around
def alloc_decode(
    runtime: Runtime,
    original: Any,
    tree_cache: Any,
    seq_lens: Any,
    seq_lens_cpu: Any,
    last_loc: Any,
    token_per_req: int = 1,
    req_pool_indices: Any = None,
    batch: Any = None,
) -> Any:
    """AROUND alloc_paged_token_slots_decode."""
    ids = None if batch is None else runtime.driver.allocate(batch, seq_lens_cpu, last_loc)
    return original(tree_cache, seq_lens, seq_lens_cpu, last_loc, token_per_req, req_pool_indices, batch) if ids is None else ids


@before
def remember_batch(runtime: Runtime, adapter: Any, local_batch: Any) -> None:
    """BEFORE SchedulerDPAttnAdapter.prepare_mlp_sync_batch: what `tell` describes."""
    runtime.driver.batch = local_batch


local_columns = driver_method("tell")
"""AFTER MLPSyncBatchInfo._get_local_tensor."""


@after
def fallback_columns(runtime: Runtime, result: Any, *args: Any, **kwargs: Any) -> Any:
    """AFTER MLPSyncBatchInfo._get_fallback_tensor."""
    return runtime.sync_row.of_missing_rank(result)


@after
def after_gather(runtime: Runtime, result: None, info: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER MLPSyncBatchInfo.all_gather."""
    runtime.driver.settle(info)


after_forward = driver_method("account")
"""AFTER TpModelWorker.forward_batch_generation."""
