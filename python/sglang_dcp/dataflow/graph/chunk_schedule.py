"""How long a FlashInfer schedule of captured decode rows serves.

FlashInfer's tensor-core decode (fa2) cuts every row into chunks of equally many pages and lists the chunks per thread block; lengths
themselves are read on the device. A schedule therefore serves every step in which no row has another number of chunks: planning again,
which costs the host more than all else in a step, can wait for that. Where its fields lie is FlashInfer's own affair, so what is read is
checked against the lengths that were planned; a schedule that cannot be read serves its own step only.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)

OUTPUT_INDPTR_FIELD, CHUNK_TOKENS_FIELD = 8, 9
"""Places in FlashInfer's PrefillPlanInfo (0.7.2) of two byte offsets: the rows' first chunks [rows + 1], and the tokens of a chunk."""


class ChunkSchedule:
    """What the last plan of one wrapper decided. counts: pages per row, int."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._pages_per_chunk = 0
        self._num_chunks: bytes | None = None  # of each row, int64
        self._warned = False

    def read(self, wrapper: Any, counts: np.ndarray) -> None:
        """Behind `wrapper.plan` for rows of these page counts."""
        self._num_chunks = None
        try:
            info, host = wrapper._plan_info, wrapper._pin_memory_int_workspace_buffer.numpy()
            pages_per_chunk, rest = divmod(int(_words(host, int(info[CHUNK_TOKENS_FIELD]), 1)[0]), self._page_size)
            begin = _words(host, int(info[OUTPUT_INDPTR_FIELD]), len(counts) + 1)
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            self._warn(repr(error))
            return
        if rest or pages_per_chunk < 1:
            self._warn(f"chunks of {pages_per_chunk} pages and {rest} tokens")
            return
        num_chunks = _ceil_chunks(counts, pages_per_chunk)
        beyond = np.diff(begin) - num_chunks
        # The first row may have an empty one behind its end (split_budget.py).
        if beyond[0] not in (0, 1) or beyond[1:].any():
            self._warn("it does not list the chunks that its rows have")
            return
        self._pages_per_chunk, self._num_chunks = pages_per_chunk, num_chunks.tobytes()

    def serves(self, counts: np.ndarray) -> bool:
        """Whether the schedule serves rows of these page counts, as many rows as it was planned for."""
        return self._num_chunks is not None and _ceil_chunks(counts, self._pages_per_chunk).tobytes() == self._num_chunks

    def serves_longer(self, begun: Sequence[int]) -> bool:
        """The same where rows that it serves began a page since, and have these many now."""
        if self._num_chunks is None:
            return False
        for pages in begun:  # noqa: SIM110 (a step waits for this: no generator)
            if (pages - 1) % self._pages_per_chunk == 0:
                return False
        return True

    def _warn(self, what: str) -> None:
        if not self._warned:
            logger.warning("dyncp: FlashInfer's schedule cannot be read (%s): every step is planned anew", what)
        self._warned = True


def _words(host: np.ndarray, offset: int, count: int) -> np.ndarray:
    words = host[offset : offset + 4 * count].view(np.int32)
    if len(words) != count:
        raise IndexError(f"{count} words at byte {offset} of {len(host)}")
    return words


def _ceil_chunks(counts: np.ndarray, pages_per_chunk: int) -> np.ndarray:
    """A row without pages has one chunk, which is empty."""
    return (np.maximum(counts, 1, dtype=np.int64) + (pages_per_chunk - 1)) // pages_per_chunk
