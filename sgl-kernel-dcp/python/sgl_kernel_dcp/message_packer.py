"""A step's message, packed anew where it changed: the words of most homes are those of the message before."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sgl_kernel_dcp.message_checks import ROUTE_TAIL_SHIFT, check_limit, check_rows, check_words
from sgl_kernel_dcp.shapes import TableShape

if TYPE_CHECKING:
    from sgl_kernel_dcp.tables import StepArrays

NUM_ROWS_WORD = 16


class MessagePacker:
    """Packs the messages of one instance; a home whose words are the array of the message before is not looked at
    again, so an array that was handed in stays as it is.

    expects: a byte per attention row of the last message, 1 where K/V arrives for it. address: where all messages lie.
    """

    def __init__(self, shape: TableShape, rank: int, num_entries: int, max_return_rows: int, layout: dict[str, int]) -> None:
        self._shape, self._rank, self._num_entries, self._max_return_rows = shape, rank, num_entries, max_return_rows
        self._rows_begin, routes = layout["input_rows"], layout["input_routes"]
        self._packed = np.zeros(self._rows_begin + 4 * shape.max_attention_rows, dtype=np.int32)
        self.address = int(self._packed.__array_interface__["data"][0])
        per_home = shape.max_home_rows
        self._routes = [self._packed[routes + home * per_home : routes + (home + 1) * per_home] for home in range(shape.num_instances)]
        self._words: list[np.ndarray | None] = [None] * shape.num_instances
        self._expects = [b""] * shape.num_instances
        self.expects = b""

    def pack(self, arrays: StepArrays) -> np.ndarray:
        """int32 words, valid until the next call. ValueError naming the value and its limit; then nothing was packed."""
        words, rows, shape = arrays.words, arrays.rows, self._shape
        if len(words) != shape.num_instances:
            raise ValueError(f"routes name {len(words)} homes, the group has {shape.num_instances}")
        changed = [home for home, word in enumerate(words) if word is not self._words[home]]
        for home in changed:
            self._take(home, words[home])
        if changed:
            self.expects = b"".join([*self._expects[: self._rank], *self._expects[self._rank + 1 :], self._expects[self._rank]])
        num_rows = len(self.expects)
        if num_rows != len(rows):
            raise ValueError(f"routes give instance {self._rank} {num_rows} attention rows, the message lists {len(rows)}")
        check_limit("attention rows (max_attention_rows)", num_rows, shape.max_attention_rows)
        check_rows(rows, shape, self._num_entries, self.expects)
        packed = self._packed[: self._rows_begin + 4 * num_rows]
        packed[NUM_ROWS_WORD] = num_rows
        packed[self._rows_begin :] = rows.reshape(-1)
        return packed

    def _take(self, home: int, words: np.ndarray) -> None:
        """Checks and packs a home's words."""
        size, rank = len(words), self._rank
        self._words[home] = None
        check_limit(f"home rows of instance {home} (max_home_rows)", size, self._shape.max_home_rows)
        numbers: list[int] = words.tolist()
        different = set(numbers)
        check_words(home, different, self._shape.num_instances)
        if home == rank:
            self._check_returns(numbers)
            self._expects[home] = bytes(sum(map(numbers.count, [word for word in different if word >> rank & 1])))
        else:
            here = [word for word in numbers if word >> rank & 1]
            self._expects[home] = bytes([word >> ROUTE_TAIL_SHIFT == rank + 1 for word in here])
        routes, before = self._routes[home], int(self._packed[home])
        routes[:size] = words
        if size < before:
            routes[size:before] = 0
        self._packed[home], self._words[home] = size, words

    def _check_returns(self, numbers: list[int]) -> None:
        others = self._shape.num_instances - 1
        if (len(numbers) - numbers.count(1 << self._rank)) * others <= self._max_return_rows:
            return  # even if all of them went to everybody
        remote = (1 << ROUTE_TAIL_SHIFT) - 1 & ~(1 << self._rank)
        returns = sum((word & remote).bit_count() for word in numbers)
        check_limit("partials that return (max_return_rows)", returns, self._max_return_rows)
