"""The batch of this instance's step beside that of the step before: most steps decode the same requests, one token on.

Such a step is told from the list of requests and one length. SGLang moves a batch's lengths on together (`seq_lens_cpu + 1`), so nothing is
read of tensors, and of the rows only those that begin or end a page are looked at: our code runs once per step, on caches that the step
has filled with other things, where each operation costs several times what it does in a loop.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sglang_dcp.dataflow.step_rows import Span
from sglang_dcp.ledger.messages import Row
from sglang_dcp.ledger.participant import Participant
from sglang_dcp.ledger.positions import keeps_route, route_of
from sglang_dcp.ledger.steady import SteadyRows
from sglang_dcp.upstream.step.managed import is_managed

GROW_AHEAD_TOKENS = 8
"""A request asks for its next remote tail page this many tokens before it needs it: a grant takes two steps to arrive."""


class OwnBatch:
    """Taken in once per step.

    steady: the same requests decode as in the step before, over the same routes. routes: of the sharded rows, by place in the batch.
    """

    def __init__(self, participant: Participant) -> None:
        self._ids, self._group, self._participant = participant.ids, participant.group, participant
        self._ask_at = self._asks_with(participant.limits.max_degree)
        self._rows: SteadyRows | None = SteadyRows((), ())  # None: the last step prefilled
        self._spans: list[Span] | None = []
        self._ends: bytearray | None = None
        self._asking: dict[int, list[int]] = {}  # by the index of _ends, which was made with it
        self.routes: dict[int, int] = {}
        self.steady = False

    @property
    def spans(self) -> list[Span]:
        if self._spans is None:
            assert self._rows is not None
            before = self._rows.age - 1
            self._spans = [(req, length + before, 1) for req, length in zip(self._rows.keys, self._rows.told, strict=True)]
        return self._spans

    def __len__(self) -> int:
        return len(self.spans if self._rows is None else self._rows)

    def take(self, batch: Any) -> None:
        """batch: SGLang's of the step, None or idle where this instance has no tokens."""
        if batch is not None and batch.reqs and batch.forward_mode.is_decode():
            self.take_decode(batch.reqs, batch.seq_lens_cpu)
        elif batch is None or not batch.reqs or batch.forward_mode.is_idle():
            self.take_decode([], None)
        else:
            self.take_extend([(req, int(p), int(n)) for req, p, n in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True)])

    def take_extend(self, spans: list[Span]) -> None:
        """A step that prefills."""
        self._rows, self.steady, self._spans = None, False, spans
        ends = ((index, req, prefix_len + num_new) for index, (req, prefix_len, num_new) in enumerate(spans))
        self.routes = {index: route for index, req, end in ends if (route := self._route(req, end)) is not None}

    def take_decode(self, reqs: Sequence[Any], lengths: torch.Tensor | None) -> None:
        """lengths: tokens of each sequence, the new one included, on the host."""
        self._spans = None
        rows = self._rows
        if rows is not None and rows.are(reqs, reqs[-1].kv.kv_allocated_len if reqs else 0, 1):
            rows.age += 1
            self.steady = self._same_routes(rows)
            if self.steady:
                return
            if self._ask_at:
                self._ends = None  # a page on a new shard may have used a degree up
        else:
            self.steady, self._ends = False, None
            rows = self._rows = SteadyRows(list(reqs), [] if lengths is None else lengths.tolist(), self._ids.page_size)
        age, told = rows.age, rows.told
        managed = [index for index, req in enumerate(rows.keys) if getattr(req, "dyncp", None) is not None]
        found = [(index, self._route(rows.keys[index], told[index] + age)) for index in managed]
        self.routes = {index: route for index, route in found if route is not None}

    def sharded_rows(self) -> list[Row]:
        spans, rows = self.spans, []
        for index, route in self.routes.items():
            req, prefix_len, num_new = spans[index]
            rows.append(Row(req.dyncp.handle, prefix_len, num_new, route))
        return rows

    # ---- of the next step's batch, before it is taken in

    def is_quiet(self, reqs: Sequence[Any]) -> bool:
        """Whether these are the requests taken in last, none of the ledger's begins a page with its next token, and none must ask ahead
        whatever room there is at home."""
        rows = self._rows
        if rows is None or not reqs or not rows.are(reqs, reqs[-1].kv.kv_allocated_len, 0):
            return False
        ends = self._ends
        if ends is None:
            ends = self._ends = self._page_ends(rows)
        return not ends[rows.age % self._ids.page_size]

    def _page_ends(self, rows: SteadyRows) -> bytearray:
        """By age of the rows, modulo the page size: whether the last token of one of the ledger's requests ends a page, or one that must
        not grow at home is to be looked at ahead."""
        page_size = self._ids.page_size
        ends, self._asking = bytearray(page_size), {}
        for index, (req, told) in enumerate(zip(rows.keys, rows.told, strict=True)):
            if is_managed(req):
                ends[-told % page_size] = 1
                if self._ask_at and self._must_ask(req):
                    for left in self._ask_at:
                        ends[(-told - left) % page_size] = 1
                        self._asking.setdefault((-told - left) % page_size, []).append(index)
        return ends

    def note_taken_over(self) -> None:
        """The ledger has taken over a request of the batch."""
        self._ends = None

    def to_secure(self, reqs: Sequence[Any], lengths: torch.Tensor, *, home_is_full: bool) -> Sequence[int]:
        """Which requests, ascending, end a page with their last token, or soon and may have to ask ahead. lengths: before the step's new
        one. home_is_full: that may be all of them, else those that must not grow at home."""
        rows, page_size = self._next(reqs), self._ids.page_size
        if rows is not None:
            ending = rows.near_end(GROW_AHEAD_TOKENS if home_is_full else 0)
            if home_is_full or not self._ask_at:
                return ending
            if self._ends is None:
                self._ends = self._page_ends(rows)
            asking = self._asking.get(rows.age % page_size)
            return ending if asking is None else sorted([*ending, *asking])
        told, ahead = lengths.tolist(), GROW_AHEAD_TOKENS if home_is_full or self._ask_at else 0
        near = [index for index, length in enumerate(told) if -length % page_size <= ahead]
        if home_is_full or not self._ask_at:
            return near
        return [index for index in near if told[index] % page_size == 0 or self._must_ask(reqs[index])]

    def beginning_page(self, reqs: Sequence[Any], lengths: torch.Tensor) -> Sequence[int]:
        """Which requests begin a page with the step's new token. lengths: with it. SGLang counts the new token of a request when it is
        allocated, just behind this question."""
        rows, page_size = self._next(reqs), self._ids.page_size
        if rows is not None:
            return rows.beginning(1)
        return [index for index, length in enumerate(lengths.tolist()) if (length - 1) % page_size == 0]

    # ----

    def _asks_with(self, max_degree: int) -> Sequence[int]:
        """Tokens left on the page of the last one with which a request that must not grow at home is looked at ahead; none where no request
        can come to that. Once is enough: its ask stays open, and the page before is there by then, unless pages are shorter than this."""
        if max_degree >= len(self._group):
            return ()
        page_size = self._ids.page_size
        return (GROW_AHEAD_TOKENS,) if page_size > GROW_AHEAD_TOKENS else range(1, page_size)

    def _must_ask(self, req: Any) -> bool:
        """Whether the request's pages come from elsewhere, whatever room there is at home."""
        return is_managed(req) and not self._participant.may_grow_at_home(req.dyncp)

    def _next(self, reqs: Sequence[Any]) -> SteadyRows | None:
        """The rows that were taken in last, if these requests are they: one of them is asked for its length."""
        rows = self._rows
        return rows if rows is not None and rows.are(reqs, reqs[-1].kv.kv_allocated_len if reqs else 0, 0) else None

    def _same_routes(self, rows: SteadyRows) -> bool:
        """Routes change where a page begins on another instance than the one before, and nowhere else."""
        if self._ends is not None and not self._ends[(rows.age - 1) % self._ids.page_size]:
            return True
        for i in rows.beginning():
            req = rows.keys[i]
            if is_managed(req) and not keeps_route(self._ids, req.dyncp, rows.tokens(i)):
                return False
        return True

    def _route(self, req: Any, length: int) -> int | None:
        """The route of a row of `length` tokens, None for one that this instance attends alone."""
        return route_of(self._ids, req.dyncp, length, self._group) if is_managed(req) else None
