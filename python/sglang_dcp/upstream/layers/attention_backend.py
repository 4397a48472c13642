"""Stock attention backends that run a step with sharded rows through our per-layer path, and any other step as they are."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from sglang_dcp.dataflow.attention_step import attention_step
from sglang_dcp.dataflow.contracts import NO_SCALES, KVScales, NewKV, StepPlan
from sglang_dcp.dataflow.copy_guard import CopyGuard
from sglang_dcp.dataflow.device_plan import plan_on_device
from sglang_dcp.dataflow.quantised_kv import quantised, with_quantised
from sglang_dcp.dataflow.step_mode import Eager
from sglang_dcp.upstream.attach.models import window_of
from sglang_dcp.upstream.layers.graph_variants import captured_guest_rows, process_graphs
from sglang_dcp.upstream.layers.graphs import GraphEngine
from sglang_dcp.upstream.step.attached import current
from sglang_dcp.upstream.step.runtime import Runtime

if TYPE_CHECKING:
    from sglang_dcp.dataflow.graph.graph_sizes import GraphKernel


class PoolLayer:
    """One layer of SGLang's KV pool. MLA keeps the latent and the rotary part in one row, of which V is a view.

    scales: of the layer's K/V, where the pool is quantised and the checkpoint has some; a pool of the model's own type holds K/V unscaled,
    whatever the checkpoint has. attend_stored: a chunk attends its own tokens as a quantised pool gives them back, else as they were.
    round_queries: queries lose what a quantised pool's type does not hold.
    """

    def __init__(self, pool: Any, layer: Any, latent: bool, *, attend_stored: bool = False, round_queries: bool = False) -> None:
        self._pool, self._layer, self.latent, self._attend_stored = pool, layer, latent, attend_stored
        self._round_queries = round_queries and pool.dtype.itemsize == 1
        self.scales = NO_SCALES
        if pool.dtype.itemsize == 1:
            self.scales = KVScales(getattr(layer, "k_scale_float", None) or 1.0, getattr(layer, "v_scale_float", None) or 1.0)
        self._kv_heads, self._key_dim, self._value_dim = layer.tp_k_head_num, layer.qk_head_dim, layer.v_head_dim

    def queries(self, rows: torch.Tensor) -> torch.Tensor:
        """[T, heads, qk_head_dim], contiguous, of rows [T, ...] in any of a model's shapes."""
        rows = rows.reshape(rows.shape[0], self._layer.tp_q_head_num, self._key_dim).contiguous()
        return rows.to(self._pool.dtype).to(rows.dtype) if self._round_queries else rows

    def new_kv(self, keys: torch.Tensor, values: torch.Tensor) -> NewKV:
        """What the model hands to attention: K/V [T, kv_heads, dim] or flat, or views of a joined projection."""
        keys = keys.reshape(-1, self._kv_heads, self._key_dim).contiguous()
        shape = -1, self._kv_heads, self._value_dim
        values = keys[..., : self._value_dim] if self.latent else values.reshape(shape).contiguous()
        return with_quantised(NewKV(keys, values, self.latent), self.scales, self._pool.dtype, attend_stored=self._attend_stored)

    def stored(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """K/V in the pool's element type, in the shapes that they come in. A latent layer's values are a view of its keys."""
        if keys.dtype == self._pool.dtype:
            return keys, values
        stored = quantised(keys, self.scales.key, self._pool.dtype)
        return stored, stored[..., : self._value_dim] if self.latent else quantised(values, self.scales.value, self._pool.dtype)

    def write(self, slots: torch.Tensor, new_kv: NewKV) -> None:
        self.write_tokens(slots, new_kv.keys, new_kv.values)

    def write_tokens(self, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """K/V [T, kv_heads, dim] or flat, as the model hands them over."""
        keys = keys.view(-1, self._kv_heads, self._key_dim)
        self._pool.set_kv_buffer(self._layer, self._write_location(slots), keys, values.view(-1, self._kv_heads, self._value_dim))

    def keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self._pool.get_key_buffer(self._layer.layer_id), self._pool.get_value_buffer(self._layer.layer_id)

    @staticmethod
    def _write_location(slots: torch.Tensor) -> Any:
        from sglang.srt.mem_cache.memory_pool import KVWriteLoc

        return KVWriteLoc(slots, physical=True)


_Stock: Any = object
"""Stands for the stock backend that `make_backend_class` puts behind a StepBackend."""


class StepBackend(_Stock):
    """What stands before a stock backend, whose `forward` is entered once per layer: steps with sharded rows take our path, any other is
    stock's as it is."""

    dyncp_runner: Any = None
    dyncp_graphs: GraphEngine | None = None
    dyncp_guard = CopyGuard(torch.device("cpu"))
    dyncp_graph_kernel: GraphKernel = "flashinfer"
    dyncp_chunks_read_the_pool = False
    """Whether stock's prefill chunk reads its own K/V back from the pool: ours then attends a quantised pool's elements too."""
    dyncp_rounds_queries = False
    """Whether stock's kernel takes queries in a quantised pool's type, in every step: a request shall be answered alike by both."""

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int, *args: Any, **kwargs: Any) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens, *args, **kwargs)
        graphs = process_graphs()
        if graphs is not None:
            self.dyncp_graphs = self.dyncp_runner.dyncp_graphs = graphs
            graphs.build(self.dyncp_runner, max_bs, kernel=self.dyncp_graph_kernel)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        if in_capture and captured_guest_rows():
            self._graphs().attention.prepare(forward_batch.batch_size, captured_guest_rows())
        elif in_capture or stock_prepares(forward_batch, as_graph=True):
            with self.dyncp_guard:
                super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        if not captured_guest_rows():
            super().init_forward_metadata_in_graph(forward_batch)
            return
        pool, token_table = self.token_to_kv_pool, self.dyncp_runner.req_to_token_pool.req_to_token
        self._graphs().begin_captured(forward_batch, captured_guest_rows(), token_table, pool.size + pool.page_size)

    def init_forward_metadata(self, forward_batch: Any) -> None:
        if stock_prepares(forward_batch, as_graph=False):
            with self.dyncp_guard:
                super().init_forward_metadata(forward_batch)
        else:
            # Stock's metadata would list remote token ids; nobody reads it in such a step.
            self.forward_metadata = None

    def forward(self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True, **kwargs: Any) -> Any:
        runtime, guest_rows = current(), captured_guest_rows()
        if guest_rows:
            check_call(layer, k, save_kv_cache)
            return forward_captured(self._graphs(), guest_rows, self.token_to_kv_pool, q, k, v, layer, **kwargs)
        if runtime is None or not isinstance(runtime.mode, Eager):
            return super().forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        check_call(layer, k, save_kv_cache)
        sinks = kwargs.pop("sinks", None)
        parts = with_rotary_part(q, k, v, **kwargs)
        return forward_sharded(
            runtime,
            self.token_to_kv_pool,
            *parts,
            layer,
            attend_stored=self.dyncp_chunks_read_the_pool,
            round_queries=self.dyncp_rounds_queries,
            sinks=sinks,
        )

    def _graphs(self) -> GraphEngine:
        assert self.dyncp_graphs is not None
        return self.dyncp_graphs


def make_backend_class(stock: type, *, kernel: str = "flashinfer") -> type:
    """kernel: of captured steps with sharded rows, by the backend's name."""
    return type(f"DynCp{stock.__name__}", (StepBackend, stock), {"dyncp_graph_kernel": kernel})


def stock_prepares(forward_batch: Any, *, as_graph: bool) -> bool:
    """A step is launched: whether stock's own metadata is wanted for its layers."""
    runtime = current()
    return runtime is None or runtime.driver.launch(forward_batch, as_graph=as_graph)


def step_is_sharded() -> bool:
    """Whether the step that is being launched runs our per-layer path without a graph: every instance answers alike."""
    runtime = current()
    return runtime is not None and isinstance(runtime.mode, Eager)


class LayerCallError(RuntimeError):
    """A layer asks for something that its class did not when it was put on the list of served classes."""


def check_call(layer: Any, keys: torch.Tensor | None, save_kv_cache: bool) -> None:
    """Where a sharded row's K/V goes is decided in our path: a layer hands both over and leaves writing to the backend."""
    if keys is None or not save_kv_cache:
        what = "hands over no keys" if keys is None else "has written its K/V by itself"
        raise LayerCallError(f"attention layer {layer.layer_id} {what}: in a step with sharded rows the backend writes them")


def with_rotary_part(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_rope: torch.Tensor | None = None, k_rope: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """MLA hands some backends the latent and the rotary part apart: [T, heads, latent] and [T, heads, rotary]. Ours takes them joined."""
    if q_rope is None or k_rope is None:
        return q, k, v
    tokens = q.shape[0]
    joined_q = torch.cat([q.reshape(tokens, -1, v.shape[-1]), q_rope.reshape(tokens, -1, k_rope.shape[-1])], dim=-1)
    return joined_q, torch.cat([k, k_rope.reshape(tokens, 1, -1)], dim=-1), v


def forward_sharded(
    runtime: Runtime,
    pool: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: Any,
    *,
    attend_stored: bool = False,
    round_queries: bool = False,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of a step with sharded rows. Returns [T, heads * v_head_dim]."""
    runtime.layer_roll.enter(layer.layer_id)
    plan = plan_of_step(runtime, q.shape[0], window_of(layer))
    latent = layer.tp_k_head_num == 1 and layer.qk_head_dim != layer.v_head_dim
    cache = PoolLayer(pool, layer, latent, attend_stored=attend_stored, round_queries=round_queries)
    output = attention_step(
        cache.queries(q),
        cache.new_kv(k, v),
        plan,
        cache,
        runtime.partial_attention,
        runtime.transport,
        scale=layer.scaling,
        layer=layer.layer_id,
        kv_scales=cache.scales,
        sinks=sinks,
    )
    return output.reshape(q.shape[0], layer.tp_q_head_num * layer.v_head_dim)


def forward_captured(
    graphs: GraphEngine,
    guest_rows: int,
    pool: Any,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layer: Any,
    q_rope: torch.Tensor | None = None,
    k_rope: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """A layer of a decode graph with sharded rows, while it is captured. Returns [T, heads * v_head_dim]."""
    graphs.layer_roll.enter(layer.layer_id)
    num_tokens, heads = q.shape[0], layer.tp_q_head_num
    cache = PoolLayer(pool, layer, latent=graphs.attention.shape.latent)
    # The exchange takes a query in two parts: it is not joined here. The pool takes keys joined.
    queries = q.reshape(num_tokens, heads, -1), None if q_rope is None else q_rope.reshape(num_tokens, heads, -1)
    if cache.latent:
        k = k.reshape(num_tokens, 1, -1)
        k = k if k_rope is None else torch.cat([k, k_rope.reshape(num_tokens, 1, -1)], dim=-1)
        k, v = cache.stored(k, k[..., : layer.v_head_dim])
        new_kv = v, k[..., layer.v_head_dim :]
    else:
        k, v = cache.stored(k, v)
        new_kv = k.reshape(num_tokens, 1, -1), v.reshape(num_tokens, 1, -1)
    cache.write_tokens(graphs.own_slots(num_tokens), k, v)
    merged = graphs.attention.run(
        num_tokens, guest_rows, queries, *new_kv, cache.keys_and_values(), cache.scales, window=window_of(layer), sinks=sinks
    )
    return merged.reshape(num_tokens, heads * layer.v_head_dim)


def plan_of_step(runtime: Runtime, num_tokens: int, window: int | None) -> StepPlan:
    """The step's plan for layers of this window, built by the first of them (the padded token count is known there)."""
    mode = runtime.mode
    assert isinstance(mode, Eager)
    plan = mode.plans.get(window)
    if plan is None:
        began = perf_counter()
        plan = mode.plans[window] = plan_on_device(mode.rows.build_plan(mode.home_rows, num_tokens, window), runtime.device)
        runtime.host_clock.spent("plan", perf_counter() - began)
    assert plan.num_tokens == num_tokens
    return plan


def fused_kv_write(original: Callable[..., bool], forward_batch: Any) -> bool:
    """AROUND models.utils.enable_fused_set_kv_buffer: the rope kernel would write K/V at remote token ids, outside this pool."""
    return not step_is_sharded() and not captured_guest_rows() and original(forward_batch)
