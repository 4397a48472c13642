"""The one meeting point of all instances in a step: our columns on SGLang's all-gather, then messages, grants and rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sglang_dcp.dataflow.contracts import HomeRow
from sglang_dcp.dataflow.transport.base import TransportError
from sglang_dcp.upstream.layers.graphs import engine
from sglang_dcp.upstream.step import columns as col
from sglang_dcp.upstream.step.binding import Binding, current
from sglang_dcp.upstream.step.elsewhere import ask_elsewhere
from sglang_dcp.upstream.step.instance import is_managed


def remember_batch(original: Callable[..., Any], adapter: Any, local_batch: Any, *args: Any, **kwargs: Any) -> Any:
    """AROUND SchedulerDPAttnAdapter.prepare_mlp_sync_batch: the columns describe this batch."""
    binding = current()
    if binding is None:
        return original(adapter, local_batch, *args, **kwargs)
    binding.local_batch = local_batch
    try:
        return original(adapter, local_batch, *args, **kwargs)
    finally:
        binding.local_batch = None


def local_columns(result: torch.Tensor, info: Any, device: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """AFTER MLPSyncBatchInfo._get_local_tensor."""
    binding = current()
    if binding is None:
        return result
    began = perf_counter()
    instance, batch = binding.instance, binding.own_batch
    sweep_waiting(binding)
    ask_elsewhere(binding)
    batch.take(binding.local_batch)
    rows = None if batch.steady else batch.sharded_rows()
    binding.givable_pages = givable = instance.pool.num_givable_pages()
    used_tokens = (instance.num_pages - givable) * instance.page_size
    own = instance.build_columns(rows, free_pages(binding, givable), used_tokens, count_home_requests(binding))
    wide = binding.own_row.widen(result, own)
    binding.host_clock.spent("columns", perf_counter() - began)
    return wide


def count_home_requests(binding: Binding) -> int:
    """Running, waiting, sitting out, and those of the prefill that is about to run, which SGLang counts as none of these."""
    scheduler, batch = binding.scheduler, binding.local_batch
    is_prefill = batch is not None and batch is not scheduler.running_batch and batch.forward_mode.is_extend()
    prefilling = len(batch.reqs) if is_prefill else 0
    return len(scheduler.running_batch.reqs) + len(scheduler.waiting_queue) + len(binding.parked) + prefilling


def fallback_columns(result: torch.Tensor, info: Any, device: Any, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """AFTER MLPSyncBatchInfo._get_fallback_tensor: the row of a rank that is gone. SGLang makes one in every step, of constants alone; if
    another release does not, check_upstream.py tells."""
    binding = current()
    if binding is None:
        return result
    if binding.fallback_row is None:
        binding.fallback_row = torch.nn.functional.pad(result, (0, col.NUM_COLUMNS))
    return binding.fallback_row


def after_gather(result: Any, info: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER MLPSyncBatchInfo.all_gather: messages, grants, row tables; every rank runs the layers when a row is sharded."""
    binding = current()
    if binding is None:
        return
    began = perf_counter()
    settle_step(binding, info)
    binding.host_clock.spent("settle", perf_counter() - began)


def settle_step(binding: Binding, info: Any) -> None:
    """What all instances do alike with the step's columns."""
    instance = binding.instance
    columns = [row[-col.NUM_COLUMNS :] for row in info.tp0_info_cpu.tolist()]
    most_words = instance.read_columns(columns)
    words = exchange_words(binding, [row[col.WORDS] for row in columns], most_words) if most_words else None
    binding.host_clock.end_step(ran=binding.step_ran, sharded=instance.num_sharded_rows > 0)
    binding.step_ran = max(info.global_num_tokens) > 0
    instance.finish_step(words, anybody_runs=binding.step_ran)
    if binding.metrics is not None:
        binding.metrics.after_step(binding)
    instance.admission_waits.clear()  # nobody else takes them where there are no metrics
    instance.plan = None
    binding.pending_rows = None
    plan_graph(binding, info)
    if instance.num_sharded_rows and not binding.graph_guest_rows:
        # An instance without tokens skips attention altogether; one dummy token makes it take part in the exchange.
        info.global_num_tokens = [max(1, count) for count in info.global_num_tokens]
        info.num_tokens = max(1, info.num_tokens)
        # All instances come to this alike, so all of them run the step without a graph.
        info.can_run_decode_cuda_graph = info.can_run_prefill_cuda_graph = False
        binding.pending_rows = home_rows(binding)


def plan_graph(binding: Binding, info: Any) -> None:
    """Sets graph_guest_rows: those of the graph that this step runs as. 0: it is not sharded, extends somewhere, or fits no graph."""
    graphs = engine()
    if graphs is None or not binding.instance.num_sharded_rows or not info.can_run_decode_cuda_graph:
        binding.graph_guest_rows, binding.graph_step = 0, None
        return
    graphs.plan_step(binding, info.global_num_tokens)


def exchange_words(binding: Binding, counts: Sequence[int], most: int) -> list[list[int]]:
    """All instances' message words. One all-gather, padded to the longest."""
    instance = binding.instance
    own = torch.zeros(most, dtype=torch.int64)
    own[: len(instance.own_words)] = torch.tensor(instance.own_words, dtype=torch.int64)
    everybody = [torch.empty_like(own) for _ in range(instance.num_instances)]
    try:
        dist.all_gather(everybody, own, group=binding.control_group)
    except RuntimeError as error:
        raise TransportError(f"rank {instance.rank}, step {instance.step}, control messages: peers did not answer ({error})") from error
    return [stream[:count].tolist() for stream, count in zip(everybody, counts, strict=True)]


def home_rows(binding: Binding) -> list[HomeRow]:
    """Every request of the own batch, sharded or not: in a step with sharded rows ours attends them all."""
    instance, rows, start = binding.instance, [], 0
    spans = binding.own_batch.spans
    local_pages = read_local_pages(binding, [(req, prefix_len + num_new) for req, prefix_len, num_new in spans if not is_managed(req)])
    for req, prefix_len, num_new in spans:
        if is_managed(req):
            rows.append(instance.managed_row(req.dyncp, start, num_new, prefix_len))
        else:
            numbers = next(local_pages)
            rows.append(HomeRow(start, num_new, prefix_len, np.full(len(numbers), instance.rank, dtype=np.int64), numbers))
        start += num_new
    return rows


def read_local_pages(binding: Binding, lengths: Sequence[tuple[Any, int]]) -> Iterator[np.ndarray]:
    """Page numbers of local requests, given (request, tokens), in order. One read of SGLang's token table for all of them."""
    if not lengths:
        return iter(())
    page_size, table = binding.instance.page_size, binding.scheduler.req_to_token_pool.req_to_token
    lines = torch.tensor([req.kv.req_pool_idx for req, _ in lengths], device=table.device)
    first_tokens = table[:, : max(length for _, length in lengths) : page_size][lines].cpu().numpy().astype(np.int64)
    return (line[: -(-length // page_size)] // page_size for line, (_, length) in zip(first_tokens, lengths, strict=True))


def free_pages(binding: Binding, givable: int) -> int:
    """Pages that guests may get now, of `givable` ones. What a local request in the middle of its prefill still needs is not free."""
    instance, chunked = binding.instance, binding.scheduler.chunked_req
    spoken_for = 0
    if chunked is not None and not is_managed(chunked):
        left = len(chunked.full_untruncated_fill_ids) - chunked.kv.kv_allocated_len
        spoken_for = max(0, -(-left // instance.page_size)) + 1
    return max(0, givable - spoken_for)


def sweep_waiting(binding: Binding) -> None:
    """Gives back reservations of requests that left the queue without ever running (abort, timeout, queue limit)."""
    if not binding.waiting:
        return
    queued = {req.rid for req in binding.scheduler.waiting_queue}
    for handle, req in list(binding.waiting.items()):
        if req.kv.holds_kv or req.dyncp is None or req.dyncp.handle != handle:
            del binding.waiting[handle]
        elif req.rid not in queued:
            binding.instance.release(req.dyncp)
            req.dyncp = None
            del binding.waiting[handle]
