"""Attention rows as paged kernels want them: spans of queries that see a leading part of a page list, all of it or causally at its end.

A chunk's K/V may lie on several shards, so the queries of one row can differ in what they see here. A row is cut where that changes:
before a run of the chunk's keys that this shard holds its queries see what came earlier, within the run they see it causally, behind it
they see all of it. Each query belongs to one span at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from sglang_dcp.dataflow.contracts import AttentionRow


@dataclass(frozen=True)
class Span:
    """Queries query_start .. + num_queries of [own tokens, received queries] over the first num_keys tokens of `page_numbers`.

    causal: the queries are the last of these tokens, each sees those up to itself. Else every query sees every key.
    """

    query_start: int
    num_queries: int
    page_numbers: np.ndarray
    num_keys: int
    causal: bool


@dataclass(frozen=True)
class SpanTable:
    """Spans of one kind, as int32 host arrays of a paged kernel's plan. n spans, q queries, p pages.

    queries [q] (int64): which of [own tokens, received queries]. query_indptr [n + 1], page_indptr [n + 1], page_indices [p],
    last_page_length [n], num_keys [n].
    """

    queries: np.ndarray
    query_indptr: np.ndarray
    page_indptr: np.ndarray
    page_indices: np.ndarray
    last_page_length: np.ndarray
    num_keys: np.ndarray

    def __len__(self) -> int:
        return len(self.num_keys)


def row_spans(row: AttentionRow) -> Iterator[Span]:
    """The spans of a row; queries that see no key here are in none."""

    def span(first: int, stop: int, num_keys: int, causal: bool) -> Span:
        return Span(row.query_start + first, stop - first, row.page_numbers, num_keys, causal)

    done, seen = 0, row.num_unmasked
    for first, stop in _runs(row.key_offsets.numpy()):
        if done < first and seen:
            yield span(done, first, seen, causal=False)
        seen += stop - first
        yield span(first, stop, seen, causal=stop - first > 1)
        done = stop
    if done < row.num_queries and seen:
        yield span(done, row.num_queries, seen, causal=False)


def _runs(offsets: np.ndarray) -> list[tuple[int, int]]:
    """Runs of consecutive values, as (first, last + 1)."""
    if not len(offsets):
        return []
    breaks = np.flatnonzero(np.diff(offsets) != 1) + 1
    return [(int(run[0]), int(run[-1]) + 1) for run in np.split(offsets, breaks)]


def span_tables(rows: Iterable[AttentionRow], page_size: int) -> tuple[SpanTable, SpanTable]:
    """(spans that see all their keys, causal spans) of a step's rows."""
    spans = [span for row in rows for span in row_spans(row)]
    return _table([s for s in spans if not s.causal], page_size), _table([s for s in spans if s.causal], page_size)


def _table(spans: list[Span], page_size: int) -> SpanTable:
    num_keys = np.array([span.num_keys for span in spans], dtype=np.int32)
    num_pages = -(-num_keys // page_size)
    queries = [np.arange(span.query_start, span.query_start + span.num_queries) for span in spans]
    pages = [span.page_numbers[:count] for span, count in zip(spans, num_pages, strict=True)]
    return SpanTable(
        queries=np.concatenate([np.zeros(0, dtype=np.int64), *queries]),
        query_indptr=_indptr([span.num_queries for span in spans]),
        page_indptr=_indptr(num_pages),
        page_indices=np.concatenate([np.zeros(0, dtype=np.int64), *pages]).astype(np.int32),
        last_page_length=(num_keys - (num_pages - 1) * page_size).astype(np.int32),
        num_keys=num_keys,
    )


def _indptr(counts: Iterable[int]) -> np.ndarray:
    return np.cumsum([0, *counts]).astype(np.int32)
