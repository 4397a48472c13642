"""Decode graphs of steps with sharded rows: SGLang captures one per batch size and number of guest rows, we fill their tables.

SGLang's own graph is the variant without guest rows ("g0"). All instances choose the same variant, from facts that all of them know
after a step's all-gather; a step that fits none, or extends anywhere, runs eagerly everywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import torch

from sglang_dcp.config import DynCpConfig
from sglang_dcp.dataflow.attention.paged_attention import AttentionShape
from sglang_dcp.dataflow.graph.static_tables import ListedRow, PooledRow, guests_per_instance, route_word32, route_words
from sglang_dcp.ledger.routes import shard_mask, travelling_tail
from sglang_dcp.upstream.attach.models import attention_layers
from sglang_dcp.upstream.layers.layer_roll import LayerRoll
from sglang_dcp.upstream.layers.peers import Place, find_obstacle, num_sharing, own_place, tell_everybody
from sglang_dcp.upstream.step.binding import Binding, current

logger = logging.getLogger(__name__)

WAIT_SECONDS = 10.0
WAIT_SECONDS_SHARED = 60.0
"""Longest wait for a peer inside a layer; longer where instances share a GPU, which runs their processes in turns."""
STOCK_LABEL = "g0"


class GraphError(RuntimeError):
    """Decode graphs of sharded steps cannot be had as asked, or a step did not run as all instances had agreed."""


def guest_row_grid(max_rows: int) -> tuple[int, ...]:
    """Captured numbers of guest rows for --dyncp-max-rows: a quarter of it, and all of it."""
    return tuple(sorted({max(1, max_rows // 4), max_rows}))


@dataclass(frozen=True)
class SizeVariants:
    """What SGLang's graph runner asks (layers/attention/graph_variants.AttentionGraphVariants)."""

    capture_labels: tuple[str, ...]

    def select(self, forward_batch: Any) -> str:
        binding = current()
        return STOCK_LABEL if binding is None else label_of(binding.graph_guest_rows)


def label_of(guest_rows: int) -> str:
    return f"g{guest_rows}"


def captured_guest_rows() -> int:
    """Guest rows of the graph that is being captured; 0 outside a capture and for SGLang's own."""
    from sglang.srt.model_executor.runner_utils.capture_mode import get_capture_attention_variant

    label = get_capture_attention_variant()
    return int(label[1:]) if label else 0


def splits_long_rows() -> bool:
    """Whether decode graphs split by our budget (--dyncp-split-budget) instead of FlashInfer's."""
    config = DynCpConfig.from_environment()
    return config is not None and config.split_budget == "auto"


class GraphEngine:
    """This instance's graphs with sharded rows. Built in two goes, as SGLang's runner comes to it: the grid, then the buffers."""

    def __init__(self, guest_rows: tuple[int, ...], places: Sequence[Place], rank: int, group: Any) -> None:
        self.guest_rows, self.places, self.rank, self._group = guest_rows, places, rank, group
        self.attention: Any = None
        self.max_home_rows = 0
        self.layer_roll = LayerRoll({})
        self._own_slots = torch.zeros(0)

    @property
    def variants(self) -> SizeVariants:
        return SizeVariants((STOCK_LABEL, *(label_of(rows) for rows in self.guest_rows)))

    def build(self, runner: Any, max_batch: int, *, flash_mla: bool = False) -> None:
        """Buffers for batches of up to max_batch, connected to all peers. Every instance calls it."""
        from sglang_dcp.dataflow.graph.graph_attention import GraphAttention, GraphSizes

        free_before = torch.cuda.mem_get_info()[0]
        page_size = runner.page_size
        sharing = num_sharing(self.places, self.rank)
        device = torch.device("cuda", torch.cuda.current_device())
        sizes = GraphSizes(
            num_instances=len(self.places),
            max_home_rows=max_batch,
            guest_rows=self.guest_rows,
            page_size=page_size,
            context_pages=-(-runner.model_config.context_len // page_size),
            pool_pages=1 + runner.token_to_kv_pool.size // page_size,
        )
        wait = WAIT_SECONDS if sharing == 1 else WAIT_SECONDS_SHARED
        self.attention = GraphAttention(
            self.rank,
            sizes,
            attention_shape(runner),
            device,
            num_sharing=sharing,
            wait_seconds=wait,
            flash_mla=flash_mla,
            own_split=splits_long_rows(),
        )
        self.attention.exchange.connect_processes(tell_everybody(self.attention.exchange.ipc_handle(), self._group))
        self.layer_roll = LayerRoll(attention_layers(runner.model))
        self.max_home_rows = max_batch
        self._own_slots = torch.zeros(max_batch, dtype=torch.int64, device=device)
        logger.info(
            "dyncp: decode graphs (%s) for up to %d home rows with 0, %s guest rows; buffers of %.2f GiB, peer memory, "
            "%d instances on this GPU",
            "FlashMLA" if flash_mla else "FlashInfer",
            max_batch,
            ", ".join(map(str, self.guest_rows)),
            (free_before - torch.cuda.mem_get_info()[0]) / 2**30,
            sharing,
        )

    # ---- a step

    def choose(self, row_routes: Sequence[Sequence[int]], batch_sizes: Sequence[int]) -> int:
        """Guest rows of the graph for a decode step, or 0 when it fits none. Every instance gives the same answer."""
        if max(batch_sizes) > self.max_home_rows:
            return 0
        needed = max(guests_per_instance(row_routes, len(self.places)))
        return next((rows for rows in self.guest_rows if rows >= needed), 0)

    def plan_step(self, binding: Binding, batch_sizes: list[int]) -> None:
        """Decides what the binding's decode step runs as, and collects its rows where it is a graph. batch_sizes: of all instances.

        Most steps are the last one's, one token on: no home told others of its rows, and here nobody joined or left. Rows that others
        attend alone may.
        """
        last, instance = binding.graph_step, binding.instance
        steady = instance.rows_steady and binding.own_batch.steady
        goes_on = last is not None and instance.step == last.step + 1
        if goes_on and steady and not last.has_new_pooled and max(batch_sizes) <= self.max_home_rows:
            last.step, last.is_advance = instance.step, True
            return
        binding.graph_step = None
        binding.graph_guest_rows = self.choose([[row.route for row in rows] for rows in instance.rows_of], batch_sizes)
        if binding.graph_guest_rows:
            binding.graph_step = collect_step(binding, last.pooled if goes_on else frozenset())

    def load(self, binding: Binding, home_rows: int) -> None:
        """Fills the step's tables and plans its kernel, for the graph of `home_rows`. On the stream of the replay."""
        step: GraphStep | None = binding.graph_step
        assert step is not None
        began = perf_counter()
        if step.is_advance:
            self.attention.advance(step.step)
        else:
            self.attention.fill(step.step, step.words, step.rows, binding.scheduler.req_to_token_pool.req_to_token)
        self.attention.plan(home_rows, binding.graph_guest_rows)
        binding.host_clock.spent("tables" if step.is_advance else "new_tables", perf_counter() - began)

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


@dataclass
class GraphStep:
    """A decode step as the tables want it: route words of every home, and this instance's attention rows.

    is_advance: the rows are those of the step before, one token on. pooled: keys of the pooled rows; has_new_pooled: some were not in the
    step before, so that their pages may still change (PageLines).
    """

    step: int
    words: list[np.ndarray]
    rows: list[ListedRow | PooledRow]
    pooled: frozenset[Hashable]
    has_new_pooled: bool
    is_advance: bool = False


def collect_step(binding: Binding, pooled_before: frozenset[Hashable]) -> GraphStep:
    """The step that all instances agreed on. pooled_before: keys of the pooled rows of the step just before, if that was a graph's."""
    instance, rank = binding.instance, binding.instance.rank
    spans, routes = binding.own_batch.spans, binding.own_batch.routes
    own = np.full(len(spans), 1 << rank, dtype=np.int32)
    words: list[np.ndarray] = []
    rows: list[ListedRow | PooledRow] = []
    pooled: list[Hashable] = []
    for home, told in enumerate(instance.rows_of):
        if home == rank:
            words.append(own)
            continue
        words.append(route_words(row.route for row in told))
        for guest in told:
            if shard_mask(guest.route) >> rank & 1:
                held, arrives = instance.guests.pages_of(home, guest.handle), travelling_tail(guest.route) == rank
                rows.append(ListedRow((home, guest.handle), guest.prefix_len + 1, held, grows=arrives, arrives=arrives))
    for index, (req, prefix_len, _) in enumerate(spans):
        route = routes.get(index)
        if route is None:
            rows.append(PooledRow(req.rid, req.kv.req_pool_idx, prefix_len + 1))
            pooled.append(req.rid)
            continue
        own[index] = route_word32(route)
        if shard_mask(route) >> rank & 1:
            request, grows = req.dyncp, travelling_tail(route) < 0
            rows.append(ListedRow((rank, request.handle), prefix_len + 1, request.own_pages, grows, arrives=False))
    keys = frozenset(pooled)
    return GraphStep(instance.step, words, rows, keys, has_new_pooled=not keys <= pooled_before)


def attention_shape(runner: Any) -> AttentionShape:
    """What the attention layers of a decode step compute. GraphError when they differ: a step's kernel is planned once for all."""
    shapes = set()
    for module in runner.model.modules():
        if type(module).__name__ != "RadixAttention":
            continue
        latent = module.tp_k_head_num == 1 and module.qk_head_dim != module.v_head_dim
        if latent or not runner.use_mla_backend:
            heads = module.tp_q_head_num, module.tp_k_head_num, module.qk_head_dim, module.v_head_dim
            shapes.add(AttentionShape(*heads, dtype=torch.bfloat16, scale=module.scaling, latent=latent))
    if len(shapes) != 1:
        raise GraphError(f"--dyncp-transport peer: attention layers of {len(shapes)} shapes, decode graphs need one (use nccl): {shapes}")
    return shapes.pop()


_engine: GraphEngine | None = None


def engine() -> GraphEngine | None:
    """None where sharded steps run eagerly."""
    return _engine


def add_graph_variants(result: Any, hf_config: Any) -> Any:
    """AFTER graph_variants.create_attention_graph_variants: SGLang's runner captures our variants beside its own."""
    global _engine
    config = DynCpConfig.from_environment()
    if config is None or config.transport not in ("auto", "peer") or not torch.cuda.is_available():
        return result
    from sglang.srt.runtime_context import get_parallel

    group = get_parallel().tp_group.cpu_group
    places = tell_everybody(own_place(), group)
    obstacle = find_obstacle(places)
    if obstacle is not None:
        if config.transport == "peer":
            raise GraphError(f"--dyncp-transport peer: {obstacle}")
        logger.info("dyncp: --dyncp-transport auto is nccl, steps with sharded rows run without graphs: %s", obstacle)
        return result
    _engine = GraphEngine(guest_row_grid(config.max_rows), places, get_parallel().tp_rank, group)
    logger.info("dyncp: --dyncp-transport %s: decode graphs over peer memory, other sharded steps over nccl", config.transport)
    return _engine.variants
