"""The one meeting point of all instances in a step: what this one tells, the words that follow, and what the step then runs as."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sglang_dcp.dataflow.step_mode import STOCK, Eager, StepMode
from sglang_dcp.dataflow.transport.base import TransportError
from sglang_dcp.ledger import columns as col
from sglang_dcp.policy.split import num_pages
from sglang_dcp.upstream.step.managed import is_managed
from sglang_dcp.upstream.step.queued import with_pages, without_pages
from sglang_dcp.upstream.step.runtime import Runtime


def own_columns(runtime: Runtime, batch: Any, wanted_pages: int) -> list[int]:
    """Control columns of this instance. batch: SGLang's of the step, None where it has none. wanted_pages: see retention.py."""
    participant, own, scheduler = runtime.participant, runtime.own_batch, runtime.scheduler
    own.take(batch)
    rows = own.news()
    runtime.givable_pages = givable = runtime.pool.num_givable_pages()
    free = givable if scheduler.chunked_req is None else free_pages(runtime, givable)
    used_tokens = (participant.num_pages - givable - participant.retention.num_pages_here) * participant.page_size
    return participant.build_columns(rows, free, used_tokens, count_home_requests(runtime, batch), wanted_pages)


def count_home_requests(runtime: Runtime, batch: Any) -> int:
    """Running, waiting, sitting out, and those of the prefill that is about to run, which SGLang counts as none of these."""
    scheduler = runtime.scheduler
    is_prefill = batch is not None and batch is not scheduler.running_batch and batch.forward_mode.is_extend()
    prefilling = len(batch.reqs) if is_prefill else 0
    waiting = len(without_pages(scheduler)) + len(with_pages(scheduler))
    return len(scheduler.running_batch.reqs) + waiting + len(runtime.queues.parked) + prefilling


def free_pages(runtime: Runtime, givable: int) -> int:
    """Pages that guests may get now, of `givable` ones."""
    return max(0, givable - spoken_for(runtime))


def spoken_for(runtime: Runtime) -> int:
    """Pages that a local request in the middle of its prefill still needs: nobody else gets them, or SGLang would end at its next chunk."""
    chunked, page_size = runtime.scheduler.chunked_req, runtime.participant.page_size
    if chunked is None or is_managed(chunked):
        return 0
    left = len(chunked.full_untruncated_fill_ids) - chunked.kv.kv_allocated_len
    return max(0, num_pages(left, page_size)) + 1


def read_gathered(runtime: Runtime, info: Any) -> list[list[int]] | None:
    """Takes in all instances' columns. Returns the message words of all of them, None where nobody has any."""
    columns = [row[-col.NUM_COLUMNS :] for row in info.tp0_info_cpu.tolist()]
    most_words = runtime.participant.read_columns(columns)
    return exchange_words(runtime, [row[col.WORDS] for row in columns], most_words) if most_words else None


def exchange_words(runtime: Runtime, counts: Sequence[int], most: int) -> list[list[int]]:
    """All instances' message words. One all-gather, padded to the longest."""
    participant = runtime.participant
    own = torch.zeros(most, dtype=torch.int64)
    own[: len(participant.own_words)] = torch.tensor(participant.own_words, dtype=torch.int64)
    everybody = [torch.empty_like(own) for _ in range(participant.num_instances)]
    try:
        dist.all_gather(everybody, own, group=runtime.control_group)
    except RuntimeError as error:
        where = f"rank {participant.rank}, step {participant.step}"
        raise TransportError(f"{where}, control messages: peers did not answer ({error})") from error
    return [stream[:count].tolist() for stream, count in zip(everybody, counts, strict=True)]


def choose_mode(runtime: Runtime, info: Any) -> StepMode:
    """What the step runs as: all of it follows from what all instances know now. A graph runs on all of them or on none; the instances of
    an exchange group without sharded rows run SGLang's own layers beside the others. info: SGLang's record of the meeting; in an eager step
    everybody takes part whose group has sharded rows."""
    participant = runtime.participant
    if not participant.num_sharded_rows:
        return STOCK
    if runtime.graphs is not None and info.can_run_decode_cuda_graph:
        steady = participant.rows_steady and runtime.own_batch.steady
        graph = runtime.graphs.choose_step(runtime.mode, runtime.rows, info.global_num_tokens, steady=steady)
        if graph is not None:
            return graph
    # An instance without tokens skips attention altogether; one dummy token makes it take part in the exchange.
    busy = participant.busy_ranks
    info.global_num_tokens = [max(int(rank in busy), count) for rank, count in enumerate(info.global_num_tokens)]
    info.num_tokens = max(int(participant.rank in busy), info.num_tokens)
    info.can_run_decode_cuda_graph = info.can_run_prefill_cuda_graph = False
    return STOCK if participant.rank not in busy else Eager(runtime.rows, home_rows(runtime))


def home_rows(runtime: Runtime) -> list[Any]:
    """Rows of the own batch. SGLang's token table is read here, on the scheduler's stream, for all local requests at once."""
    local = [(req, prefix_len + num_new) for req, prefix_len, num_new in runtime.own_batch.spans if not is_managed(req)]
    return runtime.rows.home_rows(read_local_pages(runtime, local))


def read_local_pages(runtime: Runtime, lengths: Sequence[tuple[Any, int]]) -> Iterator[np.ndarray]:
    """Page numbers of local requests, given (request, tokens), in order. One read of SGLang's token table for all of them."""
    if not lengths:
        return iter(())
    page_size, table = runtime.participant.page_size, runtime.scheduler.req_to_token_pool.req_to_token
    lines = torch.tensor([req.kv.req_pool_idx for req, _ in lengths], device=table.device)
    first_tokens = table[:, : max(length for _, length in lengths) : page_size][lines].cpu().numpy().astype(np.int64)
    return (line[: -(-length // page_size)] // page_size for line, (_, length) in zip(first_tokens, lengths, strict=True))
