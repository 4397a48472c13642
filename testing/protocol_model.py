"""N instances' protocol without SGLang: random requests driven through the real books, messages, admission and decode decisions.

What is SGLang's in a server is a small fake here: the page pool, the scheduler's queues, requests whose tokens are only counted. What is
ours is the code that serves: `Participant`, and what admission.py, sitting_out.py, retraction.py and sync.py decide about pages.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from sglang_dcp.config import DynCpConfig
from sglang_dcp.ledger.integrity import check_instance
from sglang_dcp.ledger.messages import Granted, Release, Retain
from sglang_dcp.ledger.page_ids import Page
from sglang_dcp.ledger.participant import Participant
from sglang_dcp.mutants import install_mutant
from sglang_dcp.policy.types import Placement
from sglang_dcp.upstream.step.admission import ask_again, note_blocked, reserved, sweep_waiting, takes_over
from sglang_dcp.upstream.step.elsewhere import ask_elsewhere
from sglang_dcp.upstream.step.retention import begin_behind_prefix, end_request, wanted_pages
from sglang_dcp.upstream.step.retraction import place_again
from sglang_dcp.upstream.step.runtime import Runtime, cluster_of
from sglang_dcp.upstream.step.sitting_out import find_leavers, has_room
from sglang_dcp.upstream.step.sync import free_pages
from testing.limit_checks import LimitChecks


class FakePool:
    """Pages 1..num_pages, with LedgerAllocator's interface towards the ledger."""

    def __init__(self, num_pages: int) -> None:
        self.free = list(range(num_pages, 0, -1))
        self._is_free = [True] * (num_pages + 1)
        self._claimed = 0

    def num_givable_pages(self) -> int:
        return len(self.free)

    def has_free(self, count: int) -> bool:
        return len(self.free) >= count

    def claim_decode_page(self) -> bool:
        if len(self.free) <= self._claimed:
            return False
        self._claimed += 1
        return True

    def settle_decode_claims(self) -> None:
        self._claimed = 0

    def take_pages(self, count: int) -> list[int] | None:
        if count + self._claimed > len(self.free):
            return None
        taken = [self.free.pop() for _ in range(count)]
        for page in taken:
            assert self._is_free[page]
            self._is_free[page] = False
        return taken

    def return_pages(self, pages: list[int]) -> None:
        for page in pages:
            assert not self._is_free[page], f"page {page} is freed twice"
            self._is_free[page] = True
            self.free.append(page)


@dataclass
class ModelKv:
    """The part of SGLang's per-request KV record that our code reads."""

    req_pool_idx: int
    kv_allocated_len: int = 0
    cache_protected_len: int = 0
    kv_committed_len: int = 0

    @property
    def holds_kv(self) -> bool:
        return self.kv_allocated_len > 0


@dataclass(eq=False)
class ModelRequest:
    """A request whose output tokens are its number. pages: those of a local one, by number."""

    rid: str
    origin_input_ids: list[int]
    max_new_tokens: int
    dyncp_placement: Placement | None
    dyncp_placement_flexible: bool
    kv: ModelKv
    output_ids: list[int] = field(default_factory=list)
    dyncp: Any = None
    dyncp_prefix_pages: int = 0
    extra_key: str | None = None
    dyncp_extra_key: str | None = None
    prefix_len: int = 0
    aborted: bool = False
    was_managed: bool = False
    to_finish: Any = None
    pages: list[int] = field(default_factory=list)
    finished_in_step: int | None = None

    cache_salt = input_embeds = positional_embed_overrides = multimodal_inputs = session = None

    @property
    def full_untruncated_fill_ids(self) -> list[int]:
        return self.origin_input_ids + self.output_ids

    @property
    def finished_reason(self) -> Any:
        return SimpleNamespace(to_json=lambda: {"type": "abort" if self.aborted else "length"})

    def owned_kv_len(self) -> int:
        return self.kv.kv_allocated_len

    def _compute_max_prefix_len(self, input_len: int) -> int:
        return input_len - 1

    @property
    def listed_pages(self) -> list[int]:
        """What SGLang's token table lists of a request with all its pages at home."""
        return self.pages if self.dyncp is None else [page.number for page in self.dyncp.pages if page is not None]

    def finished(self) -> bool:
        return len(self.output_ids) >= self.max_new_tokens

    def next_output_finishes_by_length(self) -> bool:
        return len(self.output_ids) + 1 >= self.max_new_tokens


class ModelScheduler:
    """One home's queues, and a step of it: retract, rejoin, prefill or decode. Stands where SGLang's Scheduler stands."""

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
        self.running_batch = SimpleNamespace(batch_is_full=False)
        self.done: list[ModelRequest] = []
        self.num_retractions = self.num_adoptions = self.num_cached_tokens = 0
        self.tree_cache = self
        self.wanted = 0

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

    def add(self, req: ModelRequest) -> None:
        self.rows_by_slot[req.kv.req_pool_idx] = req
        self.waiting_queue.append(req)

    def schedule(self) -> None:
        self._finish()
        self._retract()
        back = [req for req in self.runtime.queues.parked if has_room(self.runtime, req)]
        self.runtime.queues.parked = [req for req in self.runtime.queues.parked if req not in back]
        self.running += back
        self.batch = self._prefill()
        self.decodes = not self.batch
        if self.decodes:
            self.batch = self._decode()
        sweep_waiting(self.runtime)
        ask_again(self.runtime)
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
        rows = None if own.steady else own.sharded_rows()
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
        req.dyncp, req.pages = None, []
        req.kv.kv_allocated_len = 0

    def _retract(self) -> None:
        for request in self.participant.victims:
            req = next((req for req in self.runtime.queues.parked if req.dyncp is request), None)
            if req is None:
                assert request.handle not in self.participant.homes.requests, f"victim {request.handle} does not sit out"
                continue
            self.runtime.queues.parked.remove(req)
            self._release(req)
            before, is_free = req.dyncp_placement, req.dyncp_placement is None or req.dyncp_placement_flexible
            place_again(self.runtime, req)
            after, tokens = req.dyncp_placement, len(req.full_untruncated_fill_ids) + 2 * self.participant.page_size
            assert is_free or before.is_local or after == before, f"{req.rid} had the pin {before}, is placed {after}"
            fits_one = is_free and tokens <= self.participant.num_pages * self.participant.page_size
            assert not fits_one or after is None or after.degree == 1, f"{req.rid} fits one pool, is placed {after}"
            self.waiting_queue.insert(0, req)
            self.num_retractions += 1
        self.participant.victims = []

    def _prefill(self) -> list[tuple[ModelRequest, int, int]]:
        batch: list[tuple[ModelRequest, int, int]] = []
        budget = self.chunk_tokens
        if self.chunked_req is not None:
            budget = self._add_chunk(self.chunked_req, budget, batch)
        blocked = self.chunked_req is not None and self.chunked_req.dyncp is None
        for req in list(self.waiting_queue):
            placement = req.dyncp_placement
            if placement is None or (placement.is_local and req.dyncp is None and not takes_over(self.runtime, req)):
                # A local request that finds no room holds back local ones only: what runs must never wait for what has not started.
                if not blocked and not self._fits(req, batch):
                    note_blocked(self.runtime, req)
                    blocked = True
                if blocked or self.chunked_req is not None or budget <= 0:
                    continue
            elif not reserved(self.runtime, req) or self.chunked_req is not None or budget <= 0:
                continue
            self.waiting_queue.remove(req)
            budget = self._add_chunk(req, budget, batch)
        return batch

    def _fits(self, req: ModelRequest, batch: list[tuple[ModelRequest, int, int]]) -> bool:
        pages = -(-len(req.full_untruncated_fill_ids) // self.participant.page_size) + 1
        started = sum(1 for other, _, _ in batch if other.dyncp is None)
        return pages + started + self.participant.promised[self.participant.rank] <= self.pool.num_givable_pages()

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
        self.pool.settle_decode_claims()
        lengths, batch = self._lengths() + 1, []
        begin = np.flatnonzero(lengths % self.participant.page_size == 1 % self.participant.page_size).tolist()
        assert list(self.runtime.own_batch.beginning_page(stay, lengths)) == begin
        for req in stay:
            length = req.kv.kv_allocated_len
            self._allocate(req, length + 1)
            batch.append((req, length, 1))
        return batch

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


class ProtocolModel:
    """`num_instances` homes in lock step. Deterministic in `seed`."""

    def __init__(
        self,
        seed: int,
        num_instances: int,
        num_pages: int,
        page_size: int,
        *,
        chunk_tokens: int = 24,
        max_degree: int | None = None,
        max_guest_fraction: float = 1.0,
        num_nodes: int = 1,
        check_every: int = 1,
        cache_fraction: float = 0.8,
    ) -> None:
        install_mutant()
        self.random = random.Random(seed)
        self.num_instances, self.num_pages, self.page_size = num_instances, num_pages, page_size
        config = DynCpConfig(
            max_degree=max_degree,
            max_guest_fraction=max_guest_fraction,
            num_nodes=num_nodes,
            cache_fraction=cache_fraction,
            cache_min_tokens=page_size,
        ).resolve(num_instances)
        self.max_degree = config.max_degree or num_instances
        self.limits = LimitChecks(
            num_instances, num_pages, self.max_degree, int(max_guest_fraction * num_pages), num_instances // num_nodes
        )
        cluster, pools = cluster_of(config, num_instances, num_pages, page_size), [FakePool(num_pages) for _ in range(num_instances)]
        self.homes = [ModelScheduler(config, Participant(cluster, rank, pool), pool, chunk_tokens) for rank, pool in enumerate(pools)]
        self.num_steps = self.num_requests = 0
        self.num_growths = [0] * num_instances  # by home
        self.kv: list[dict[int, list[int]]] = [{} for _ in range(num_instances)]  # of each pool, what tokens a page was written with
        self.check_every = check_every

    # ---- what happens to the model

    def arrive(
        self,
        home: int,
        prompt: int | list[int],
        max_new: int,
        shards: tuple[int, ...] | None = None,
        *,
        flexible: bool = False,
    ) -> ModelRequest:
        """A request at `home`, local or split evenly over `shards` (tail last). prompt: its tokens, or how many of its own."""
        self.num_requests += 1
        ids = [self.num_requests] * prompt if isinstance(prompt, int) else prompt
        prompt = len(ids)
        placement = None
        if shards is not None:
            pages = -(-prompt // self.page_size)
            share = max(1, pages // len(shards))
            tokens = [share * self.page_size] * (len(shards) - 1)
            placement = Placement(home, shards, (*tokens, prompt - sum(tokens)))
        req = ModelRequest(f"r{self.num_requests}", ids, max_new, placement, flexible, ModelKv(self.num_requests))
        self.homes[home].add(req)
        return req

    def next_turn(self, req: ModelRequest, home: int, more: int, max_new: int, shards: tuple[int, ...], **kwargs: Any) -> ModelRequest:
        """A request that begins with all of an earlier one, then has `more` tokens of its own (below 0: branches off earlier)."""
        ids = req.full_untruncated_fill_ids
        ids = ids + [self.num_requests + 1] * more if more >= 0 else ids[:more] + [self.num_requests + 1] * 2 * self.page_size
        return self.arrive(home, ids, max_new, shards, **kwargs)

    def turn_at_random(self) -> None:
        """Of a request that is over, mostly at its home; where it lay, on one instance, or anywhere."""
        choose = self.random
        home = choose.randrange(self.num_instances)
        done = [req for req in self.homes[home].done[-12:] if req.was_managed]
        if not done:
            return
        req = choose.choice(done)
        most = min(self.limits.reach(self.num_instances) - 3, self.max_degree * (self.num_pages - 2)) * self.page_size
        more = choose.randint(-len(req.origin_input_ids), 2 * self.page_size)
        if choose.random() < 0.7:
            more = choose.randint(0, 3 * self.page_size)
        length = len(req.full_untruncated_fill_ids) + more + (0 if more >= 0 else 2 * self.page_size)
        if not 0 < length < most:
            return
        home = home if choose.random() < 0.9 else choose.randrange(self.num_instances)
        max_new = choose.randint(1, max(1, min(most - length, self.num_pages * self.page_size // 2)))
        if length < (self.num_pages - 3) * self.page_size and choose.random() < 0.5:
            self.next_turn(req, home, more, max_new, (home,), flexible=choose.random() < 0.8)
            return
        # As page_segments asks: the prompt's pages and one tail page.
        members = self.limits.members_for(home, -(-length // self.page_size) + 1)
        degree = min(len(members), self.max_degree, max(1, length // self.page_size))
        self.next_turn(req, home, more, max_new, tuple(choose.sample(members, degree)), flexible=True)

    def arrive_at_random(self) -> ModelRequest:
        choose = self.random
        home, pool = choose.randrange(self.num_instances), self.num_pages * self.page_size
        if choose.random() < 0.6:
            prompt = choose.randint(1, pool // 3)
            return self.arrive(home, prompt, choose.randint(1, max(1, pool // 2)))
        degree, reach = choose.randint(1, self.max_degree), self.limits.reach(self.num_instances)
        pages = choose.randint(degree, max(degree, min(degree * (self.num_pages - 3), reach - 3)))
        prompt = pages * self.page_size - choose.randrange(self.page_size)
        max_new = choose.randint(1, max(1, min((reach - 1 - pages) * self.page_size - 1, pool // 2)))
        flexible = choose.random() < 0.5
        members = self.limits.members_for(home, pages + 1) if flexible else range(self.num_instances)
        shards = tuple(choose.sample(members, min(degree, len(members))))
        return self.arrive(home, prompt, max_new, shards, flexible=flexible)

    def abort_at_random(self) -> None:
        home = self.random.choice(self.homes)
        if home.requests:
            home.abort(self.random.choice(home.requests))

    def step(self) -> None:
        homes = self.homes
        for home in homes:
            home.schedule()
        columns = [home.columns() for home in homes]
        words = [home.participant.own_words for home in homes]
        anybody_runs = any(home.batch for home in homes)
        for home in homes:
            home.participant.read_columns(columns)
        decisions = [home.participant.finish_step(words, anybody_runs) for home in homes]
        assert all(decision == decisions[0] for decision in decisions), decisions
        for grant in decisions[0].grants:
            self.num_growths[grant.home] += not grant.previous and grant.segments[0].first_index > 0
        self.limits.check_step(columns, words, decisions[0])
        self.run_batches()
        self.write_batches()
        for home in homes:
            home.complete_batch()
        self.num_steps += 1
        if self.num_steps % self.check_every == 0:
            self.check()

    def drain(self, most_steps: int) -> None:
        """No more arrivals: everything must finish, and every pool must be whole again."""
        start = self.num_steps
        while any(home.requests or home.participant.outbox or home.runtime.queues.waiting for home in self.homes):
            assert self.num_steps - start < most_steps, f"not drained after {most_steps} steps: {[len(h.requests) for h in self.homes]}"
            self.step()
        for home in self.homes:
            home.participant.release_retained()
        while any(home.participant.outbox for home in self.homes):
            self.step()
        self.check()
        for home in self.homes:
            assert home.pool.num_givable_pages() == self.num_pages
            assert not home.participant.busy() and not len(home.participant.table)

    # ---- what must hold

    def check(self) -> None:
        """Every page has one owner, and what homes believe is what shards lent, messages in flight considered."""
        for home in self.homes:
            instance = home.participant
            local = [page for req in home.requests if req.dyncp is None for page in req.pages]
            owners = {
                "free": home.pool.free,
                "local": local,
                "managed": instance.homes.local_pages(),
                "guest": instance.guests.all_pages(),
                "retained": [*instance.homes.retained.local_pages(), *instance.guests.all_retained_pages()],
            }
            assert len(owners["retained"]) == instance.retention.num_pages_here
            check_instance(self.num_pages, owners)
        for shard in self.homes:
            self._check_lent(shard.participant)

    def _check_lent(self, shard: Participant) -> None:
        told: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for message in shard.outbox:
            if isinstance(message, Granted):
                told.setdefault((message.home, message.handle), []).extend(enumerate(message.pages, message.first_index))
        for home in (h.participant for h in self.homes if h.participant is not shard):
            released = {message.handle for message in home.outbox if isinstance(message, Release | Retain)}
            unknown = {handle for rank, handle in shard.guests.handles() if rank == home.rank} - released - set(home.homes.requests)
            assert not unknown, f"{shard.rank} hosts handles {unknown} of {home.rank}, which does not know them"
            for handle, request in home.homes.requests.items():
                believed = [(i, page.number) for i, page in enumerate(request.pages) if page is not None and page.owner == shard.rank]
                expected = sorted(believed + told.get((home.rank, handle), []))
                assert expected == list(shard.guests.pages_of(home.rank, handle)), (home.rank, handle, expected)

    def run_batches(self) -> None:
        """Stands for the layers. A shard holds exactly the pages that the home's rows of this step will ask it for."""
        if self.num_steps % min(self.check_every, 5):
            return
        for home in self.homes:
            for req, prefix_len, num_new in home.batch:
                if req.dyncp is None:
                    continue
                num_pages = -(-(prefix_len + num_new) // self.page_size)
                expected: dict[int, list[int]] = {}
                for page in req.dyncp.pages[:num_pages]:
                    expected.setdefault(page.owner, []).append(page.number)
                for shard in (h.participant for h in self.homes if h is not home):
                    held = [number for i, number in shard.guests.pages_of(home.participant.rank, req.dyncp.handle) if i < num_pages]
                    assert held == expected.get(shard.rank, []), (shard.rank, req.rid, held, expected)

    def write_batches(self) -> None:
        """What the layers write; and whether every row finds the K/V of its own tokens in all the pages before."""
        for home in self.homes:
            for req, prefix_len, num_new in home.batch:
                ids = req.full_untruncated_fill_ids
                pages = req.dyncp.pages if req.dyncp is not None else [Page(home.participant.rank, number) for number in req.pages]
                for position in range(prefix_len, prefix_len + num_new):
                    page = pages[position // self.page_size]
                    written = self.kv[page.owner].setdefault(page.number, [0] * self.page_size)
                    written[position % self.page_size] = ids[position]
                if self.num_steps % min(self.check_every, 5):
                    continue
                for index in range(-(-(prefix_len + num_new) // self.page_size)):
                    begin, end = index * self.page_size, min((index + 1) * self.page_size, prefix_len + num_new)
                    found = self.kv[pages[index].owner].get(pages[index].number, [])[: end - begin]
                    assert found == ids[begin:end], f"{req.rid} reads {found} in page {index}, {ids[begin:end]} were written"


def random_walk(model: ProtocolModel, num_steps: int, *, arrival: float = 0.12, abort: float = 0.02, most_waiting: int = 6) -> None:
    """Steps with arrivals and aborts in between; then the drain."""
    choose = model.random
    for _ in range(num_steps):
        if choose.random() < arrival and sum(len(home.waiting_queue) for home in model.homes) < most_waiting:
            model.arrive_at_random()
        if choose.random() < arrival and sum(len(home.waiting_queue) for home in model.homes) < most_waiting:
            model.turn_at_random()
        if choose.random() < abort:
            model.abort_at_random()
        model.step()
    model.drain(100_000)
