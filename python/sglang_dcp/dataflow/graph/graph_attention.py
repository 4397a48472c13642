"""The per-layer path of decode steps that run as graphs: dispatch, partial attention, return and merge over static buffers. CUDA only.

Captured once per (home rows, guest rows); a step fills the tables, plans the attention kernel, and replays. attention_step.py is the
same path for steps of any shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sgl_kernel_dcp import PeerExchange, StepArrays, StepTables
from torch.nn.functional import pad

from sglang_dcp.dataflow.attention.flash_attention3 import FlashAttention3Decode
from sglang_dcp.dataflow.attention.flashinfer_graph import MLA_LATENT_DIM, FlashInferDecode, FlashInferMLA, KernelBuffers
from sglang_dcp.dataflow.attention.flashmla import FlashMLADecode
from sglang_dcp.dataflow.attention.paged_attention import AttentionShape
from sglang_dcp.dataflow.contracts import NO_SCALES, KVScales, PartialState
from sglang_dcp.dataflow.copy_guard import CopyGuard
from sglang_dcp.dataflow.device_plan import to_device
from sglang_dcp.dataflow.graph.graph_sizes import GraphKernel, GraphSizes, check_kernel, query_dtype
from sglang_dcp.dataflow.graph.silence import SilenceLog, SilenceNote
from sglang_dcp.dataflow.graph.static_tables import PageLines, RowsInput
from sglang_dcp.dataflow.graph.table_rows import ListedRow, PooledRow
from sglang_dcp.dataflow.graph.window_tables import WindowTables
from sglang_dcp.dataflow.merge import add_sinks
from sglang_dcp.dataflow.transport.base import TransportError

Kernel = FlashInferDecode | FlashInferMLA | FlashMLADecode | FlashAttention3Decode


class GraphAttention:
    """One instance's static buffers, its end of the exchange, and one attention kernel per captured (home rows, guest rows).

    Instances connect (`exchange.connect_processes`) before the first capture. `fill` (or `advance`) and `plan` run once per step ahead of
    the replay, on the stream of the replay; `begin` and, once per layer, `run` are captured. kernel: whose, by the backend's name;
    FlashMLA's is for MLA, FlashAttention 3 for GQA. own_split: long rows get parts of their own (GQA). windows: of the model's window
    layers, without double ones (FlashAttention 3 alone). rank: the place in the exchange group, whose first instance is `first_rank`.
    """

    def __init__(
        self,
        rank: int,
        sizes: GraphSizes,
        shape: AttentionShape,
        device: torch.device,
        *,
        num_sharing: int,
        wait_seconds: float,
        kernel: GraphKernel = "flashinfer",
        own_split: bool = True,
        first_rank: int = 0,
        windows: Sequence[int] = (),
    ) -> None:
        check_kernel(kernel, shape, sizes.page_size, windows)
        self.rank, self.sizes, self.shape, self.wait_seconds = rank, sizes, shape, wait_seconds
        self.kernel, self.own_split, self.first_rank = kernel, own_split, first_rank
        exchange_shape = sizes.exchange(shape, kernel)
        num_entries = 2 * sizes.max_rows
        self.tables = StepTables(sizes.tables(), rank, num_entries, device, exchange_shape.max_return_rows)
        self.exchange = PeerExchange(
            rank,
            exchange_shape,
            self.tables,
            num_sharing=num_sharing,
            wait_limit_seconds=wait_seconds,
            early_launch=not self.plans_on_device,  # neither FlashMLA's nor FlashAttention 3's kernels wait for the dispatch
        )
        self.lines = PageLines(num_entries, sizes.context_pages, sizes.page_size)
        self.merged = torch.zeros(sizes.max_home_rows, shape.num_heads, shape.v_head_dim, dtype=torch.bfloat16, device=device)
        self._merged_lse = torch.zeros(sizes.max_home_rows, shape.num_heads, dtype=torch.float32, device=device)
        of_rows = self.tables.section("block_table"), self.tables.section("kv_length")
        self.windows = {window: WindowTables(window, sizes.page_size, *of_rows) for window in windows}
        self._buffers = None if self.plans_on_device else KernelBuffers.allocate(sizes.max_rows, shape.num_heads, shape.v_head_dim, device)
        self._kernels: dict[tuple[int, int], Kernel] = {}
        self._window_kernels: dict[tuple[int, int], FlashAttention3Decode] = {}
        self._guard = CopyGuard(device)
        offset = self.exchange.layout["silent_mask"]
        self._silence = SilenceLog(self.exchange.state[offset : offset + 4].view(torch.int32))
        self._planned: tuple[int, int] | None = None
        self._begun: list[int] | None = None

    @property
    def plans_on_device(self) -> bool:
        """Whether the kernel needs nothing of the host in a step."""
        return self.kernel != "flashinfer"

    # ---- once per captured size

    def prepare(self, home_rows: int, guest_rows: int) -> None:
        """Ahead of a capture: builds the size's kernel and plans it for rows of one token each, and tables without rows."""
        rows = home_rows + guest_rows
        if (home_rows, guest_rows) not in self._kernels:
            self._kernels[home_rows, guest_rows] = self._build_kernel(rows)
            for window, table in self.windows.items():
                of_rows = table.slots[:rows], table.length[:rows]
                kernel = FlashAttention3Decode(self.shape.num_kv_heads, self.shape.scale, *of_rows, own_split=False)
                self._window_kernels[window, rows] = kernel
        no_rows = [np.zeros(0, dtype=np.int32)] * self.sizes.num_instances
        self.tables.upload(StepArrays(no_rows, np.zeros((0, 4), dtype=np.int32)))
        self.tables.build()
        self._plan(home_rows, guest_rows, np.ones(rows, dtype=np.int32))

    def _build_kernel(self, rows: int) -> Kernel:
        shape, section, page_size = self.shape, self.tables.section, self.sizes.page_size
        if self._buffers is None:
            of_rows = section("block_table")[:rows], section("kv_length")[:rows]
            if self.kernel == "fa3":
                split, kv_dtype = self.own_split, shape.kv_dtype
                return FlashAttention3Decode(shape.num_kv_heads, shape.scale, *of_rows, own_split=split, kv_dtype=kv_dtype)
            return FlashMLADecode(shape.num_heads, shape.scale, *of_rows, kv_dtype=shape.kv_dtype)
        indptr, indices, buffers = section("page_indptr")[: rows + 1], section("page_indices"), self._buffers.first(rows)
        if shape.latent:
            return FlashInferMLA(shape.num_heads, page_size, shape.scale, indptr, indices, section("kv_length")[:rows], buffers)
        last = section("last_page_length")[:rows]
        heads = shape.num_heads, shape.num_kv_heads, shape.qk_head_dim
        split, kv_dtype = self.own_split, shape.kv_dtype
        return FlashInferDecode(*heads, page_size, shape.scale, indptr, indices, last, buffers, own_split=split, kv_dtype=kv_dtype)

    # ---- once per step

    def fill(self, step: int, words: list[np.ndarray], rows: Sequence[ListedRow | PooledRow], token_table: torch.Tensor) -> None:
        """Tables of the step. token_table: SGLang's req_to_token, for rows whose pages only the device knows."""
        given = self.lines.fill(step, rows)
        self.tables.upload(StepArrays(words, given.rows))
        self._update_lines(given, token_table)
        for table in self.windows.values():
            table.fill(rows)
        self._begun = None

    def advance(self, step: int, token_table: torch.Tensor) -> None:
        """The same for the step that follows, with the same rows and routes."""
        self._begun = self.lines.advance(step)
        self.tables.upload_rows_at(self.lines.table_address)  # PageLines keeps every row within its line
        if self.lines.renewal is not None:
            self._update_lines(self.lines.renewal, token_table)
        for table in self.windows.values():
            table.advance()

    def plan(self, home_rows: int, guest_rows: int) -> None:
        """Schedules FlashInfer's kernel of the step, unless its last schedule serves. GQA's counts pages, MLA's tokens."""
        if self.plans_on_device:
            return
        kernel, begun = self._kernels[home_rows, guest_rows], self._begun
        if self._planned != (home_rows, guest_rows):
            begun = None
        if begun is not None and isinstance(kernel, FlashInferDecode) and kernel.serves_longer(begun):
            return
        tokens = np.zeros(home_rows + guest_rows, dtype=np.int32)
        tokens[: len(self.lines.table)] = self.lines.table[:, 1]
        self._plan(home_rows, guest_rows, tokens)

    def _update_lines(self, given: RowsInput, token_table: torch.Tensor) -> None:
        device, pages = self.tables.buffer.device, self.tables.resident_pages
        if given.writes.shape[1]:
            places, numbers = to_device(torch.from_numpy(given.writes), device)
            pages.view(-1).index_copy_(0, places, numbers.to(torch.int32))
        if given.copies.shape[1]:
            entries, lines = to_device(torch.from_numpy(given.copies), device)
            page_size = self.sizes.page_size
            tokens = token_table[:, : given.copy_pages * page_size : page_size].index_select(0, lines)
            numbers = tokens // page_size
            # As in the tables' kernel.
            numbers.masked_fill_(numbers >= self.sizes.pool_pages, 0)
            pages[:, : given.copy_pages].index_copy_(0, entries, numbers.to(torch.int32))

    def _plan(self, home_rows: int, guest_rows: int, tokens: np.ndarray) -> None:
        counts = (tokens + (self.sizes.page_size - 1)) // self.sizes.page_size
        kernel = self._kernels[home_rows, guest_rows]
        self._planned = home_rows, guest_rows
        if isinstance(kernel, FlashInferDecode) and kernel.serves(counts):
            return
        indptr = torch.from_numpy(np.concatenate([[0], counts.cumsum()]).astype(np.int32))
        with self._guard:
            if isinstance(kernel, FlashInferMLA):
                kernel.plan(indptr, torch.from_numpy(tokens.copy()))
            elif isinstance(kernel, FlashInferDecode):
                last = np.where(tokens > 0, tokens - (counts - 1) * self.sizes.page_size, 0)
                kernel.plan(indptr, torch.from_numpy(last.astype(np.int32)))

    def note_silence(self, step: int) -> SilenceNote:
        """Behind the step's last layer, on the stream of the replay: what `raise_if_silent` is to look at before the result is used."""
        return self._silence.note(step)

    def raise_if_silent(self, note: SilenceNote) -> None:
        """TransportError where a peer did not answer in the noted step: its rows are wrong. The stream has come to the note's copy."""
        peers = [self.first_rank + place for place in note.silent()]
        if peers:
            raise TransportError(
                f"rank {self.first_rank + self.rank}, step {note.step}, peer memory: instances {peers} did not answer within "
                f"{self.wait_seconds:g} s "
                f"(exchanges {self.exchange.silent_peers()})"
            )

    # ---- captured

    def begin(self, home_rows: int, guest_rows: int, token_table: torch.Tensor) -> None:
        """Ahead of the layers: tables from what `fill` or `advance` sent. token_table: the one that `fill` is given, always the same
        tensor."""
        self.tables.build(token_table, self.sizes.pool_pages)
        for table in self.windows.values():
            table.build(home_rows + guest_rows)
        kernel = self._kernels[home_rows, guest_rows]
        if isinstance(kernel, FlashMLADecode | FlashAttention3Decode):
            kernel.plan()
        else:
            kernel.mark_empty_rows(self.tables.section("kv_length")[: home_rows + guest_rows])

    def run(
        self,
        home_rows: int,
        guest_rows: int,
        queries: tuple[torch.Tensor, torch.Tensor | None],
        keys: torch.Tensor,
        values: torch.Tensor,
        pools: tuple[torch.Tensor, torch.Tensor],
        kv_scales: KVScales = NO_SCALES,
        *,
        window: int | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attention [home_rows, heads, v_head_dim] of the own rows; valid until the next call.

        queries: [home_rows, heads, dim], or its two parts. FlashAttention 3 takes a layer with fewer heads than the shape has, too.
        keys, values [home_rows, 1, elements]: the new tokens' K/V (MLA: latent and rotary part), written here already where they
        stay. pools: key and value pool of the layer, [slots, kv_heads, dim] (MLA: the joined pool, twice). K/V and pools are of the shape's
        kv_dtype, kv_scales of the layer. window: of the layer, one of `windows`. sinks [heads]: logits of its attention sinks.
        """
        heads = queries[0].shape[1]
        targets = self._targets(*pools)
        key_words, value_words = (part.view(self.shape.dtype) for part in (keys, values))
        asked_as = query_dtype(self.shape, self.kernel)
        asked, rotary = (None if part is None else self._widened(part.to(asked_as)).view(self.shape.dtype) for part in queries)
        received = self.exchange.dispatch(
            asked, query_rope=rotary, key=key_words, value=value_words, key_pool=targets[0], value_pool=targets[1]
        )[: home_rows + guest_rows].view(asked_as)
        state = self._attend(home_rows, guest_rows, received[:, :heads], pools, kv_scales, window)
        merged, merged_lse = self.merged[:home_rows], None if sinks is None else self._merged_lse[:home_rows]
        self.exchange.return_merge(self._widened(state.output), self._widened(state.lse, float("-inf")), merged, merged_lse)
        merged = merged[:, :heads]
        if merged_lse is not None and sinks is not None:
            add_sinks(PartialState(merged, merged_lse[:, :heads]), sinks)
        return merged

    def _attend(
        self,
        home_rows: int,
        guest_rows: int,
        received: torch.Tensor,
        pools: tuple[torch.Tensor, torch.Tensor],
        kv_scales: KVScales,
        window: int | None,
    ) -> PartialState:
        """Partials of all attention rows."""
        key_pool, value_pool = pools
        if window is not None:
            kernel = self._window_kernels[window, home_rows + guest_rows]
            return kernel.run(received, key_pool.unsqueeze(1), value_pool.unsqueeze(1), kv_scales)
        in_pages = -1, self.sizes.page_size
        of_all = self._kernels[home_rows, guest_rows]
        if isinstance(of_all, FlashMLADecode):
            return of_all.run(received, key_pool.squeeze(1).unflatten(0, in_pages), mark_neutral=False)
        if isinstance(of_all, FlashInferMLA):
            return of_all.run(received, key_pool.squeeze(1).unflatten(0, in_pages))
        return of_all.run(received, key_pool.unflatten(0, in_pages), value_pool.unflatten(0, in_pages), kv_scales)

    def _widened(self, part: torch.Tensor, value: float = 0.0) -> torch.Tensor:
        """[rows, heads, ...] with as many heads as the exchange carries: a model's layers may differ in them."""
        missing = self.shape.num_heads - part.shape[1]
        return pad(part, (0, 0) * (part.dim() - 2) + (0, missing), value=value) if missing else part

    def _targets(self, key_pool: torch.Tensor, value_pool: torch.Tensor) -> tuple[Any, Any]:
        """Where arriving K/V rows go: [slots, elements of the queries' type] views of the pools."""
        if self.shape.latent:
            joined = key_pool.flatten(1).view(self.shape.dtype)
            latent = MLA_LATENT_DIM * self.shape.kv_dtype.itemsize // self.shape.dtype.itemsize
            return joined[:, :latent], joined[:, latent:]
        return key_pool.flatten(1).view(self.shape.dtype), value_pool.flatten(1).view(self.shape.dtype)
