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
from sglang_dcp.ledger.page_phases import PagePhases
from sglang_dcp.ledger.participant import Participant
from sglang_dcp.ledger.positions import keeps_route, route_of
from sglang_dcp.upstream.step.managed import is_managed


class OwnBatch:
    """Taken in once per step.

    steady: the same requests decode as in the step before, over the same routes. routes: of the sharded rows, by place in the batch.
    """

    def __init__(self, participant: Participant) -> None:
        self._ids = participant.ids
        self._reqs: list[Any] = []
        self._lengths: list[int] = []
        self._age = 0
        self._phases: PagePhases | None = None
        self._decodes = False
        self._spans: list[Span] | None = []
        self.routes: dict[int, int] = {}
        self.steady = False

    @property
    def spans(self) -> list[Span]:
        if self._spans is None:
            before = self._age - 1
            self._spans = [(req, length + before, 1) for req, length in zip(self._reqs, self._lengths, strict=True)]
        return self._spans

    def __len__(self) -> int:
        return len(self._spans if self._spans is not None else self._reqs)

    def take(self, batch: Any) -> None:
        """batch: SGLang's of the step, None or idle where this instance has no tokens."""
        if batch is None or batch.forward_mode.is_idle() or not batch.reqs:
            self.take_decode([], None)
        elif batch.forward_mode.is_decode():
            self.take_decode(batch.reqs, batch.seq_lens_cpu)
        else:
            self.take_extend([(req, int(p), int(n)) for req, p, n in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True)])

    def take_extend(self, spans: list[Span]) -> None:
        """A step that prefills."""
        self._decodes, self.steady, self._spans, self._reqs = False, False, spans, []
        ends = ((index, req, prefix_len + num_new) for index, (req, prefix_len, num_new) in enumerate(spans))
        self.routes = {index: route for index, req, end in ends if (route := self._route(req, end)) is not None}

    def take_decode(self, reqs: Sequence[Any], lengths: torch.Tensor | None) -> None:
        """lengths: tokens of each sequence, the new one included, on the host."""
        self._spans = None
        if self._is_on(reqs, 1):
            self._age += 1
            self.steady = self._same_routes()
            if self.steady:
                return
        else:
            self._reqs, self._lengths = list(reqs), [] if lengths is None else lengths.tolist()
            self._decodes, self.steady, self._phases, self._age = True, False, None, 0
        ends = enumerate(zip(self._reqs, self._lengths, strict=True))
        self.routes = {index: route for index, (req, told) in ends if (route := self._route(req, told + self._age)) is not None}

    def sharded_rows(self) -> list[Row]:
        spans = self.spans
        return [Row(spans[i][0].dyncp.handle, spans[i][1], spans[i][2], route) for i, route in self.routes.items()]

    # ---- of the next step's batch, before it is taken in

    def near_page_end(self, reqs: Sequence[Any], lengths: torch.Tensor, tokens: int) -> Sequence[int]:
        """Which requests have room for at most `tokens` more on the page of their last token. lengths: before the step's new one."""
        phases, age = self._phases_at(reqs, lengths, self._age)
        return phases.near_end(age, tokens)

    def beginning_page(self, reqs: Sequence[Any], lengths: torch.Tensor) -> Sequence[int]:
        """Which requests begin a page with the step's new token. lengths: with it."""
        phases, age = self._phases_at(reqs, lengths, self._age + 1)
        return phases.beginning(age)

    def _phases_at(self, reqs: Sequence[Any], lengths: torch.Tensor, age: int) -> tuple[PagePhases, int]:
        """Phases and the age to ask them for: the known ones at `age`, or those of `lengths`.

        SGLang counts a request's new token when it is allocated, just behind these questions.
        """
        return (self._own_phases(), age) if self._is_on(reqs, 0) else (self._phases_of(lengths.tolist()), 0)

    # ----

    def _is_on(self, reqs: Sequence[Any], tokens: int) -> bool:
        """Whether these are the requests that were taken in last and decoded, `tokens` on. One is asked for its length."""
        if not self._decodes or self._reqs != reqs:  # lists of the same objects compare by identity
            return False
        return not reqs or reqs[-1].kv.kv_allocated_len == self._lengths[-1] + self._age + tokens

    def _own_phases(self) -> PagePhases:
        if self._phases is None:
            self._phases = self._phases_of(self._lengths)
        return self._phases

    def _phases_of(self, lengths: Sequence[int]) -> PagePhases:
        return PagePhases(enumerate(lengths), self._ids.page_size)

    def _same_routes(self) -> bool:
        """Routes change where a page begins on another instance than the one before, and nowhere else."""
        for i in self._own_phases().beginning(self._age):
            req = self._reqs[i]
            if is_managed(req) and not keeps_route(self._ids, req.dyncp, self._lengths[i] + self._age):
                return False
        return True

    def _route(self, req: Any, length: int) -> int | None:
        """The route of a row of `length` tokens, None for one that this instance attends alone."""
        return route_of(self._ids, req.dyncp, length) if is_managed(req) else None
