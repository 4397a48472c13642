"""The pools of all instances as destinations of one request's K/V. Its home tells the prefill server of them; the others stay passive.

A prefill server of SGLang's starts when a request has as many destinations as each of their messages says, and sends every chunk to all of
them, by position in their page lists. So each shard's list is as long as the prompt, with page 0, SGLang's padding page, where a page lies
elsewhere. All success and failure goes to the address in the messages, the home's; the first token goes to a slot per destination, which
nobody reads but at home.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist

from sglang_dcp.ledger.page_ids import PageIds
from sglang_dcp.upstream.step.queued import behind_prefill_servers

PADDING_PAGE = 0
SESSION = 3
"""Where Mooncake's messages name the destination: tests and `introduce` check it."""


class TransferError(RuntimeError):
    """Instances cannot be destinations of one request; the message says why."""


@dataclass(frozen=True)
class Destination:
    """An instance as its transfer engine presents itself. slot: where first tokens that nobody reads are written."""

    session: bytes
    registration: list[bytes]
    slot: int


@dataclass(frozen=True)
class Destinations:
    """of: by rank. own: this instance's rank."""

    own: int
    of: tuple[Destination, ...]

    @property
    def others(self) -> Iterator[Destination]:
        return (destination for rank, destination in enumerate(self.of) if rank != self.own)


def introduce(scheduler: Any, rank: int, group: Any) -> Destinations | None:
    """Every instance calls it: they learn of each other's pools. None where no K/V is transferred."""
    if not behind_prefill_servers(scheduler):
        return None
    manager = scheduler.disagg_decode_prealloc_queue.kv_manager
    if not hasattr(manager, "get_session_id"):  # SGLang's fake transfer
        return None
    if manager.kv_args.state_types:
        raise TransferError(f"instance {rank}: {manager.kv_args.state_types} are sent beside K/V, and live in the home's pool alone")
    slot = scheduler.req_to_metadata_buffer_idx_allocator.alloc()
    session, registration = manager.get_session_id().encode("ascii"), manager.build_receiver_registration_message()
    if slot is None or registration[SESSION] != session:
        raise TransferError(f"instance {rank}: {registration[SESSION]!r} in its registration is not its session {session!r}")
    everybody: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everybody, Destination(session, registration, slot), group=group)
    return Destinations(rank, tuple(everybody))


def page_lists(ids: PageIds, page_ids: np.ndarray) -> dict[int, np.ndarray]:
    """int32 page numbers, as long as page_ids, per instance that holds one, and of the home: PADDING_PAGE where a page lies elsewhere.

    page_ids: integers, of the request's pages as its home names them.
    """
    distances, numbers = np.divmod(np.asarray(page_ids, dtype=np.int64), ids.stride)
    owners = (ids.home + distances) % ids.num_instances
    return {
        int(rank): np.where(owners == rank, numbers, PADDING_PAGE).astype(np.int32)
        for rank in sorted({ids.home, *np.unique(owners).tolist()})
    }
