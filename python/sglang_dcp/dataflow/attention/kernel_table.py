"""Attention rows as paged kernels want them: indptr arrays over queries and pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sglang_dcp.dataflow.contracts import AttentionRow


@dataclass(frozen=True)
class KernelTable:
    """Rows as int32 host arrays of a paged kernel's plan. n rows, p pages.

    query_indptr [n + 1], page_indptr [n + 1], page_indices [p], last_page_length [n], num_keys [n].
    """

    query_indptr: np.ndarray
    page_indptr: np.ndarray
    page_indices: np.ndarray
    last_page_length: np.ndarray
    num_keys: np.ndarray

    @property
    def num_queries(self) -> int:
        return int(self.query_indptr[-1])


def kernel_table(rows: Sequence[AttentionRow], page_size: int) -> KernelTable:
    num_keys = np.array([row.num_keys for row in rows], dtype=np.int32)
    num_pages = -(-num_keys // page_size)
    pages = [row.page_numbers[:count] for row, count in zip(rows, num_pages, strict=True)]
    return KernelTable(
        query_indptr=_indptr([row.num_queries for row in rows]),
        page_indptr=_indptr(num_pages),
        page_indices=np.concatenate([np.zeros(0, dtype=np.int64), *pages]).astype(np.int32),
        last_page_length=(num_keys - (num_pages - 1) * page_size).astype(np.int32),
        num_keys=num_keys,
    )


def _indptr(counts: Iterable[int]) -> np.ndarray:
    return np.cumsum([0, *counts]).astype(np.int32)
