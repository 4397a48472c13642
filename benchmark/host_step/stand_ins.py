"""What stands where SGLang's objects and the GPU stand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from sgl_kernel_dcp import StepTables, TableShape

from sglang_dcp.dataflow.attention.flashinfer_graph import FlashInferDecode
from sglang_dcp.dataflow.copy_guard import CopyGuard
from sglang_dcp.dataflow.graph.chunk_schedule import CHUNK_TOKENS_FIELD, OUTPUT_INDPTR_FIELD, ChunkSchedule
from sglang_dcp.dataflow.graph.graph_attention import GraphAttention, GraphSizes
from sglang_dcp.dataflow.graph.static_tables import PageLines, RowsInput
from sglang_dcp.upstream.pool.kv_pool import LedgerAllocator

GUEST_ROWS = 64


class Kv:
    """Of a request: its line of the token table and its tokens."""

    __slots__ = ("cache_protected_len", "kv_allocated_len", "req_pool_idx")

    def __init__(self, line: int, length: int) -> None:
        self.req_pool_idx, self.kv_allocated_len, self.cache_protected_len = line, length, 0

    @property
    def holds_kv(self) -> bool:
        return self.kv_allocated_len > 0


class ModelRequest:
    """A request in a decode batch."""

    def __init__(self, line: int, length: int) -> None:
        self.rid, self.kv, self.dyncp, self.output_ids = object(), Kv(line, length), None, []

    def finished(self) -> bool:
        return False

    def next_output_finishes_by_length(self) -> bool:
        return False


class _Decode:
    def is_idle(self) -> bool:
        return False

    def is_decode(self) -> bool:
        return True

    def is_extend(self) -> bool:
        return False


class Batch:
    """SGLang's decode batch: a list of requests that is replaced where somebody joins or leaves, and lengths on the host."""

    forward_mode = _Decode()

    def __init__(self, reqs: list[ModelRequest]) -> None:
        self.reqs, self.batch_is_full = reqs, False
        self.seq_lens_cpu = torch.tensor([req.kv.kv_allocated_len for req in reqs], dtype=torch.int64)

    def is_empty(self) -> bool:
        return not self.reqs

    def append(self, req: ModelRequest) -> None:
        self.__init__([*self.reqs, req])  # type: ignore[misc]

    def remove(self, place: int) -> ModelRequest:
        req = self.reqs[place]
        self.__init__([other for other in self.reqs if other is not req])  # type: ignore[misc]
        return req


def make_pool(num_pages: int, page_size: int) -> LedgerAllocator:
    return LedgerAllocator(num_pages * page_size, page_size, torch.bfloat16, "cpu", None, False)


class _Wrapper:
    """FlashInfer's, as far as a schedule is read from it: rows are cut into chunks of an even share."""

    def __init__(self, rows: int, page_size: int) -> None:
        self._page_size = page_size
        self._plan_info = [0] * 15
        self._plan_info[OUTPUT_INDPTR_FIELD], self._plan_info[CHUNK_TOKENS_FIELD] = 64, 0
        self._pin_memory_int_workspace_buffer = torch.zeros(64 + 4 * (rows + 1), dtype=torch.uint8)

    def plan_again(self, page_indptr: torch.Tensor, lengths: torch.Tensor) -> bool:
        self.plan(page_indptr)
        return True

    def plan(self, page_indptr: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """What other checkouts call."""
        counts = np.diff(page_indptr.numpy())
        chunk = max(2, -(-int(counts.sum()) // 66))
        words = self._pin_memory_int_workspace_buffer.numpy().view(np.int32)
        words[0] = chunk * self._page_size
        words[16:] = np.concatenate([[0], (-(-np.maximum(counts, 1) // chunk)).cumsum()])


class HostAttention(GraphAttention):
    """The host's half of a step's tables. What would be sent to the GPU goes nowhere."""

    def __init__(self, rank: int, num_instances: int, max_rows: int, page_size: int, num_pages: int) -> None:
        self.rank, self.kernel = rank, "flashinfer"
        self.sizes = GraphSizes(num_instances, max_rows, (GUEST_ROWS,), page_size, num_pages, num_pages + 1)
        self.tables = host_tables(self.sizes.tables(), rank, 2 * self.sizes.max_rows)
        self.lines = PageLines(2 * self.sizes.max_rows, self.sizes.context_pages, page_size)
        self.windows = {}
        self._guard = CopyGuard(torch.device("cpu"))
        self._planned = self._begun = None
        self._kernels = _Kernels(page_size)

    def _update_lines(self, given: RowsInput, token_table: torch.Tensor) -> None:
        """Launches, on a GPU."""

    def note_silence(self, step: int) -> None:
        return None


class _Kernels(dict[tuple[int, int], FlashInferDecode]):
    """A kernel for every number of rows, made where it is asked for."""

    def __init__(self, page_size: int) -> None:
        super().__init__()
        self._page_size = page_size

    def __missing__(self, key: tuple[int, int]) -> FlashInferDecode:
        kernel = self[key] = FlashInferDecode.__new__(FlashInferDecode)
        kernel.num_heads, kernel.num_kv_heads, kernel.head_dim, kernel.page_size = 32, 4, 128, self._page_size
        kernel.scale, kernel.kv_dtype = 1.0, torch.bfloat16
        kernel._page_indices = torch.zeros(1 << 16, dtype=torch.int32)
        kernel._wrapper, kernel._schedule = _Wrapper(sum(key), self._page_size), ChunkSchedule(self._page_size)
        return kernel


def host_tables(shape: TableShape, rank: int, num_entries: int) -> StepTables:
    """StepTables whose launches do nothing."""
    tables = StepTables.__new__(StepTables)
    tables.shape, tables.rank, tables.num_entries, tables.max_return_rows = shape, rank, num_entries, 16 * shape.max_home_rows
    rows = 32 + shape.num_instances * shape.max_home_rows
    tables.layout = {"input_routes": 32, "input_rows": rows, "total_size": rows + 4 * shape.max_attention_rows}
    tables.buffer = torch.zeros(tables.layout["total_size"], dtype=torch.int32)
    tables.resident_pages = torch.zeros(num_entries, shape.max_pages_per_row, dtype=torch.int32)
    tables._sent, tables._address, tables._expects = np.zeros(0, dtype=np.int32), 0, np.zeros(0, dtype=bool)
    tables._library = SimpleNamespace(send_words=lambda buffer, address, begin, count: None)
    return tables
