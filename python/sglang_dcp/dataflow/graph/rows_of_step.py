"""Where the rows of a captured step's tables come from: the own batch, and what other homes told. What was made of either is kept."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

from sglang_dcp.dataflow.graph.route_words import route_word32, route_words
from sglang_dcp.dataflow.graph.table_rows import ARRIVES, GROWS, POOLED, STAYS, TableRows
from sglang_dcp.ledger.homes import HomeRequest
from sglang_dcp.ledger.kept_runs import Run, kept_runs, narrowed, squeezed, stretches
from sglang_dcp.ledger.messages import RowColumns
from sglang_dcp.ledger.participant import Participant
from sglang_dcp.ledger.routes import shard_mask, travelling_tail
from sglang_dcp.ledger.steady import SteadyRows

_ABSENT = 255
"""Kind of an own row without a page here."""


class DecodeBatch(Protocol):
    """Of a decode step: own_batch.OwnBatch."""

    @property
    def rows(self) -> SteadyRows: ...

    @property
    def version(self) -> int: ...

    @property
    def runs(self) -> list[Run]: ...

    @property
    def routes(self) -> Mapping[int, int]: ...


class _Guests(NamedTuple):
    """What a home told (None: it is to be looked at again), those of its rows that are attended here, and where they began among the rows
    made last."""

    told: RowColumns | None
    rows: TableRows
    words: np.ndarray
    begin: int


class _Own(NamedTuple):
    """The own batch of this version: its rows, among them the absent ones, their route words (one memory), and where the others began among
    the rows made last."""

    version: int
    rows: TableRows
    routes: array[int]
    words: np.ndarray
    absent: list[int]
    begin: int


class RowsOfStep:
    """Makes a step's rows, and says which of those made last are among them."""

    def __init__(self, participant: Participant) -> None:
        self._participant = participant
        self._guests: dict[int, _Guests] = {}
        self._own = _Own(-1, TableRows(), array("i"), np.zeros(0, dtype=np.int32), [], 0)
        self._last: object = None

    @property
    def _place(self) -> int:
        """Of this instance in its exchange group."""
        return self._participant.group.index(self._participant.rank)

    def make(self, batch: DecodeBatch) -> tuple[list[np.ndarray], TableRows]:
        """Route words of every home of the exchange group, and this instance's attention rows: guests by home, own rows last. Clients may
        give two requests one id; the objects differ, and the batch keeps those of a step up to the next."""
        participant, words = self._participant, []
        found = TableRows(participant.step)
        for home in participant.group:
            if home != participant.rank:
                words.append(self._add_guests(home, found))
        words.insert(self._place, self._add_own(batch, found))
        found.came_from, self._last = self._last, found.name
        return words, found

    def _add_guests(self, home: int, found: TableRows) -> np.ndarray:
        table, known, begin = self._participant.rows_of[home], self._guests.get(home), len(found)
        if known is None or known.told is not table.told:
            rows, runs = self._guest_rows(home, found.step), []
            told = table.told if () not in rows.places else None  # pages that come later are in no list yet
            if known is not None:
                runs = narrowed(kept_runs(known.rows.keys, rows.keys), known.rows.kinds, rows.kinds)
                runs = narrowed(narrowed(runs, known.rows.bases, rows.bases), known.rows.places, rows.places)
                found.runs += [(known.begin + old, begin + new, size) for old, new, size in runs]
            known = _Guests(told, rows, route_words(table.told.routes), begin)
        elif known.rows.keys:
            found.runs.append((known.begin, begin, len(known.rows)))
            known = _Guests(known.told, known.rows, known.words, begin)
        self._guests[home] = known
        found.extend(known.rows)
        return known.words

    def _guest_rows(self, home: int, step: int) -> TableRows:
        """Rows of a home that has told others than it had."""
        table, place, guests = self._participant.rows_of[home], self._place, self._participant.guests
        told, rows, kinds = table.told, TableRows(step), {}
        for route in set(told.routes):
            arrives = ARRIVES if travelling_tail(route) == place else STAYS
            kinds[route] = arrives if shard_mask(route) >> place & 1 else _ABSENT
        ahead = table.age + 1
        for handle, prefix_len, route in zip(told.handles, told.prefix_lens, told.routes, strict=True):
            if kinds[route] != _ABSENT:
                rows.append((home, handle), prefix_len + ahead, kinds[route], guests.pages_of(home, handle))
        return rows

    def _add_own(self, batch: DecodeBatch, found: TableRows) -> np.ndarray:
        """Own rows behind the guests; those without a page here are none. Returns the home's route words, of every row."""
        known, begin = self._own, len(found)
        if batch.version == known.version:
            own, runs = known._replace(begin=begin), [(0, 0, len(known.rows))] if known.rows.keys else []
        else:
            own, runs = self._own_rows(batch, found.step, begin)
        self._own = own
        runs = squeezed(runs, known.absent, own.absent) if own.absent or known.absent else runs
        found.runs += [(known.begin + old, begin + new, size) for old, new, size in runs]
        end = 0
        for place in own.absent:
            found.extend(own.rows, slice(end, place))
            end = place + 1
        found.extend(own.rows, slice(end, None))
        return own.words

    def _own_rows(self, batch: DecodeBatch, step: int, begin: int) -> tuple[_Own, list[Run]]:
        """Of a batch that has changed; and what stayed of the rows made last."""
        known, size, words = self._own, len(batch.rows), array("i")
        runs = batch.runs if batch.version == known.version + 1 else []
        rows, keys, place = TableRows(step), batch.rows.keys, self._place
        for joined, stretch in stretches(runs, size):
            for index in joined:
                route = batch.routes.get(index)
                if route is None:
                    rows.append(id(keys[index]), batch.rows.tokens(index), POOLED, keys[index].kv.req_pool_idx)
                    words.append(1 << place)
                else:
                    self._append_sharded(keys[index].dyncp, batch.rows.tokens(index), route, rows)
                    words.append(route_word32(route))
            if stretch.stop:
                rows.extend(known.rows, stretch)
                words += known.routes[stretch]
        absent = [place for place, kind in enumerate(rows.kinds) if kind == _ABSENT] if _ABSENT in rows.kinds else []
        return _Own(batch.version, rows, words, np.frombuffer(words, dtype=np.int32), absent, begin), runs

    def _append_sharded(self, request: HomeRequest, length: int, route: int, rows: TableRows) -> None:
        is_here = shard_mask(route) >> self._place & 1
        kind = _ABSENT if not is_here else GROWS if travelling_tail(route) < 0 else STAYS
        rows.append((self._participant.rank, request.handle), length, kind, request.own_pages)
