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


class OwnBatch:
    """Taken in once per step.

    steady: the same requests decode as in the step before, over the same routes. routes: of the sharded rows, by place in the batch.
    """

    def __init__(self, participant: Participant) -> None:
        self._ids, self._group = participant.ids, participant.group
        self._rows: SteadyRows | None = SteadyRows((), ())  # None: the last step prefilled
        self._spans: list[Span] | None = []
        self._ends: bytearray | None = None
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
        """Whether these are the requests taken in last, and none of the ledger's begins a page with its next token."""
        rows = self._rows
        if rows is None or not reqs or not rows.are(reqs, reqs[-1].kv.kv_allocated_len, 0):
            return False
        ends = self._ends
        if ends is None:
            ends = self._ends = self._page_ends(rows)
        return not ends[rows.age % self._ids.page_size]

    def _page_ends(self, rows: SteadyRows) -> bytearray:
        """By age of the rows, modulo the page size: whether the last token of one of the ledger's requests ends a page."""
        ends = bytearray(self._ids.page_size)
        for req, told in zip(rows.keys, rows.told, strict=True):
            if is_managed(req):
                ends[-told % self._ids.page_size] = 1
        return ends

    def note_taken_over(self) -> None:
        """The ledger has taken over a request of the batch."""
        self._ends = None

    def near_page_end(self, reqs: Sequence[Any], lengths: torch.Tensor, tokens: int) -> Sequence[int]:
        """Which requests have room for at most `tokens` more on the page of their last token. lengths: before the step's new one."""
        rows, page_size = self._next(reqs), self._ids.page_size
        if rows is not None:
            return rows.near_end(tokens)
        return [index for index, length in enumerate(lengths.tolist()) if -length % page_size <= tokens]

    def beginning_page(self, reqs: Sequence[Any], lengths: torch.Tensor) -> Sequence[int]:
        """Which requests begin a page with the step's new token. lengths: with it. SGLang counts the new token of a request when it is
        allocated, just behind this question."""
        rows, page_size = self._next(reqs), self._ids.page_size
        if rows is not None:
            return rows.beginning(1)
        return [index for index, length in enumerate(lengths.tolist()) if (length - 1) % page_size == 0]

    # ----

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
