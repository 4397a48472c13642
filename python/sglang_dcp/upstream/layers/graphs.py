"""Decode graphs of steps with sharded rows: SGLang captures one per batch size and number of guest rows, we fill their tables.

All instances choose the same one, from facts that all of them know after a step's all-gather; a step that fits none, or extends anywhere,
runs eagerly everywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from sglang_dcp.config import DynCpConfig
from sglang_dcp.dataflow.attention.paged_attention import AttentionShape
from sglang_dcp.dataflow.graph.route_words import guests_per_instance
from sglang_dcp.dataflow.step_mode import STOCK, Graph, GraphStep, StepMode, Stock
from sglang_dcp.dataflow.step_rows import StepRows
from sglang_dcp.ledger.slices import Slices
from sglang_dcp.policy.split_limits import Layout
from sglang_dcp.upstream.attach.models import attention_layers, attention_modules, window_of
from sglang_dcp.upstream.layers.layer_roll import LayerRoll
from sglang_dcp.upstream.layers.peers import Place, num_sharing, tell_everybody

if TYPE_CHECKING:
    from sglang_dcp.dataflow.graph.graph_sizes import GraphKernel

logger = logging.getLogger(__name__)

WAIT_SECONDS = 10.0
WAIT_SECONDS_SHARED = 60.0
"""Longest wait for a peer inside a layer; longer where instances share a GPU, which runs their processes in turns."""


class GraphError(RuntimeError):
    """Decode graphs of sharded steps cannot be had as asked, or a step did not run as all instances had agreed."""


def guest_row_grid(max_rows: int) -> tuple[int, ...]:
    """Captured numbers of guest rows for --dyncp-max-rows: a quarter of it, and all of it."""
    return tuple(sorted({max(1, max_rows // 4), max_rows}))


def splits_long_rows() -> bool:
    """Whether decode graphs split by our budget (--dyncp-split-budget) instead of FlashInfer's."""
    config = DynCpConfig.from_environment()
    return config is not None and config.split_budget == "auto"


class GraphEngine:
    """This instance's graphs with sharded rows. Built in two goes, as SGLang's runner comes to it: the grid, then the buffers.

    Memory is shared inside an exchange group, by slices of the same number; which graph a step replays is chosen over all instances.
    places: of all processes, by rank; process: this one's rank; group: of them all. rank: of the instance.
    """

    def __init__(
        self, guest_rows: tuple[int, ...], places: Sequence[Place], process: int, layout: Layout, group: Any, slices: int = 1
    ) -> None:
        self.guest_rows, self.places, self._process, self._group = guest_rows, places, process, group
        split = Slices(layout, slices)
        self.rank, own_slice = split.place(process)
        self.groups, self.members = layout.groups, layout.group(self.rank)
        self._peers = split.ranks(self.members, own_slice)
        self.attention: Any = None
        self.max_home_rows = 0
        self.layer_roll = LayerRoll({})
        self._own_slots = torch.zeros(0)

    def build(self, runner: Any, max_batch: int, *, kernel: GraphKernel = "flashinfer") -> None:
        """Buffers for batches of up to max_batch, connected to all peers of the exchange group. Every instance calls it."""
        from sglang_dcp.dataflow.graph.graph_attention import GraphAttention, GraphSizes

        free_before = torch.cuda.mem_get_info()[0]
        page_size = runner.page_size
        sharing = num_sharing(self.places, self._process)
        device = torch.device("cuda", torch.cuda.current_device())
        sizes = GraphSizes(
            num_instances=len(self.members),
            max_home_rows=max_batch,
            guest_rows=self.guest_rows,
            page_size=page_size,
            context_pages=-(-runner.model_config.context_len // page_size),
            pool_pages=1 + runner.token_to_kv_pool.size // page_size,
        )
        wait = WAIT_SECONDS if sharing == 1 else WAIT_SECONDS_SHARED
        self.attention = GraphAttention(
            self.members.index(self.rank),
            sizes,
            attention_shape(runner),
            device,
            num_sharing=sharing,
            wait_seconds=wait,
            kernel=kernel,
            own_split=splits_long_rows(),
            first_rank=self.members.start,
            windows=sorted({window for _, layer in attention_modules(runner.model) if (window := window_of(layer)) is not None}),
        )
        self.connect()
        self.layer_roll = LayerRoll(attention_layers(runner.model))
        self.max_home_rows = max_batch
        self._own_slots = torch.zeros(max_batch, dtype=torch.int64, device=device)
        logger.info(
            "dyncp: decode graphs (%s) for up to %d home rows with 0, %s guest rows; buffers of %.2f GiB, peer memory with instances "
            "%d-%d, %d instances on this GPU",
            kernel,
            max_batch,
            ", ".join(map(str, self.guest_rows)),
            (free_before - torch.cuda.mem_get_info()[0]) / 2**30,
            self.members.start,
            self.members.stop - 1,
            sharing,
        )

    def connect(self) -> None:
        """Opens the memory of this slice of the exchange group's instances, and of no other. Every process calls it."""
        handles = tell_everybody(self.attention.exchange.ipc_handle(), self._group)
        self.attention.exchange.connect_processes([handles[rank] for rank in self._peers])

    # ---- a step

    def choose(self, row_routes: Sequence[Sequence[int]], batch_sizes: Sequence[int]) -> int:
        """Guest rows of the graph for a decode step, or 0 when it fits none. Every instance gives the same answer."""
        if max(batch_sizes) > self.max_home_rows:
            return 0
        needed = max(guests_per_instance(row_routes, self.groups))
        return next((rows for rows in self.guest_rows if rows >= needed), 0)

    def choose_step(self, last: StepMode, rows: StepRows, batch_sizes: Sequence[int], *, steady: bool) -> Graph | Stock | None:
        """What the decode step runs as, None when it fits no graph. Every instance says alike, but that those of a group without sharded
        rows replay SGLang's own graph: where layers gather tokens it has the same batch, and so the same collectives. last: what the step
        before ran as; batch_sizes: of all instances.

        Most steps are the last one's, one token on. steady: no home told others of its rows, and here nobody joined or left. Rows that
        others attend alone may. Where they may here as well, the graph stays: guests follow from what homes told.
        """
        before = last if isinstance(last, Graph) and last.step.step + 1 == rows.participant.step else None
        if before is not None and rows.participant.rows_steady and max(batch_sizes) <= self.max_home_rows:
            if not steady:
                return Graph(before.guest_rows, GraphStep.of(rows))
            before.advance()
            return before
        guest_rows = self.choose(rows.routes_of_homes, batch_sizes)
        if guest_rows and self.rank not in rows.participant.busy_ranks:
            return STOCK
        return Graph(guest_rows, GraphStep.of(rows)) if guest_rows else None

    def load(self, mode: Graph, home_rows: int, token_table: torch.Tensor) -> None:
        """Fills the step's tables and plans its kernel, for the graph of `home_rows`. On the stream of the replay."""
        step = mode.step
        if step.is_advance:
            self.attention.advance(step.step, token_table)
        else:
            self.attention.fill(step.step, step.words, step.rows, token_table)
        self.attention.plan(home_rows, mode.guest_rows)

    # ---- while capturing

    def begin_captured(self, forward_batch: Any, guest_rows: int, token_table: torch.Tensor, pool_slots: int) -> None:
        """Recorded once per graph: the step's tables, and where each new token's K/V goes here; slot 0 (padding) for those that travel."""
        self.end_captured()
        self.layer_roll.open()
        self.attention.begin(forward_batch.batch_size, guest_rows, token_table)
        slots = forward_batch.out_cache_loc
        here = torch.where(slots < pool_slots, slots, torch.zeros_like(slots))
        self._own_slots[: len(slots)].copy_(here)

    def end_captured(self) -> None:
        """All layers of the graph before this one were recorded in our form: LayerMissedError otherwise. Also behind the last graph."""
        if self.layer_roll.is_open:
            self.layer_roll.close(f"rank {self.rank}, decode graph with sharded rows")

    def own_slots(self, num_tokens: int) -> torch.Tensor:
        return self._own_slots[:num_tokens]


def attention_shapes(runner: Any) -> dict[int | None, set[AttentionShape]]:
    """What the attention layers of steps with sharded rows compute over the pool, by window (None: all keys). MLA is absorbed in them."""
    shapes: dict[int | None, set[AttentionShape]] = {}
    quantised = None if runner.kv_cache_dtype == runner.dtype else runner.kv_cache_dtype
    for _, layer in attention_modules(runner.model):
        latent = layer.tp_k_head_num == 1 and layer.qk_head_dim != layer.v_head_dim
        if latent or not runner.use_mla_backend:
            heads = layer.tp_q_head_num, layer.tp_k_head_num, layer.qk_head_dim, layer.v_head_dim
            kinds = {"dtype": runner.dtype, "scale": layer.scaling, "latent": latent, "quantised": quantised}
            shapes.setdefault(window_of(layer), set()).add(AttentionShape(*heads, **kinds))
    return shapes


def attention_shape(runner: Any) -> AttentionShape:
    """What the attention layers of a decode step compute: a step's tables and exchange are made once for all. Layers may differ in their
    heads, the shape has the most; GraphError where they differ in anything else."""
    shapes = {shape for alike in attention_shapes(runner).values() for shape in alike}
    most_heads = max(shape.num_heads for shape in shapes)
    widened = {replace(shape, num_heads=most_heads, dtype=torch.bfloat16) for shape in shapes}
    if len(widened) != 1:
        raise GraphError(f"--dyncp-transport peer: attention layers of {len(shapes)} shapes, decode graphs need one (use nccl): {shapes}")
    return widened.pop()
