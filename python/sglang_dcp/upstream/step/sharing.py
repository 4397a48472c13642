"""Several requests that read one prefix at once: many questions to one document.

A request that runs keeps its pages, so nobody can take them over. When another one of its home begins alike, what they have in common
becomes a retained sequence that both read. One that begins like a request which is still to compute it waits for that, if it is worth it.
"""

from __future__ import annotations

from typing import Any

from sglang_dcp.ledger.homes import HomeRequest
from sglang_dcp.ledger.prefix_index import common_pages
from sglang_dcp.policy.prefix_digests import DIGEST_BYTES
from sglang_dcp.upstream.step.prefixes import digests_of, is_on, is_plain, protect_borrowed
from sglang_dcp.upstream.step.runtime import Runtime

LEAST_SHARE = 0.5
"""Of a prompt's pages, for which it waits until another request has computed them, and of that one's: else it may wait for the pages of a
prompt that is many times as long, and for all of that to be computed."""


def has_computed(runtime: Runtime, req: Any) -> bool:
    """Whether all K/V of a managed request's prompt is in its pages: it has joined the requests that decode."""
    return any(other is req for other in (*runtime.scheduler.running_batch.reqs, *runtime.queues.parked))


def waits_for_another(runtime: Runtime, req: Any) -> bool:
    """Whether a request that has not asked for pages yet leaves the computing of its prefix to one before it."""
    requests = runtime.participant.homes.requests
    if not requests or not is_on(runtime) or not is_plain(req):
        return False
    if (handle := getattr(req, "dyncp_leader", None)) is None:
        handle = req.dyncp_leader = _find_leader(runtime, req)
    leader = requests.get(handle)
    return leader is not None and not has_computed(runtime, leader.owner)


def _find_leader(runtime: Runtime, req: Any) -> int:
    """Handle of the request that is to compute the longest part of this one's prompt; 0 where none is worth to wait for."""
    best = _longest_alike(runtime, req, computed=False)
    return best[0].handle if best else 0


def share_with(runtime: Runtime, req: Any, beyond: int, most_pages: int, degree: int | None) -> bool:
    """Makes a retained sequence of what a running request has in common with a prompt, where that is more than `beyond` pages."""
    best = _longest_alike(runtime, req, computed=True)
    if best is None:
        return False
    leader, num_pages = best[0], min(best[1], most_pages)
    least = max(beyond, leader.num_borrowed) + 1
    worth_it = num_pages >= least and num_pages * runtime.participant.page_size >= runtime.config.cache_min_tokens
    pages = leader.pages[:num_pages]
    if not worth_it or None in pages or (degree is not None and len({page.owner for page in pages if page is not None}) > degree):
        return False
    runtime.participant.share(leader, req.dyncp_digests[: num_pages * DIGEST_BYTES], num_pages)
    protect_borrowed(leader.owner, runtime.participant.page_size)
    return True


def _longest_alike(runtime: Runtime, req: Any, *, computed: bool) -> tuple[HomeRequest, int] | None:
    """The managed request of this home whose prompt has most whole pages in common, and how many. computed: one that decodes, else one
    that does not yet and is worth to wait for."""
    digests, best = digests_of(runtime, req), None
    for request in runtime.participant.homes.requests.values():
        owner = request.owner
        if owner is None or owner is req or request.num_tree_pages or not is_plain(owner):
            continue
        theirs = digests_of(runtime, owner)
        num_pages = common_pages(theirs, digests)
        if not computed and num_pages * DIGEST_BYTES < LEAST_SHARE * max(len(theirs), len(digests)):
            continue
        # One token stays its own: SGLang frees what a request has behind what it reads, and must find something.
        num_pages = min(num_pages, (len(owner.origin_input_ids) - 1) // runtime.participant.page_size)
        if num_pages > (best[1] if best else 0) and has_computed(runtime, owner) is computed:
            best = request, num_pages
    return best
