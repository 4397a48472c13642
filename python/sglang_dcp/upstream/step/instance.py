"""One instance's part in dynamic context parallelism: its books, its control messages, its plan of the current step.

Lives in the scheduler process. The hooks in scheduler.py, step_sync.py, kv_pool.py and attention_backend.py call it; it decides nothing
about SGLang's objects itself beyond reading them.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sglang_dcp.config import DynCpConfig
from sglang_dcp.dataflow.contracts import GuestRow, HomeRow, StepPlan
from sglang_dcp.dataflow.step_plan import asks, build_step_plan, holds_active_page
from sglang_dcp.ledger import messages
from sglang_dcp.ledger.decision_digest import DecisionDigest
from sglang_dcp.ledger.guests import GuestBook
from sglang_dcp.ledger.homes import HomeBook, HomeRequest
from sglang_dcp.ledger.messages import AskAdmission, AskGrowth, Granted, Message, Release, Row, Rows
from sglang_dcp.ledger.page_ids import Page, PageIds
from sglang_dcp.ledger.reservations import Decision, Grant, Key, ReservationTable
from sglang_dcp.ledger.routes import route_word
from sglang_dcp.ledger.row_table import RowTable, advance, checksum
from sglang_dcp.policy.growth import predicted_level
from sglang_dcp.upstream.router.placement_request import cost_model_of
from sglang_dcp.upstream.step import columns as col

if TYPE_CHECKING:
    from sglang_dcp.upstream.pool.kv_pool import LedgerAllocator

logger = logging.getLogger(__name__)


class ProtocolError(RuntimeError):
    """Instances disagree about a step. Serving on would give wrong answers, so the process ends."""


def is_managed(req: Any) -> bool:
    """Whether the pages of SGLang's request come from the ledger."""
    return getattr(req, "dyncp", None) is not None


class Instance:
    """State of one instance. `pool` is its page allocator; requests are SGLang's Req objects, tied to a HomeRequest by `req.dyncp`.

    num_sharded_rows: of the step, over all instances; 0 means that nothing of ours runs in the layers.
    """

    def __init__(self, config: DynCpConfig, rank: int, num_instances: int, num_pages: int, page_size: int, pool: LedgerAllocator) -> None:
        self.config = config
        self.rank = rank
        self.num_instances = num_instances
        self.page_size = page_size
        self.num_pages = num_pages
        self.ids = PageIds(rank, num_instances, num_pages, page_size)
        self.pool = pool
        self.homes = HomeBook(self.ids)
        self.guests = GuestBook()
        self.limits = config.split_limits(num_instances, num_pages)
        self.table = ReservationTable(self.limits)
        self.cost_model = cost_model_of(config, num_instances)
        self.step = 0
        self.outbox: list[Message] = []
        self.rows_of = [RowTable() for _ in range(num_instances)]
        self.rows_steady = False
        self.decisions = DecisionDigest()
        self._nothing_decided = Decision((), (0,) * num_instances, ())
        self.promised = self._nothing_decided.promised
        self.kv_tokens: tuple[int, ...] = (0,) * num_instances
        self.home_requests: tuple[int, ...] = (0,) * num_instances
        self.num_sharded_rows = 0
        self.victims: list[HomeRequest] = []
        self.plan: StepPlan | None = None
        self.num_retractions = 0
        self.num_degree_growths = 0
        self.admission_waits: list[float] = []
        self._asked_at: dict[int, float] = {}
        self._columns: list[list[int]] = [[0] * col.NUM_COLUMNS for _ in range(num_instances)]

    # ---- what a home does with its requests

    def open_request(self) -> HomeRequest:
        return self.homes.open(self.step)

    def ask_admission(self, request: HomeRequest, segments: Sequence[tuple[int, int]], *, flexible: bool) -> None:
        """Asks for all pages of a request: (instance, pages) in sequence order, the tail last."""
        request.asked_admission = True
        self._asked_at[request.handle] = time.monotonic()
        self.outbox.append(AskAdmission(request.handle, request.born, flexible, tuple(segments)))

    def ask_growth(self, request: HomeRequest, *, stuck: bool) -> None:
        """Asks for the next tail page, once; again when the request gets stuck for it. A page on its way comes first: until its number
        is here, the shards of the request are not known."""
        if not request.ready or request.asked_growth and request.asked_stuck >= stuck:
            return
        request.asked_growth, request.asked_stuck = True, stuck
        self.outbox.append(AskGrowth(request.handle, request.born, stuck, len(request.pages), request.shards))

    def grow_at_home(self, request: HomeRequest) -> bool:
        """Takes the next tail page from the own pool when it has one; no message needed."""
        if request.asked_growth or not self._may_hold(request, self.rank):
            return False
        pages = self.pool.take_pages(1)
        if pages is None:
            return False
        self.num_degree_growths += self.rank not in request.shards
        self.homes.append(request, Page(self.rank, pages[0]))
        return True

    def release(self, request: HomeRequest) -> None:
        """The request is over: own pages return to the pool now, guest pages with the next message."""
        self._asked_at.pop(request.handle, None)
        self.pool.return_pages(self.homes.close(request.handle))
        self.outbox.append(Release(request.handle))

    def _may_hold(self, request: HomeRequest, rank: int) -> bool:
        shards = request.shards
        return rank in shards or len(shards) < self.limits.max_degree

    def room_for_guests(self, rank: int) -> int:
        """Pages that instance `rank` could lend by the columns of the last step, beyond what is promised there."""
        row = self._columns[rank]
        return min(row[col.FREE_PAGES] - self.promised[rank], self.limits.guest_pages - row[col.GUEST_PAGES])

    def token_ids(self, request: HomeRequest, start: int, stop: int) -> np.ndarray:
        """Token ids (as in req_to_token) of positions start .. stop - 1."""
        positions = np.arange(start, stop)
        first, last = start // self.page_size, (stop - 1) // self.page_size
        pages = request.pages[first : last + 1]
        if None in pages or len(pages) != last + 1 - first:
            raise ProtocolError(f"handle {request.handle}: positions {start}..{stop - 1} need page {last}, {len(request.pages)} are there")
        page_ids = np.array([self.ids.encode(page) for page in pages if page is not None])
        return page_ids[positions // self.page_size - first] * self.page_size + positions % self.page_size

    def token_id(self, request: HomeRequest, position: int) -> int:
        """The same for one position, without an array."""
        index, offset = divmod(position, self.page_size)
        page = request.pages[index] if index < len(request.pages) else None
        if page is None:
            raise ProtocolError(f"handle {request.handle}: position {position} needs page {index}, {len(request.pages)} are there")
        return self.ids.encode(page) * self.page_size + offset

    # ---- one step: columns out, messages, grants, plan

    def build_columns(self, rows: Sequence[Row] | None, free_pages: int, kv_tokens: int, num_requests: int) -> list[int]:
        """This instance's control columns. rows: its sharded rows, None for those of the step before, one token on. Decides whether
        they need a message."""
        table = self.rows_of[self.rank]
        rows_checksum = table.next_checksum()
        if rows is not None and (own_rows := tuple(rows)) != advance(table):
            rows_checksum = checksum(own_rows)
            self.outbox.append(Rows(own_rows))
        self._words = messages.encode(self.outbox) if self.outbox else []
        self.outbox = []
        words, decided, num_guests = len(self._words), self.decisions.value, self.guests.num_pages
        return [words, decided, rows_checksum, free_pages, num_guests, kv_tokens, num_requests, self.step]

    @property
    def own_words(self) -> list[int]:
        return self._words

    def read_columns(self, columns: list[list[int]]) -> int:
        """Takes in all instances' columns. Returns the most message words of any instance (0: no second exchange)."""
        told = list(zip(*columns, strict=True))
        if told[col.STEP].count(self.step) != self.num_instances:
            raise ProtocolError(f"rank {self.rank} is at step {self.step}, the others at {list(told[col.STEP])}")
        decided = told[col.DECISIONS]
        if decided.count(self.decisions.value) != self.num_instances:
            others = [rank for rank, value in enumerate(decided) if value != self.decisions.value]
            raise ProtocolError(f"rank {self.rank}, step {self.step}: instances {others} decided otherwise about pages in an earlier step")
        self._columns, self.kv_tokens, self.home_requests = columns, told[col.KV_TOKENS], told[col.HOME_REQUESTS]
        return max(told[col.WORDS])

    def finish_step(self, words: Sequence[Sequence[int]] | None, anybody_runs: bool) -> Decision:
        """Processes every instance's messages (None: there are none), then decides grants. Same inputs, same outcome everywhere."""
        told_rows: set[int] = set()
        for home, stream in enumerate(words or ()):
            for message in messages.decode(stream):
                if isinstance(message, Rows):
                    self.rows_of[home].tell(message.rows)
                    told_rows.add(home)
                else:
                    self._take(home, message)
        self.rows_steady = not told_rows
        for home, table in enumerate(self.rows_of):
            if home not in told_rows:
                table.advance()
            if table.checksum != self._columns[home][col.ROWS_CHECKSUM]:
                raise ProtocolError(f"rank {self.rank}, step {self.step}: row table of home {home} went apart: {table.rows}")
        if told_rows:
            self.num_sharded_rows = sum(map(len, self.rows_of))
        decision = self._nothing_decided
        if len(self.table):
            room = [max(0, self.limits.guest_pages - row[col.GUEST_PAGES]) for row in self._columns]
            levels = [predicted_level(self.cost_model, row[col.KV_TOKENS], row[col.HOME_REQUESTS]) for row in self._columns]
            open_asks = self.table.digest
            decision = self.table.decide([row[col.FREE_PAGES] for row in self._columns], room, anybody_runs, levels)
            self.decisions.add(decision, open_asks)
        for grant in decision.grants:
            self._apply_grant(grant)
        self.promised = decision.promised
        self.victims = [self.homes.requests[handle] for home, handle in decision.victims if home == self.rank]
        self._forget_victims(decision.victims)
        self.homes.end_step()
        self.step += 1
        return decision

    def _take(self, home: int, message: Message) -> None:
        if isinstance(message, Release):
            self.table.withdraw(home, message.handle)
            if home != self.rank:
                self.pool.return_pages(self.guests.take_back(home, message.handle))
        elif isinstance(message, Granted):
            if message.home == self.rank:
                self.homes.fill(home, message)
        else:
            assert isinstance(message, AskAdmission | AskGrowth)
            self.table.ask(home, message)

    def _apply_grant(self, grant: Grant) -> None:
        request = self.homes.requests.get(grant.handle) if grant.home == self.rank else None
        if request is not None:
            self._measure_grant(request, grant)
            self.homes.expect(request, grant)
        for segment in grant.segments:
            if segment.rank != self.rank:
                continue
            pages = self.pool.take_pages(segment.num_pages)
            if pages is None:
                raise ProtocolError(f"rank {self.rank}: {segment.num_pages} pages were granted but the pool is short; its column was wrong")
            granted = Granted(grant.home, grant.handle, segment.first_index, tuple(pages))
            if request is not None:
                self.homes.fill(self.rank, granted)
            elif grant.home == self.rank:
                self.pool.return_pages(pages)
            else:
                self.guests.lend(grant.home, grant.handle, segment.first_index, pages)
                self.outbox.append(granted)

    def _measure_grant(self, request: HomeRequest, grant: Grant) -> None:
        if request.admitted:
            self.num_degree_growths += sum(segment.rank not in request.shards for segment in grant.segments)
        elif request.handle in self._asked_at:
            self.admission_waits.append(time.monotonic() - self._asked_at.pop(request.handle))

    def _forget_victims(self, victims: Sequence[Key]) -> None:
        for home, handle in victims:
            self.table.withdraw(home, handle)
            self.num_retractions += home == self.rank

    # ---- the plan of the step

    def build_plan(self, home_rows: Sequence[HomeRow], num_tokens: int) -> None:
        guests = []
        for home, rows in enumerate(self.rows_of):
            if home == self.rank:
                continue
            for row in rows:
                held = self.guests.pages_of(home, row.handle)
                if held and holds_active_page(held[0][0], self.page_size, row.prefix_len + row.num_new):
                    guests.append(GuestRow(home, row.num_new, row.prefix_len, *self.guests.arrays_of(home, row.handle)))
        plan = build_step_plan(self.step, self.rank, self.num_instances, self.page_size, num_tokens, home_rows, guests)
        # From the rows of all homes, which every instance knows alike: a collective may depend on nothing else.
        anybody_asks = any(asks(row.num_new, row.prefix_len) for rows in self.rows_of for row in rows)
        self.plan = dataclasses.replace(plan, anybody_asks=anybody_asks)

    def managed_row(self, request: HomeRequest, token_start: int, num_new: int, prefix_len: int) -> HomeRow:
        return HomeRow(token_start, num_new, prefix_len, *request.page_arrays())

    def is_sharded(self, request: HomeRequest, sequence_len: int) -> bool:
        """Whether a remote instance takes part in the row."""
        return any(owner != self.rank for owner in request.active_shards(sequence_len, self.page_size))

    def route_of(self, request: HomeRequest, sequence_len: int) -> int:
        """The route of a row that ends at sequence_len."""
        tail = request.pages[(sequence_len - 1) // self.page_size]
        if tail is None:
            raise ProtocolError(f"handle {request.handle}: a row of {sequence_len} tokens runs before the page of its last one is known")
        return route_word(request.active_shards(sequence_len, self.page_size), tail.owner, self.rank, self.num_instances)

    def keeps_route(self, request: HomeRequest, sequence_len: int) -> bool:
        """Whether a row that ends at sequence_len, the first token of a page, has the route of the row before it.

        Its tail stays then; and a shard comes in with its first page only.
        """
        index = (sequence_len - 1) // self.page_size
        before, tail = request.pages[index - 1] if index else None, request.pages[index]
        return before is not None and tail is not None and before.owner == tail.owner

    def busy(self) -> bool:
        """Guests or managed requests are here: the pool must not be flushed."""
        return bool(len(self.guests) or len(self.homes) or self.outbox)

    def describe(self, request: HomeRequest, num_tokens: int) -> dict[str, Any]:
        """meta_info.dyncp of a request."""
        tokens = request.tokens_per_shard(num_tokens, self.page_size)
        return {
            "home": self.rank,
            "shards": [{"rank": rank, "tokens": count} for rank, count in tokens.items()],
            "degree_start": request.start_degree,
            "degree_end": len(tokens),
        }
