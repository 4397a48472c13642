"""What carries a sharded step on this server's device: transport, attention kernels, graphs. And what ran as a graph."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch

from sglang_dcp.dataflow.attention.paged_attention import PagedPartialAttention
from sglang_dcp.dataflow.attention.partial_attention import PartialAttention, torch_partial_attention
from sglang_dcp.dataflow.step_mode import Eager, Graph, Stock
from sglang_dcp.dataflow.transport.base import Transport
from sglang_dcp.dataflow.transport.gloo import GlooTransport, create_gloo_group
from sglang_dcp.upstream.attach.cuda_settings import PLAIN_BACKEND
from sglang_dcp.upstream.layers.graphs import GraphEngine, GraphError, attention_shapes
from sglang_dcp.upstream.layers.silence import note_silence
from sglang_dcp.upstream.step.runtime import Runtime

logger = logging.getLogger(__name__)


def choose_transport(
    name: str, device: torch.device, groups: Sequence[range], timeout_seconds: float, graphs: GraphEngine | None
) -> Transport:
    """What carries a sharded step that runs without a graph, under --dyncp-transport `name` (checked by the settings). graphs: the rest.
    groups: ranks that exchange rows with each other (Layout.groups).

    Every rank calls it, in the same place: process groups are made by all of them.
    """
    if name == "auto" and device.type == "cpu":
        name = "gloo"
        logger.info("dyncp: --dyncp-transport auto is gloo: the device is a CPU")
    if name == "peer" and graphs is None:
        raise GraphError("--dyncp-transport peer carries decode graphs, and this server captures none (--disable-cuda-graph)")
    if name != "gloo":
        from sglang_dcp.dataflow.transport.nccl import NcclTransport, create_nccl_group

        return NcclTransport(create_nccl_group(timeout_seconds, groups))
    host = GlooTransport(create_gloo_group(timeout_seconds, groups))
    if device.type == "cpu":
        return host
    from sglang_dcp.dataflow.transport.host_staged import HostStagedTransport

    return HostStagedTransport(host)


def choose_partial_attention(device: torch.device, page_size: int, runner: Any) -> PartialAttention:
    """FlashInfer on a GPU; plain torch on a CPU, and for SGLang's torch_native backend. ValueError for MLA on a GPU with the latter.

    runner: SGLang's ModelRunner.
    """
    if device.type == "cpu":
        return torch_partial_attention
    if runner.decode_attention_backend_str == PLAIN_BACKEND:
        if runner.use_mla_backend:
            raise ValueError(f"--attention-backend {PLAIN_BACKEND} with --enable-dyncp serves no MLA model on a GPU: it was not run there")
        return torch_partial_attention
    from sglang_dcp.dataflow.attention.flashinfer_step import flashinfer_kernel

    return PagedPartialAttention(page_size, flashinfer_kernel)


def prepare_kernels(attention: PartialAttention, runner: Any, device: torch.device) -> None:
    """Compiles and loads what eager sharded steps attend and merge with, ahead of the first of them: with an empty cache it takes longer
    than a hang may last (--dyncp-hang-seconds). ValueError names what `attention` does not serve of the model.

    runner: SGLang's ModelRunner.
    """
    if device.type == "cpu":
        return
    from sglang_dcp.dataflow.merge_kernel import prepare

    began, shapes = perf_counter(), attention_shapes(runner)
    for num_heads, v_head_dim in sorted({(shape.num_heads, shape.v_head_dim) for alike in shapes.values() for shape in alike}):
        prepare(num_heads, v_head_dim, device)
    if isinstance(attention, PagedPartialAttention):
        for window, alike in shapes.items():
            if len(alike) == 1:
                attention.prepare(next(iter(alike)), window, device)
            else:
                logger.info("dyncp: nothing is compiled ahead for layers of window %s, which have %d shapes: %s", window, len(alike), alike)
    logger.info("dyncp: kernels of sharded steps without a graph are ready after %.1f s", perf_counter() - began)


def load_graph(runtime: Runtime, mode: Graph, forward_batch: Any, *, as_graph: bool) -> None:
    """Ahead of a step that all instances agreed to run as a graph. as_graph: so does SGLang; GraphError where it does not."""
    if not as_graph:
        raise GraphError(
            f"rank {runtime.participant.rank}, step {runtime.participant.step}: all instances agreed on a graph with "
            f"{mode.guest_rows} guest rows, SGLang runs this batch without one"
        )
    assert runtime.graphs is not None
    began = perf_counter()
    runtime.graphs.load(mode, forward_batch.batch_size, runtime.scheduler.req_to_token_pool.req_to_token)
    runtime.host_clock.spent("tables" if mode.step.is_advance else "new_tables", perf_counter() - began)


def count_forward(runtime: Runtime, result: Any) -> None:
    """Which share of the steps runs as a graph, who did not answer in one, and that every attention layer of an eager sharded step was
    ours."""
    counters, mode = runtime.counters, runtime.mode
    if not isinstance(mode, Stock) and runtime.rows.leaves_node():
        counters.crossing_steps += 1
    if result.can_run_cuda_graph:
        counters.graph_steps += 1
        if isinstance(mode, Graph):
            counters.sharded_graph_steps += 1
            note_silence(runtime, mode, result)
    else:
        counters.eager_steps += 1
        if isinstance(mode, Eager):
            runtime.layer_roll.close(f"rank {runtime.participant.rank}, step {runtime.participant.step}")
