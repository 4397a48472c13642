"""The batch of this instance's step beside that of the step before: most steps decode the same requests, one token on.

Such a step is told from the list of requests and one length. SGLang moves a batch's lengths on together (`seq_lens_cpu + 1`), so nothing is
read of tensors, and of the rows only those that begin or end a page are looked at: our code runs once per step, on caches that the step
has filled with other things, where each operation costs several times what it does in a loop. Where requests joined or left, the others
keep what is known of them.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

import torch

from sglang_dcp.dataflow.step_rows import Span
from sglang_dcp.ledger.kept_runs import Run, joined, kept_runs, stretches, without
from sglang_dcp.ledger.messages import RowColumns
from sglang_dcp.ledger.participant import Participant
from sglang_dcp.ledger.positions import keeps_route, route_of
from sglang_dcp.ledger.steady import SteadyRows
from sglang_dcp.upstream.step.managed import is_managed

GROW_AHEAD_TOKENS = 8
"""A request asks for its next remote tail page this many tokens before it needs it: a grant takes two steps to arrive."""


class OwnBatch:
    """Taken in once per step.

    steady: the same requests decode as in the step before, over the same routes. routes: of the sharded rows, by place in the batch.
    version: counts the changes of the rows; runs: of those before the last change, the ones that went on over the same route.
    """

    def __init__(self, participant: Participant) -> None:
        self._ids, self._group, self._participant = participant.ids, participant.group, participant
        self._ask_at = self._asks_with(participant.limits.max_degree)
        self._rows: SteadyRows | None = SteadyRows([], [])  # None: the last step prefilled
        self._coming: tuple[SteadyRows, list[Run]] | None = None  # of the next step's batch, looked at ahead of it
        self._spans: list[Span] | None = []
        self._managed: list[int] | None = []  # places of the ledger's requests, ascending; None: to be looked for
        self._ends: bytearray | None = None
        self._asking: dict[int, list[int]] = {}  # by the index of _ends, which was made with it
        self.routes: dict[int, int] = {}
        self.version = 0
        self.runs: list[Run] = []
        self.steady = False
        self._tells = False

    @property
    def spans(self) -> list[Span]:
        if self._spans is None:
            assert self._rows is not None
            before = self._rows.age - 1
            self._spans = [(req, told + before, 1) for req, told in zip(self._rows.keys, self._rows.told, strict=True)]
        return self._spans

    @property
    def rows(self) -> SteadyRows:
        """The requests, and the tokens of each with the step's new ones."""
        if self._rows is None:
            return SteadyRows([req for req, _, _ in self.spans], [before + new for _, before, new in self.spans])
        return self._rows

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
        self._rows, self._managed, self._coming, self.steady, self._spans = None, None, None, False, spans
        self.version, self.runs, self._tells = self.version + 1, [], True
        ends = ((index, req, prefix_len + num_new) for index, (req, prefix_len, num_new) in enumerate(spans))
        self.routes = {index: route for index, req, end in ends if (route := self._route(req, end)) is not None}

    def take_decode(self, reqs: Sequence[Any], lengths: torch.Tensor | None) -> None:
        """lengths: tokens of each sequence, the new one included, on the host."""
        self._spans = None
        rows, last = self._rows, reqs[-1].kv.kv_allocated_len if reqs else 0
        if rows is not None and rows.are(reqs, last, 1):
            rows.age += 1
            self._coming = None
            self.steady = self._same_routes(rows)
            if self.steady:
                self._tells = False
            else:
                self._change(rows, [(0, 0, len(rows))] if reqs else [])
            return
        if self._coming is None or not self._coming[0].are(reqs, last, 1):
            self._coming = self._others(reqs, lengths, 1, 1)
        rows, runs = self._coming
        rows.age += 1
        self._change(rows, runs)

    def _others(self, reqs: Sequence[Any], lengths: torch.Tensor | None, ahead: int, counted: int) -> tuple[SteadyRows, list[Run]]:
        """These requests, as of the step before, and which of that one's they are. `lengths` are `ahead` tokens on, what SGLang has counted
        as allocated for each request is `counted`."""
        before, keys = self._rows, list(reqs)
        if before is None or not before.keys or lengths is None:
            told = [] if lengths is None else (lengths - ahead if ahead else lengths).tolist()
            return SteadyRows(keys, told, self._ids.page_size), []
        ends = ((run, run[0] + run[2] - 1) for run in kept_runs(before.keys, keys))  # as in `are`: one of a stretch tells for all of it
        runs = [run for run, last in ends if before.keys[last].kv.kv_allocated_len == before.tokens(last) + counted]
        others = joined(runs, len(keys))
        first = others[0] if others else 0
        tail = lengths[first:].tolist() if others else []
        return before.moved(runs, keys, {index: tail[index - first] - ahead for index in others}), runs

    def _change(self, rows: SteadyRows, runs: list[Run]) -> None:
        """The batch is these rows from now on. runs: those that are one token on. Of these, the route is looked for where a page begins, as
        in `_same_routes`."""
        known, before, keys = self._managed, self.routes, rows.keys
        if known is None:
            known, runs = [], []
        managed: list[int] = []
        routes: dict[int, int] = {}
        num_kept = 0
        for others, stretch in stretches(runs, len(keys)):
            for index in others:
                if is_managed(keys[index]):
                    managed.append(index)
                    self._put_route(routes, index, self._route(keys[index], rows.tokens(index)))
            shift = others.stop - stretch.start
            kept = known[bisect_left(known, stretch.start) : bisect_left(known, stretch.stop)]
            managed += [place + shift for place in kept]
            moved = [(place + shift, before[place]) for place in kept if place in before]
            num_kept += len(moved)
            routes.update(moved)
        rerouted = []
        for index in rows.beginning() if runs else ():
            if is_managed(keys[index]) and (route := self._route(keys[index], rows.tokens(index))) != routes.get(index):
                rerouted.append(index)
                self._put_route(routes, index, route)
        self._rows, self._managed, self._ends, self._coming, self.steady = rows, managed, None, None, False
        self.routes = dict(sorted(routes.items())) if rerouted else routes
        self._tells = bool(rerouted) or not num_kept == len(before) == len(routes)
        self.version, self.runs = self.version + 1, without(runs, rerouted) if rerouted else runs

    @staticmethod
    def _put_route(routes: dict[int, int], index: int, route: int | None) -> None:
        if route is None:
            routes.pop(index, None)
        else:
            routes[index] = route

    def news(self) -> RowColumns | None:
        """`sharded_rows`, None where they are those of the step before, one token on."""
        return self.sharded_rows() if self._tells else None

    def sharded_rows(self) -> RowColumns:
        rows, routes = self._rows, self.routes
        if rows is None:
            spans = [self.spans[index] for index in routes]
            columns = [req.dyncp.handle for req, _, _ in spans], [before for _, before, _ in spans], [new for _, _, new in spans]
            return RowColumns(*columns, list(routes.values()))
        keys, told, before = rows.keys, rows.told, rows.age - 1
        handles = [keys[index].dyncp.handle for index in routes]
        return RowColumns(handles, [told[index] + before for index in routes], [1] * len(routes), list(routes.values()))

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
        if self._managed is None:
            self._managed = [index for index, req in enumerate(rows.keys) if is_managed(req)]
        for index in self._managed:
            told = rows.told[index]
            ends[-told % page_size] = 1
            if self._ask_at and self._must_ask(rows.keys[index]):
                for left in self._ask_at:
                    ends[(-told - left) % page_size] = 1
                    self._asking.setdefault((-told - left) % page_size, []).append(index)
        return ends

    def note_taken_over(self) -> None:
        """The ledger has taken over a request of the batch."""
        self._ends = self._managed = None

    def to_secure(self, reqs: Sequence[Any], lengths: torch.Tensor, *, home_is_full: bool) -> Sequence[int]:
        """Which requests, ascending, end a page with their last token, or soon and may have to ask ahead. lengths: before the step's new
        one. home_is_full: that may be all of them, else those that must not grow at home."""
        rows = self._next(reqs, lengths, 0)
        if home_is_full or not self._ask_at:
            return rows.near_end(GROW_AHEAD_TOKENS if home_is_full else 0)
        if rows is not self._rows:
            near, page_size = rows.near_end(GROW_AHEAD_TOKENS), self._ids.page_size
            return [index for index in near if rows.tokens(index) % page_size == 0 or self._must_ask(reqs[index])]
        if self._ends is None:
            self._ends = self._page_ends(rows)
        asking = self._asking.get(rows.age % self._ids.page_size)
        return rows.near_end(0) if asking is None else sorted([*rows.near_end(0), *asking])

    def beginning_page(self, reqs: Sequence[Any], lengths: torch.Tensor) -> Sequence[int]:
        """Which requests begin a page with the step's new token. lengths: with it. SGLang counts the new token of a request when it is
        allocated, just behind this question."""
        return self._next(reqs, lengths, 1).beginning(1)

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

    def _next(self, reqs: Sequence[Any], lengths: torch.Tensor, ahead: int) -> SteadyRows:
        """The rows that were taken in last, if these requests are they: one of them is asked for its length. Else those to be taken in,
        which are kept for that. lengths: `ahead` tokens on."""
        rows, last = self._rows, reqs[-1].kv.kv_allocated_len if reqs else 0
        if rows is not None and rows.are(reqs, last, 0):
            return rows
        if self._coming is None or not self._coming[0].are(reqs, last, 0):
            self._coming = self._others(reqs, lengths, ahead, 0)
        return self._coming[0]

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
