"""Homes behind prefill servers: a request's K/V comes some steps after its pages, and its first token with it."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from sglang_dcp.config import DynCpConfig
from sglang_dcp.ledger.participant import Participant
from sglang_dcp.upstream.disaggregation import preallocation
from sglang_dcp.upstream.step import attached, retraction
from sglang_dcp.upstream.step.retention import prefix_tokens
from testing.protocol.checks import WrittenKv
from testing.protocol.decode_queue import PreallocationQueue, stand_beside_prefill_servers
from testing.protocol.fakes import FakePool, ModelRequest
from testing.protocol.model import ProtocolModel
from testing.protocol.scheduler import ModelScheduler

LONGEST_TRANSFER = 6
"""Steps; the shortest is over in the round in which it began."""


class DecodeRequest(ModelRequest):
    """A request as SGLang's preallocation queue looks at it."""

    lora_id = bootstrap_room = None
    return_logprob = pd_rebootstrap_in_progress = False
    pd_rebootstrap_forced_output_id: int | None = None
    time_stats = SimpleNamespace(set_bootstrap_done_time=lambda: None, set_retract_time=lambda: None)
    was_aborted_waiting = False

    @property
    def finished_reason(self) -> Any:
        return FINISH_ABORT("aborted") if self.was_aborted_waiting else super().finished_reason

    def finished(self) -> bool:
        return self.was_aborted_waiting or super().finished()


class DecodeScheduler(ModelScheduler):
    """One home's queues as SGLang's decode server has them: for pages, for K/V, and `waiting_queue`, for the next batch.
    kv: of all homes."""

    kv: WrittenKv

    def __init__(self, config: DynCpConfig, participant: Participant, pool: FakePool, chunk_tokens: int) -> None:
        super().__init__(config, participant, pool, chunk_tokens)
        stand_beside_prefill_servers(self)
        page_size, longest = participant.page_size, participant.num_instances * participant.num_pages * participant.page_size
        self.disagg_decode_prealloc_queue = PreallocationQueue(self, pool, page_size, 10**6, 2 * page_size, longest)
        self.random = random.Random(participant.rank)
        self._steps_left: dict[int, int] = {}

    @property
    def requests(self) -> list[ModelRequest]:
        transfers: Any = self.disagg_decode_transfer_queue  # type: ignore[attr-defined]
        entries = [*self.disagg_decode_prealloc_queue.queue, *transfers.queue, *(held[0] for held in transfers._deferred_releases)]
        return super().requests + [entry.req for entry in entries]

    @property
    def num_waiting(self) -> int:
        return len(self.disagg_decode_prealloc_queue.queue)

    def add(self, req: ModelRequest) -> None:
        self.rows_by_slot[req.kv.req_pool_idx] = req
        self.disagg_decode_prealloc_queue.add(req)

    def schedule(self) -> None:
        attached.attach(self.runtime)
        self._finish()
        self._receive()
        super().schedule()

    def _receive(self) -> None:
        """A round of SGLang's queues: pages that are there, K/V that has come, and pages that a prefill server no longer writes to."""
        transfers: Any = self.disagg_decode_transfer_queue  # type: ignore[attr-defined]
        held, transfers._deferred_releases = transfers._deferred_releases, []
        for entry, steps in held:
            self._write(entry)  # until now
            if steps:
                transfers._deferred_releases.append((entry, steps - 1))
            else:
                self._release(entry.req)
        self.disagg_decode_prealloc_queue.pop()
        for entry in list(transfers.queue):
            left = self._steps_left.setdefault(id(entry), self.random.randrange(LONGEST_TRANSFER))
            self._steps_left[id(entry)] = left - 1
            if not left:
                del self._steps_left[id(entry)]
                transfers.queue.remove(entry)
                self._write(entry)
                self.waiting_queue.append(entry.req)

    def _write(self, entry: Any) -> None:
        """What the prefill server sends: what lies behind the prefix that it was told is here."""
        req = entry.req
        begin = 0 if entry.is_rebootstrap or req.dyncp is None else prefix_tokens(req, self.participant.page_size)
        self.kv.put(self.participant.rank, req, range(begin, req.kv.kv_allocated_len))

    def _prefill(self) -> list[tuple[ModelRequest, int, int]]:
        """Those whose K/V has come run, with the token that came with it; whom that ends is gone before the step's messages are made."""
        arrived, self.waiting_queue = self.waiting_queue, []
        preallocation.begin_behind_prefix(SimpleNamespace(reqs=arrived))
        for req in arrived:
            assert isinstance(req, DecodeRequest)
            forced, req.pd_rebootstrap_forced_output_id = req.pd_rebootstrap_forced_output_id, None
            req.output_ids.append(-int(req.rid[1:]) if forced is None else forced)
            req.pd_rebootstrap_in_progress = False
            self.running.append(req)
        self._finish()
        return []

    def abort(self, req: ModelRequest) -> None:
        """A request that waits for pages fails at the next look; one whose K/V is on its way may hold them until the prefill server has
        stopped; the others end as ever."""
        transfers: Any = self.disagg_decode_transfer_queue  # type: ignore[attr-defined]
        attached.attach(self.runtime)
        assert isinstance(req, DecodeRequest)
        entry = next((entry for entry in transfers.queue if entry.req is req), None)
        if entry is not None:
            transfers.queue.remove(entry)
            self._steps_left.pop(id(entry), None)
            req.aborted = True
            if self.random.random() < 0.5:
                transfers._deferred_releases.append((entry, self.random.randrange(LONGEST_TRANSFER)))
            else:
                self._release(req)
        elif any(waiting.req is req for waiting in self.disagg_decode_prealloc_queue.queue):
            req.was_aborted_waiting = True
        elif req in self.waiting_queue:
            self.waiting_queue.remove(req)
            req.aborted = True
            self._release(req)
        elif not any(held.req is req for held, _ in transfers._deferred_releases):
            super().abort(req)

    def _start_over(self, req: ModelRequest) -> None:
        retraction.start_over(self, req)


class DecodeServerModel(ProtocolModel):
    """`num_instances` such homes in lock step."""

    scheduler_class, request_class = DecodeScheduler, DecodeRequest

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for home in self.homes:
            assert isinstance(home, DecodeScheduler)
            home.kv = self.kv

    def arrive(self, home: int, prompt: int | list[int], max_new: int, *args: Any, **kwargs: Any) -> ModelRequest:
        """One in four is over with the token that comes with its K/V."""
        return super().arrive(home, prompt, 1 if self.random.random() < 0.25 else max_new, *args, **kwargs)
