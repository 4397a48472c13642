"""The step's tables: the host writes one small message, one kernel turns it into everything the layers read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sgl_kernel_dcp.build import load_library
from sgl_kernel_dcp.shapes import TableShape

if TYPE_CHECKING:
    import torch

ROUTE_TAIL_SHIFT = 16
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
    """One attention row of this instance, in the order (home, position in that home's list for this instance)."""

    entry: int  # line of the resident page table
    tokens: int  # tokens that this shard holds after the step's new one; 0 for an empty shard
    new_page: int = -1  # page appended by this step
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

    def route_words(self) -> list[np.ndarray]:
        """int32 words per home: a bit per shard, the travelling tail + 1 above."""
        words = []
        for shards_of_rows, tails in zip(self.routes, self.tails, strict=True):
            masks = [sum(1 << shard for shard in shards) for shards in shards_of_rows]
            words.append(np.array([m | (t + 1) << ROUTE_TAIL_SHIFT for m, t in zip(masks, tails, strict=True)], dtype=np.int32))
        return words


def count_routes(words: list[np.ndarray], num_instances: int) -> np.ndarray:
    """counts[h, s]: rows of home h that have a shard on s."""
    bits = np.arange(num_instances)
    return np.stack([(word[:, None] >> bits & 1).sum(axis=0) if len(word) else np.zeros(num_instances, dtype=np.int64) for word in words])


class StepTables:
    """Static device buffers of one instance.

    `upload` checks a message and copies it (pinned, asynchronous); `build` launches the one kernel and may be captured.
    `resident_pages[entry]` lists a request's pages on this shard; its owner fills a line when the request arrives, later pages come
    with `RowLine.new_page`. An upload may follow the previous one only when that copy has ended, which `upload` waits for.
    """

    def __init__(self, shape: TableShape, rank: int, num_entries: int, device: torch.device | str, max_return_rows: int) -> None:
        import torch

        self.shape, self.rank, self.num_entries, self.max_return_rows = shape, rank, num_entries, max_return_rows
        self._library = load_library()
        self.layout: dict[str, int] = {str(k): int(v) for k, v in self._library.table_layout(shape.numbers()).items()}
        self.buffer = torch.zeros(self.layout["total_size"], dtype=torch.int32, device=device)
        self.resident_pages = torch.zeros(num_entries, shape.max_pages_per_row, dtype=torch.int32, device=device)
        self._host = torch.zeros(self.layout["input_size"], dtype=torch.int32, pin_memory=True)
        self._copied = torch.cuda.Event()

    def upload(self, message: StepMessage) -> None:
        """Checks the message against the capacities and starts its copy on the current stream."""
        host = self._host.numpy()
        packed = self.pack(message)
        self._copied.synchronize()
        host[: len(packed)] = packed
        self.buffer[: len(packed)].copy_(self._host[: len(packed)], non_blocking=True)
        self._copied.record()

    def pack(self, message: StepMessage) -> np.ndarray:
        """The message as int32 words; raises ValueError naming the value and its limit."""
        return pack_message(message, self.shape, self.rank, self.num_entries, self.max_return_rows, self.layout)

    def build(self) -> None:
        """One kernel on the current stream; reads the uploaded message, writes every table."""
        self._library.build_tables(self.buffer, self.resident_pages, self.shape.numbers(), self.rank)

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


def _check(name: str, value: int, limit: int) -> None:
    if value > limit:
        raise ValueError(f"{name} is {value}, the limit of these buffers is {limit}")


def pack_message(
    message: StepMessage, shape: TableShape, rank: int, num_entries: int, max_return_rows: int, layout: dict[str, int]
) -> np.ndarray:
    """Pure part of `StepTables.pack`: checks everything that the kernels rely on, then lays the words out."""
    if len(message.routes) != shape.num_instances:
        raise ValueError(f"routes name {len(message.routes)} homes, the group has {shape.num_instances}")
    words = message.route_words()
    for home, word in enumerate(words):
        _check(f"home rows of instance {home} (max_home_rows)", len(word), shape.max_home_rows)
        if len(word) and int((word & 0xFFFF).max()) >> shape.num_instances:
            raise ValueError(f"home {home} routes to an instance beyond {shape.num_instances - 1}")
        for row, (shards, tail) in enumerate(zip(message.routes[home], message.tails[home], strict=True)):
            if tail >= 0 and (tail not in shards or tail == home):
                raise ValueError(f"home {home} row {row}: K/V travels to {tail}, which must be one of its remote shards {shards}")
    counts = count_routes(words, shape.num_instances)
    num_rows = int(counts[:, rank].sum())
    if num_rows != len(message.rows):
        raise ValueError(f"routes give instance {rank} {num_rows} attention rows, the message lists {len(message.rows)}")
    _check("attention rows (max_attention_rows)", num_rows, shape.max_attention_rows)
    _check("partials that return (max_return_rows)", int(counts[rank].sum() - counts[rank, rank]), max_return_rows)
    _check_rows(message, shape, rank, num_entries, counts)
    packed = np.zeros(layout["input_rows"] + 4 * num_rows, dtype=np.int32)
    packed[: shape.num_instances] = [len(word) for word in words]
    packed[16] = num_rows
    routes = packed[layout["input_routes"] : layout["input_rows"]][: shape.num_instances * shape.max_home_rows]
    routes = routes.reshape(shape.num_instances, shape.max_home_rows)
    for home, word in enumerate(words):
        routes[home, : len(word)] = word
    packed[layout["input_rows"] :] = np.array(message.rows, dtype=np.int32).reshape(-1)
    return packed


def _check_rows(message: StepMessage, shape: TableShape, rank: int, num_entries: int, counts: np.ndarray) -> None:
    pages = [-(-line.tokens // shape.page_size) for line in message.rows]
    _check("pages of all rows (max_pages)", sum(pages), shape.max_pages)
    _check("pages of one row (max_pages_per_row)", max(pages, default=0), shape.max_pages_per_row)
    expects = [
        tail == rank
        for home, (routes, tails) in enumerate(zip(message.routes, message.tails, strict=True))
        for shards, tail in zip(routes, tails, strict=True)
        if rank in shards
    ]
    _check("arriving K/V rows (max_kv_rows)", sum(expects), shape.max_kv_rows)
    for index, (line, expected) in enumerate(zip(message.rows, expects, strict=True)):
        if (line.kv_slot >= 0) != expected:
            raise ValueError(f"attention row {index}: kv_slot {line.kv_slot}, but K/V {'arrives' if expected else 'does not arrive'}")
        if line.tokens < 0 or (line.tokens > 0 and not 0 <= line.entry < num_entries):
            raise ValueError(f"attention row {index}: entry {line.entry} with {line.tokens} tokens, entries are 0 to {num_entries - 1}")
