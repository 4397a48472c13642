"""The batch of this instance's step beside that of the step before: most steps decode the same requests, one token on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sglang_dcp.ledger.messages import Row
from sglang_dcp.upstream.instance import Instance, is_managed

Span = tuple[Any, int, int]
"""(request, prefix_len, num_new), in token order."""


class OwnBatch:
    """Taken in once per step. A step like the last one, one token on, looks only at the rows that begin a page.

    steady: the same requests decode as in the step before, over the same routes.
    """

    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._reqs: list[Any] = []
        self._lengths = np.zeros(0, dtype=np.int64)
        self._routes: dict[int, int] = {}
        self._decodes = False
        self._spans: list[Span] | None = []
        self.steady = False

    @property
    def spans(self) -> list[Span]:
        if self._spans is None:
            self._spans = [(req, length - 1, 1) for req, length in zip(self._reqs, self._lengths.tolist(), strict=True)]
        return self._spans

    def take(self, batch: Any) -> None:
        """batch: SGLang's of the step, None or idle where this instance has no tokens."""
        if batch is None or batch.forward_mode.is_idle() or not batch.reqs:
            self.take_decode([], np.zeros(0, dtype=np.int64))
        elif batch.forward_mode.is_decode():
            self.take_decode(batch.reqs, batch.seq_lens_cpu.numpy())
        else:
            self.take_extend([(req, int(p), int(n)) for req, p, n in zip(batch.reqs, batch.prefix_lens, batch.extend_lens, strict=True)])

    def take_extend(self, spans: list[Span]) -> None:
        """A step that prefills."""
        self._decodes, self.steady, self._spans, self._reqs = False, False, spans, []
        ends = ((index, req, prefix_len + num_new) for index, (req, prefix_len, num_new) in enumerate(spans))
        self._routes = {index: route for index, req, end in ends if (route := self._route(req, end)) is not None}

    def take_decode(self, reqs: Sequence[Any], lengths: np.ndarray) -> None:
        """lengths: tokens of each sequence, the new one included."""
        before, self._lengths, self._spans = self._lengths, lengths.copy(), None
        # Lists of the same objects compare by identity.
        if self._decodes and self._reqs == reqs and bool((lengths == before + 1).all()) and self._same_routes():
            self.steady = True
            return
        self._decodes, self.steady, self._reqs = True, False, list(reqs)
        ends = enumerate(zip(reqs, lengths.tolist(), strict=True))
        self._routes = {index: route for index, (req, end) in ends if (route := self._route(req, end)) is not None}

    def sharded_rows(self) -> list[Row]:
        spans = self.spans
        return [Row(spans[i][0].dyncp.handle, spans[i][1], spans[i][2], route) for i, route in self._routes.items()]

    def _same_routes(self) -> bool:
        """Routes change where a page begins, and nowhere else."""
        page_size = self._instance.page_size
        begin = np.flatnonzero(self._lengths % page_size == 1 % page_size).tolist()
        return all(self._route(self._reqs[index], int(self._lengths[index])) == self._routes.get(index) for index in begin)

    def _route(self, req: Any, length: int) -> int | None:
        """The route of a row of `length` tokens, None for one that this instance attends alone."""
        if not is_managed(req) or not self._instance.is_sharded(req.dyncp, length):
            return None
        return self._instance.route_of(req.dyncp, length)
