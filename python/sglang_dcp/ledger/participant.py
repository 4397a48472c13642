"""One instance's part in the protocol: its books, its messages and control columns, and the grants that it computes like all others.

Numbers in, numbers out: it knows neither SGLang's requests nor tensors. A step is `build_columns`, an all-gather of the columns,
`read_columns`, an all-gather of the words if there are any, `finish_step`.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence

from sglang_dcp.ledger import columns as col
from sglang_dcp.ledger import messages
from sglang_dcp.ledger.cluster import Cluster
from sglang_dcp.ledger.counters import LedgerCounters
from sglang_dcp.ledger.decision_digest import DecisionDigest
from sglang_dcp.ledger.eviction import is_due
from sglang_dcp.ledger.guests import GuestBook
from sglang_dcp.ledger.homes import HomeBook, HomeRequest
from sglang_dcp.ledger.messages import AskAdmission, AskGrowth, Granted, Message, Release, Retain, RowColumns, Rows, Share
from sglang_dcp.ledger.page_ids import Page, PageIds
from sglang_dcp.ledger.page_pool import PagePool
from sglang_dcp.ledger.reservations import Decision, Grant, Key, ReservationTable
from sglang_dcp.ledger.retention import Match, Retention
from sglang_dcp.ledger.row_table import RowTable, checksum
from sglang_dcp.policy.growth import predicted_level


class ProtocolError(RuntimeError):
    """Instances disagree about a step. Serving on would give wrong answers, so the process ends."""


class Participant:
    """State of one instance.

    promised: pages of every instance that the first waiting ask and stuck growth need. rows_of: the sharded rows of every home, which all
    instances keep alike; rows_steady: no home told others of its rows in this step; num_sharded_rows: of the step, 0 means that nothing of
    ours runs in the layers. group: the ranks that this one may exchange rows with; busy_ranks: those in whose group some row is sharded.
    victims: own requests that are to give their pages back. local_waits_long: as the home says. slice_index: see slices.py.
    """

    def __init__(self, cluster: Cluster, rank: int, pool: PagePool, slice_index: int = 0) -> None:
        self.cluster, self.limits, self.rank, self.pool, self.slice_index = cluster, cluster.limits, rank, pool, slice_index
        self.num_instances, self.num_pages, self.page_size = cluster.num_instances, cluster.num_pages, cluster.page_size
        self.group = cluster.limits.layout.group(rank)
        self.ids = PageIds(rank, self.num_instances, self.num_pages, self.page_size)
        self.homes, self.guests = HomeBook(self.ids), GuestBook()
        self.table = ReservationTable(cluster.limits)
        self.retention = Retention(rank, self.homes, self.guests, pool, self.table.retained)
        self.most_retained = cluster.most_retained_pages
        self.counters = LedgerCounters()
        self.step = 0
        self.outbox: list[Message] = []
        self.own_words: list[int] = []
        self._told: list[Message] = []  # what the words say
        self.rows_of = [RowTable() for _ in range(self.num_instances)]
        self.rows_steady = False
        self.num_sharded_rows = 0
        self.busy_ranks: frozenset[int] = frozenset()
        self.decisions = DecisionDigest()
        self._nothing_decided = Decision((), (0,) * self.num_instances, ())
        self.promised = self._nothing_decided.promised
        self.local_waits_long = False
        self.victims: list[HomeRequest] = []
        self._asked_at: dict[int, float] = {}
        self._own_columns: list[int] = []
        self._columns: list[list[int]] = [[0] * col.NUM_COLUMNS for _ in range(self.num_instances)]

    # ---- what a home does with its requests

    def open_request(self) -> HomeRequest:
        return self.homes.open(self.step)

    def ask_admission(
        self, request: HomeRequest, segments: Sequence[tuple[int, int]], *, flexible: bool, match: Match | None = None
    ) -> None:
        """Asks for all pages of a request: (instance, pages) in sequence order, the tail last. match: a retained sequence that it goes on
        from at the grant; then for those behind it."""
        request.asked_admission = True
        self._asked_at[request.handle] = time.monotonic()
        if match is not None:
            self.retention.name(request, match)
        previous, kept, borrows = (0, (), False) if match is None else (match.handle, match.kept, match.borrows)
        self.outbox.append(AskAdmission(request.handle, request.born, flexible, tuple(segments), previous, kept, borrows))

    def ask_growth(self, request: HomeRequest, *, stuck: bool) -> None:
        """Asks for the next tail page, once; again when the request gets stuck for it. A page on its way comes first: until its number
        is here, the shards of the request are not known."""
        if not request.ready or request.asked_growth and request.asked_stuck >= stuck:
            return
        request.asked_growth, request.asked_stuck = True, stuck
        self.outbox.append(AskGrowth(request.handle, request.born, stuck, len(request.pages), request.shards))

    def may_grow_at_home(self, request: HomeRequest) -> bool:
        """Not if its degree is used up without the home."""
        return self.rank in request.starts or len(request.starts) < self.limits.max_degree

    def grow_at_home(self, request: HomeRequest) -> bool:
        """Takes the next tail page from the own pool when it has one; no message needed."""
        if request.asked_growth or not self.may_grow_at_home(request):
            return False
        pages = self.pool.take_pages(1)
        if pages is None:
            return False
        self.counters.degree_growths += self.rank not in request.shards
        self.homes.append(request, Page(self.rank, pages[0]))
        return True

    def release(self, request: HomeRequest) -> None:
        """The request is over: own pages return to the pool now, guest pages with the next message."""
        self._asked_at.pop(request.handle, None)
        self.pool.return_pages(self.homes.close(request.handle))
        self.outbox.append(Release(request.handle))

    def finish(self, request: HomeRequest, digests: bytes, num_pages: int) -> None:
        """The request is over and its first pages stay for a later one, where some are its own. digests: of these pages."""
        if num_pages > request.num_borrowed:
            self._asked_at.pop(request.handle, None)
            self.outbox.append(self.retention.finish(request, digests, num_pages))
        else:
            self.release(request)

    def share(self, request: HomeRequest, digests: bytes, num_pages: int) -> None:
        """Offers the first pages of a running request to others. digests: of these."""
        self.outbox.append(self.retention.share(request, digests, num_pages))

    def release_retained(self) -> None:
        """Gives up all retained sequences of this home."""
        self.outbox += self.retention.release_all()

    def room_for_guests(self, rank: int) -> int:
        """Pages that instance `rank` could lend by the columns of the last step, beyond what is promised there and left to growth."""
        row = self._columns[rank]
        free = row[col.FREE_PAGES] - self.promised[rank] - self._left_to_growth(rank, row[col.FREE_PAGES])
        return min(free + self.table.retained.evictable[rank], self.limits.guest_pages - row[col.GUEST_PAGES])

    @property
    def withheld_pages(self) -> int:
        """Free pages of the own pool that no new local request gets: those promised, and those left to growth that nothing retained could
        make room for. A waiting ask is given its pages when both are there, so nobody takes either."""
        return self.promised[self.rank] + max(0, self.growth_pages - self.table.retained.evictable[self.rank])

    @property
    def growth_pages(self) -> int:
        """Of the own pool, left to growth by new local requests. None while one has waited long."""
        return 0 if self.local_waits_long else self._left_to_growth(self.rank, self.pool.num_givable_pages())

    def _left_to_growth(self, rank: int, free: int) -> int:
        return self.limits.left_to_growth(free - self.promised[rank], self.table.retained.pages[rank])

    def busy(self) -> bool:
        """Guests or managed requests are here, or something is to be told: the pool must not be flushed. Retained sequences are apart."""
        return bool(len(self.guests) or len(self.homes) or self.outbox)

    # ---- one step: columns out, messages, grants

    def build_columns(
        self, rows: RowColumns | None, free_pages: int, kv_tokens: int, num_requests: int, wanted_pages: int = 0
    ) -> list[int]:
        """This instance's control columns. rows: its sharded rows, None for those of the step before, one token on. Decides whether
        they need a message."""
        table = self.rows_of[self.rank]
        rows_checksum = table.next_checksum()
        if rows is not None and (own_checksum := checksum(rows)) != rows_checksum:
            # What the others go by, too: where they have this checksum already, they would take the rows for those that they have.
            rows_checksum = own_checksum
            self.outbox.append(Rows(rows))
        self.own_words = messages.encode(self.outbox) if self.outbox else []
        self._told, self.outbox = self.outbox, []
        load = free_pages, self.guests.num_pages - self.guests.num_retained, kv_tokens, num_requests, wanted_pages
        self._own_columns = [len(self.own_words), self.decisions.value, rows_checksum, *load, self.step]
        return self._own_columns

    def read_columns(self, columns: list[list[int]]) -> int:
        """Takes in all instances' columns, of slice 0 each. Returns the most message words of any instance (0: no second exchange)."""
        if self.slice_index and columns[self.rank] != self._own_columns:
            raise ProtocolError(col.slice_disagreement(self._own_columns, columns[self.rank], self.rank, self.slice_index))
        step, decided, most_words = self.step, self.decisions.value, 0
        for row in columns:
            if row[col.STEP] != step or row[col.DECISIONS] != decided:
                raise ProtocolError(col.disagreement(columns, self.rank, step, decided))
            most_words = max(most_words, row[col.WORDS])
        self._columns = columns
        return most_words

    @property
    def kv_tokens(self) -> list[int]:
        """Of every instance, as told last."""
        return [row[col.KV_TOKENS] for row in self._columns]

    @property
    def home_requests(self) -> list[int]:
        """Likewise."""
        return [row[col.HOME_REQUESTS] for row in self._columns]

    def finish_step(self, words: Sequence[Sequence[int]] | None, anybody_runs: bool) -> Decision:
        """Processes every instance's messages (None: there are none), then decides grants. Same inputs, same outcome everywhere."""
        self._advance_rows(self._take_all(words) if words else ())
        decision, self.victims = self._nothing_decided, []
        if not self.table.is_empty and (len(self.table) or is_due(self.table.retained, self._columns, self.most_retained)):
            decision = self._decide(anybody_runs)
            self.retention.evict(decision.evicted)
            for grant in decision.grants:
                self.retention.begin(grant)
            for grant in decision.grants:
                self._apply_grant(grant)
            self.victims = [self.homes.requests[handle] for home, handle in decision.victims if home == self.rank]
            self._forget_victims(decision.victims)
        self.promised = decision.promised
        if self.homes.closed_pages:
            self.homes.forget_closed()
        self.step += 1
        return decision

    def _take_all(self, words: Sequence[Sequence[int]]) -> set[int]:
        """The homes that told their rows."""
        told_rows: set[int] = set()
        for home, stream in enumerate(words):
            for message in messages.decode(stream) if home != self.rank else self._told:
                if isinstance(message, Rows):
                    self.rows_of[home].tell(message.rows)
                    told_rows.add(home)
                else:
                    self._take(home, message)
        return told_rows

    def _advance_rows(self, told_rows: Collection[int]) -> None:
        """Homes that did not tell have the rows of the step before, one token on; every home's checksum says whether we know its rows."""
        self.rows_steady = not told_rows
        columns = self._columns
        for home, table in enumerate(self.rows_of):
            if home not in told_rows:
                table.advance()
            if table.checksum != columns[home][col.ROWS_CHECKSUM]:
                raise ProtocolError(f"rank {self.rank}, step {self.step}: row table of home {home} went apart: {table.rows}")
        if told_rows:
            self.num_sharded_rows = sum(map(len, self.rows_of))
            busy = (group for group in self.limits.layout.groups if any(len(self.rows_of[home]) for home in group))
            self.busy_ranks = frozenset(rank for group in busy for rank in group)

    def _decide(self, anybody_runs: bool) -> Decision:
        most_guests, cost_model = self.limits.guest_pages, self.cluster.cost_model
        room = [max(0, most_guests - row[col.GUEST_PAGES]) for row in self._columns]
        levels = [predicted_level(cost_model, row[col.KV_TOKENS], row[col.HOME_REQUESTS]) for row in self._columns]
        open_asks = self.table.digest
        free, wanted = ([row[column] for row in self._columns] for column in (col.FREE_PAGES, col.WANTED_PAGES))
        decision = self.table.decide(free, room, anybody_runs, levels, wanted, self.most_retained)
        self.decisions.add(decision, open_asks)
        return decision

    def _take(self, home: int, message: Message) -> None:
        if isinstance(message, Release):
            self.table.withdraw(home, message.handle)
            self.table.retained.end((home, message.handle))
            if home != self.rank:
                self.pool.return_pages(self.guests.take_back(home, message.handle))
        elif isinstance(message, Retain):
            self.table.withdraw(home, message.handle)
            self.retention.take(home, message, self.step)
        elif isinstance(message, Share):
            self.retention.take_shared(home, message, self.step)
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
                told, left = self._own_columns[col.FREE_PAGES], self.pool.num_givable_pages()
                where = f"rank {self.rank}, step {self.step}"
                raise ProtocolError(f"{where}: {segment.num_pages} pages were granted and cannot be had; {told} were told, {left} are free")
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
            self.counters.degree_growths += sum(segment.rank not in request.shards for segment in grant.segments)
        elif request.handle in self._asked_at:
            self.counters.admission_waits.append(time.monotonic() - self._asked_at.pop(request.handle))

    def _forget_victims(self, victims: Sequence[Key]) -> None:
        for home, handle in victims:
            self.table.withdraw(home, handle)
            self.counters.retractions += home == self.rank
