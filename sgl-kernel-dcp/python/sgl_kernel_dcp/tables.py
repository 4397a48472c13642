"""The step's tables: the host writes one small message, one kernel turns it into everything the layers read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sgl_kernel_dcp.build import load_library
from sgl_kernel_dcp.message_checks import ROUTE_TAIL_SHIFT, check_rows
from sgl_kernel_dcp.message_packer import MessagePacker
from sgl_kernel_dcp.shapes import TableShape

if TYPE_CHECKING:
    import torch

FROM_TOKEN_TABLE = -2
"""`RowLine.new_page` of FROM_TOKEN_TABLE - line: the page is where that line of the token table has its first token."""
TARGET_SLOT_BITS = 24
SECTION_EXTENTS = {
    "header": "header",
    "target_count": "home",
    "send_target": "home_partials",
    "merge_source": "home_partials",
    "kv_target": "home",
    "return_target": "attention",
    "kv_source": "kv",
    "kv_slot": "kv",
    "kv_length": "attention",
    "page_indptr": "attention_plus_one",
    "last_page_length": "attention",
    "page_indices": "pages",
    "block_table": "attention_pages",
}


class RowLine(NamedTuple):
    """One attention row of this instance, in the order (home, position in that home's list for this instance), its own rows last."""

    entry: int  # line of the resident page table
    tokens: int  # tokens that this shard holds after the step's new one; 0 for an empty shard
    new_page: int = -1  # page appended by this step, for the row's last token; from FROM_TOKEN_TABLE downwards: known to the device alone
    kv_slot: int = -1  # where the arriving K/V row goes; -1: none arrives (own home, or tail elsewhere)


@dataclass(frozen=True)
class StepMessage:
    """What one instance must know of one step.

    routes[h][m]: the shards of row m of home h, as a sequence of instances without repetition.
    tails[h][m]:  the instance that the row's new K/V must travel to, or -1 (tail at home).
    rows:         this instance's attention rows.
    """

    routes: list[list[list[int]]]
    tails: list[list[int]]
    rows: list[RowLine]

    def arrays(self) -> StepArrays:
        words = []
        for shards_of_rows, tails in zip(self.routes, self.tails, strict=True):
            masks = [sum(1 << shard for shard in shards) for shards in shards_of_rows]
            words.append(np.array([m | (t + 1) << ROUTE_TAIL_SHIFT for m, t in zip(masks, tails, strict=True)], dtype=np.int32))
        return StepArrays(words, np.array(self.rows, dtype=np.int32).reshape(-1, 4))


@dataclass(frozen=True)
class StepArrays:
    """A `StepMessage` as the host packs it, for callers that build arrays anyway.

    words[h]: int32, one per row of home h: a bit per shard, the instance its new K/V travels to + 1 from bit ROUTE_TAIL_SHIFT on (0: none).
              Rows that another home attends alone may be left out: they move no slot here.
    rows:     int32 [attention rows, 4], the fields of `RowLine`.
    """

    words: list[np.ndarray]
    rows: np.ndarray


class StepTables:
    """Static device buffers of one instance.

    `upload` checks a message and sends it, without a wait; `build` launches the one kernel and may be captured.
    `resident_pages[entry]` lists a request's pages on this shard; its owner fills a line when the request arrives, later pages come
    with `RowLine.new_page`. The rows of an upload may be changed when it returns; words that come again as the same array are unchanged.
    """

    def __init__(self, shape: TableShape, rank: int, num_entries: int, device: torch.device | str, max_return_rows: int) -> None:
        import torch

        self.shape, self.rank, self.num_entries, self.max_return_rows = shape, rank, num_entries, max_return_rows
        self._library = load_library()
        self._packed_shape = bytes(shape.record())
        self.layout: dict[str, int] = {str(k): int(v) for k, v in self._library.table_layout(self._packed_shape).items()}
        self.buffer = torch.zeros(self.layout["total_size"], dtype=torch.int32, device=device)
        self.resident_pages = torch.zeros(num_entries, shape.max_pages_per_row, dtype=torch.int32, device=device)
        self._sent, self._address = np.zeros(0, dtype=np.int32), 0
        self._expects = b""
        self._no_token_table = torch.zeros(0, 0, dtype=torch.int32, device=device)

    def upload(self, message: StepMessage | StepArrays) -> None:
        """Checks the message against the capacities and sends it on the current stream."""
        packer = self._packer
        packed = packer.pack(message.arrays() if isinstance(message, StepMessage) else message)
        self._expects = packer.expects
        self._library.send_words(self.buffer, packer.address, 0, len(packed))

    def upload_rows(self, rows: np.ndarray, *, check: bool = True) -> None:
        """Likewise for a step that keeps the routes and entries of the one before: token counts, new pages and K/V slots of the same rows
        (`StepArrays`). check=False: the caller has kept the counts within the capacities."""
        if len(rows) != len(self._expects):
            raise ValueError(f"{len(rows)} rows, the routes uploaded last give {len(self._expects)}")
        if check:
            check_rows(rows, self.shape, self.num_entries, self._expects)
        self._send(rows, self.layout["input_rows"])

    def upload_rows_at(self, address: int) -> None:
        """The same without a look at them: as many rows as were uploaded last, int32 [rows, 4] contiguous at this address of the host,
        their counts within the capacities."""
        self._library.send_words(self.buffer, address, self.layout["input_rows"], 4 * len(self._expects))

    def _send(self, words: np.ndarray, begin: int) -> None:
        """words: int32, contiguous. An array that is sent again, with other values, is not looked at again."""
        if words is not self._sent:
            if words.dtype != np.int32 or not words.flags.c_contiguous:
                raise ValueError(f"words of the message must be contiguous int32, got {words.dtype} with strides {words.strides}")
            self._sent, self._address = words, words.__array_interface__["data"][0]
        self._library.send_words(self.buffer, self._address, begin, self._sent.size)

    def pack(self, message: StepMessage | StepArrays) -> np.ndarray:
        """The message as int32 words; raises ValueError naming the value and its limit."""
        return pack_message(message, self.shape, self.rank, self.num_entries, self.max_return_rows, self.layout)

    @cached_property
    def _packer(self) -> MessagePacker:
        return MessagePacker(self.shape, self.rank, self.num_entries, self.max_return_rows, self.layout)

    def build(self, token_table: torch.Tensor | None = None, pool_pages: int = 1) -> None:
        """One kernel on the current stream; reads the uploaded message, writes every table. token_table int32 [lines, width]: token ids
        of requests by position, for rows whose new page only the device knows; a page there that is not below pool_pages becomes page 0.
        May be captured, then both stay where they are."""
        table = self._no_token_table if token_table is None else token_table
        self._library.build_tables(self.buffer, self.resident_pages, table, pool_pages, self._packed_shape, self.rank)

    def section(self, name: str) -> torch.Tensor:
        """A view of one table, shaped."""
        shape = self.shape
        extents: dict[str, tuple[int, ...]] = {
            "header": (16,),
            "home": (shape.max_home_rows,),
            "home_partials": (shape.max_home_rows, 16),
            "attention": (shape.max_attention_rows,),
            "attention_plus_one": (shape.max_attention_rows + 1,),
            "kv": (shape.max_kv_rows,),
            "pages": (shape.max_pages,),
            "attention_pages": (shape.max_attention_rows, shape.max_pages_per_row),
        }
        extent = extents[SECTION_EXTENTS[name]]
        begin = self.layout[name]
        return self.buffer[begin : begin + int(np.prod(extent))].view(*extent)


def pack_message(
    message: StepMessage | StepArrays, shape: TableShape, rank: int, num_entries: int, max_return_rows: int, layout: dict[str, int]
) -> np.ndarray:
    """A message by itself: checks everything that the kernels rely on, then lays the words out."""
    arrays = message.arrays() if isinstance(message, StepMessage) else message
    return MessagePacker(shape, rank, num_entries, max_return_rows, layout).pack(arrays)
