"""Checks that every page of this instance's pool has one owner: when it falls idle, and before every step where tests ask for it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from sglang_dcp.ledger.integrity import check_instance
from sglang_dcp.upstream.step.managed import is_managed
from sglang_dcp.upstream.step.queued import with_pages
from sglang_dcp.upstream.step.runtime import Runtime

CHECK_VARIABLE = "SGLANG_DYNCP_CHECK_EVERY_STEP"
"""Set to 1 by the tests."""


def every_round_asked_for(environment: Mapping[str, str] = os.environ) -> bool:
    return environment.get(CHECK_VARIABLE) == "1"


def check_when_due(runtime: Runtime) -> None:
    """Called at the start of a scheduling round, when the last step's batch is settled. An instance that is idle for many rounds, while
    others run, is looked at once."""
    idle = runtime.scheduler.is_fully_idle()
    if runtime.audit_every_round or (idle and not runtime.idle_audited):
        check_integrity(runtime)
    runtime.idle_audited = idle


def check_integrity(runtime: Runtime) -> None:
    """Every page: free, in the prefix cache, of a local request, of a managed request, of a retained sequence, or lent to a guest.

    Raises IntegrityError.
    """
    participant, scheduler = runtime.participant, runtime.scheduler
    page_size = participant.page_size
    row_pages: list[int] = []
    for req in (*scheduler.invariant_checker._requests_owning_rows(), *with_pages(scheduler)):
        if req.kv.holds_kv and not is_managed(req):
            row = scheduler.req_to_token_pool.req_to_token[req.kv.req_pool_idx]
            ids = row[req.kv.cache_protected_len : req.kv.kv_allocated_len : page_size]
            row_pages += (ids // page_size).tolist()
    cached = scheduler.tree_cache.all_values_flatten()[::page_size] // page_size
    check_instance(
        participant.num_pages,
        {
            "the free list": runtime.pool.get_all_free_pages().tolist(),
            "the prefix cache": cached.tolist(),
            "a local request": row_pages,
            "a managed request": participant.homes.local_pages(),
            "a retained sequence": [*participant.homes.retained.local_pages(), *participant.guests.all_retained_pages()],
            "a guest": participant.guests.all_pages(),
        },
    )
