"""One home's queues and its step, around the code that serves."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from sglang_dcp.config import DynCpConfig
from sglang_dcp.ledger.participant import Participant
from sglang_dcp.upstream.step.admission import ask_again, reserved, sweep_waiting, takes_over
from sglang_dcp.upstream.step.elsewhere import ask_elsewhere
from sglang_dcp.upstream.step.looking_again import holds_up_others, look_again, note_blocked
from sglang_dcp.upstream.step.retention import begin_behind_prefix, end_request, wanted_pages
from sglang_dcp.upstream.step.retraction import place_again
from sglang_dcp.upstream.step.runtime import Runtime
from sglang_dcp.upstream.step.sitting_out import find_leavers, has_room, secure_next_token
from sglang_dcp.upstream.step.sync import free_pages
from testing.protocol.fakes import FakePool, ModelRequest


class ModelScheduler:
    """One home's queues, and a step of it: retract, rejoin, prefill or decode. Stands where SGLang's Scheduler stands.

    decode_interval: steps that decode behind each that prefills, as --prefill-decode-interval says."""

    def __init__(self, config: DynCpConfig, participant: Participant, pool: FakePool, chunk_tokens: int) -> None:
        self.participant, self.pool, self.chunk_tokens = participant, pool, chunk_tokens
        self.waiting_queue: list[ModelRequest] = []
        self.running: list[ModelRequest] = []
        self.chunked_req: ModelRequest | None = None
        self.runtime = Runtime(self, config, participant, pool, None, None)  # type: ignore[arg-type]
        self.batch: list[tuple[ModelRequest, int, int]] = []
        self.decodes = False
        self.rows_by_slot: dict[int, ModelRequest] = {}
        self.req_to_token_pool = self
        self.running_batch = SimpleNamespace(batch_is_full=False, reqs=self.running)
        self.done: list[ModelRequest] = []
        self.num_retractions = self.num_adoptions = self.num_cached_tokens = 0
        self.tree_cache = self
        self.wanted = 0
        self.decode_interval = self._deferred = 0

    @property
    def req_to_token(self) -> ModelScheduler:
        return self

    def __getitem__(self, key: tuple[int, slice]) -> np.ndarray:
        """req_to_token[slot, :length:page_size]: first token id of each page of a local request."""
        slot, span = key
        self.num_adoptions += 1
        return np.array(self.rows_by_slot[slot].pages[: -(-span.stop // span.step)]) * span.step

    @property
    def requests(self) -> list[ModelRequest]:
        chunked = [self.chunked_req] if self.chunked_req is not None else []
        return self.waiting_queue + self.running + self.runtime.queues.parked + chunked

    @property
    def num_waiting(self) -> int:
        """Requests that wait for pages."""
        return len(self.waiting_queue)

    def add(self, req: ModelRequest) -> None:
        """Likewise attach_placement."""
        self.rows_by_slot[req.kv.req_pool_idx] = req
        self.waiting_queue.append(req)
        if req.dyncp_placement is not None and not req.dyncp_placement.is_local:
            self.running_batch.batch_is_full = False

    def schedule(self) -> None:
        num_running = len(self.running)
        self._finish()
        if len(self.running) < num_running:
            self.running_batch.batch_is_full = False
        look_again(self.runtime, self.running_batch)
        self._retract()
        back = [req for req in self.runtime.queues.parked if has_room(self.runtime, req)]
        self.runtime.queues.parked = [req for req in self.runtime.queues.parked if req not in back]
        self.running += back
        self.batch = [] if self._deferred > 0 and self.running else self._prefill()
        self.decodes = not self.batch
        self._deferred = self._deferred - 1 if self.decodes else self.decode_interval
        if self.decodes:
            self.batch = self._decode()
        sweep_waiting(self.runtime)
        ask_again(self.runtime)
        self.running_batch.reqs = self.running
        self.wanted = wanted_pages(self.runtime)
        ask_elsewhere(self.runtime)

    def columns(self) -> list[int]:
        own = self.runtime.own_batch
        if self.decodes:
            lengths: Any = np.array([prefix_len + 1 for _, prefix_len, _ in self.batch], dtype=np.int64)
            own.take_decode([req for req, _, _ in self.batch], lengths)
            assert [prefix_len for _, prefix_len, _ in own.spans] == [prefix_len for _, prefix_len, _ in self.batch]
        else:
            own.take_extend(self.batch)
        rows = own.news()
        self.runtime.givable_pages = givable = self.pool.num_givable_pages()
        used = (self.participant.num_pages - givable - self.participant.retention.num_pages_here) * self.participant.page_size
        num_requests = len(self.waiting_queue) + len(self.running)
        return self.participant.build_columns(rows, free_pages(self.runtime, givable), used, num_requests, self.wanted)

    def complete_batch(self) -> None:
        """The step's tokens are sampled."""
        for req, prefix_len, num_new in self.batch:
            if prefix_len + num_new == len(req.full_untruncated_fill_ids):
                req.output_ids.append(-int(req.rid[1:]))
        self.batch = []

    def abort(self, req: ModelRequest) -> None:
        if req in self.waiting_queue:
            self.waiting_queue.remove(req)
            return
        if req in self.runtime.queues.parked:
            self.runtime.queues.parked.remove(req)
        elif req is self.chunked_req:
            self.chunked_req = None
        else:
            self.running.remove(req)
        req.aborted = True
        self._release(req)

    def _finish(self) -> None:
        over = [req for req in self.running if req.finished()]
        self.running = [req for req in self.running if not req.finished()]
        for req in over:
            self._release(req)
            req.finished_in_step = self.participant.step
            self.done.append(req)

    def _release(self, req: ModelRequest) -> None:
        if req.dyncp is not None:
            req.was_managed = True
            end_request(self.runtime, req.dyncp)
        else:
            self.pool.return_pages(req.pages)
        req.pages = []
        req.kv.kv_allocated_len = req.kv.cache_protected_len = 0

    def _retract(self) -> None:
        for request in self.participant.victims:
            req = next((req for req in self.runtime.queues.parked if req.dyncp is request), None)
            if req is None:
                assert request.handle not in self.participant.homes.requests, f"victim {request.handle} does not sit out"
                continue
            self.runtime.queues.parked.remove(req)
            self._release(req)
            req.dyncp = None
            before, is_free = req.dyncp_placement, req.dyncp_placement is None or req.dyncp_placement_flexible
            place_again(self.runtime, req)
            after, tokens = req.dyncp_placement, len(req.full_untruncated_fill_ids) + 2 * self.participant.page_size
            assert is_free or before.is_local or after == before, f"{req.rid} had the pin {before}, is placed {after}"
            fits_one = is_free and tokens <= self.participant.num_pages * self.participant.page_size
            assert not fits_one or after is None or after.degree == 1, f"{req.rid} fits one pool, is placed {after}"
            self._start_over(req)
            self.num_retractions += 1
        self.participant.victims = []

    def _start_over(self, req: ModelRequest) -> None:
        self.waiting_queue.insert(0, req)

    def _prefill(self) -> list[tuple[ModelRequest, int, int]]:
        batch: list[tuple[ModelRequest, int, int]] = []
        if not self.running:
            self.running_batch.batch_is_full = False
        if self.running_batch.batch_is_full and self.chunked_req is None:
            return batch
        budget, refused = self.chunk_tokens, False
        if self.chunked_req is not None:
            budget = self._add_chunk(self.chunked_req, budget, batch)
        blocked = self.chunked_req is not None and self.chunked_req.dyncp is None
        for req in list(self.waiting_queue):
            placement = req.dyncp_placement
            if placement is None or (placement.is_local and req.dyncp is None and not takes_over(self.runtime, req)):
                # A local request that finds no room holds back local ones only: what runs must never wait for what has not started.
                if not blocked and not self._fits(req, batch):
                    note_blocked(self.runtime, req)
                    blocked = refused = True
                if blocked or self.chunked_req is not None or budget <= 0:
                    continue
            elif not reserved(self.runtime, req) or self.chunked_req is not None or budget <= 0:
                continue
            self.waiting_queue.remove(req)
            budget = self._add_chunk(req, budget, batch)
        if refused and not holds_up_others(self.runtime):
            self.running_batch.batch_is_full = bool(batch or self.running)
        return batch

    def _fits(self, req: ModelRequest, batch: list[tuple[ModelRequest, int, int]]) -> bool:
        pages = -(-len(req.full_untruncated_fill_ids) // self.participant.page_size) + 1
        started = sum(1 for other, _, _ in batch if other.dyncp is None)
        return pages + started + self.participant.withheld_pages <= self.pool.num_givable_pages()

    def _add_chunk(self, req: ModelRequest, budget: int, batch: list[tuple[ModelRequest, int, int]]) -> int:
        if req.dyncp is not None and not req.kv.holds_kv:
            begin_behind_prefix(req, self.participant.page_size)
            req.kv.kv_allocated_len = req.prefix_len
            self.num_cached_tokens += req.prefix_len
        start, total = req.kv.kv_allocated_len, len(req.full_untruncated_fill_ids)
        count = min(budget, total - start)
        self._allocate(req, start + count)
        batch.append((req, start, count))
        if start + count == total:
            self.chunked_req = None if req is self.chunked_req else self.chunked_req
            self.running.append(req)
        else:
            self.chunked_req = req
        return budget - count

    def _decode(self) -> list[tuple[ModelRequest, int, int]]:
        self.pool.settle_decode_claims()
        places = find_leavers(self.runtime, SimpleNamespace(reqs=self.running, seq_lens_cpu=self._lengths()))
        leave = [req for i, req in enumerate(self.running) if i in places]
        self.runtime.queues.parked += leave
        self.running = stay = [req for req in self.running if req not in leave]
        self._check_asked_ahead()
        self.pool.settle_decode_claims()
        lengths, batch = self._lengths() + 1, []
        begin = np.flatnonzero(lengths % self.participant.page_size == 1 % self.participant.page_size).tolist()
        assert list(self.runtime.own_batch.beginning_page(stay, lengths)) == begin
        for req in stay:
            length = req.kv.kv_allocated_len
            self._allocate(req, length + 1)
            batch.append((req, length, 1))
        return batch

    def _check_asked_ahead(self) -> None:
        """Few were looked at for the step's new token. Of those whose pages come from elsewhere, whoever had to ask was among them."""
        num_messages = len(self.participant.outbox)
        for req in self.running:
            if req.dyncp is not None and not self.participant.may_grow_at_home(req.dyncp):
                assert secure_next_token(self.runtime, req), f"{req.rid} has no page for its next token, and decodes on"
                assert len(self.participant.outbox) == num_messages, f"{req.rid} was passed over, and had to ask"

    def _lengths(self) -> Any:
        return np.array([req.kv.kv_allocated_len for req in self.running], dtype=np.int64)

    def _reqs_finishing_inflight(self, batch: Any) -> list[ModelRequest]:
        return []

    def _allocate(self, req: ModelRequest, length: int) -> None:
        start, page_size = req.kv.kv_allocated_len, self.participant.page_size
        if req.dyncp is not None:
            req.pages = []
            last = (length - 1) // page_size
            assert last < len(req.dyncp.pages) and None not in req.dyncp.pages[start // page_size : last + 1], "a token without a page"
        else:
            pages = self.pool.take_pages(-(-length // page_size) - len(req.pages))
            assert pages is not None, "local allocation failed: SGLang would end the process here"
            req.pages += pages
        req.kv.kv_allocated_len = length
