"""Which decode graphs SGLang's runner captures beside its own: one for each of our numbers of guest rows.

SGLang's own graph is the variant without guest rows ("g0").
"""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch

from sglang_dcp.config import DynCpConfig
from sglang_dcp.dataflow.step_mode import Graph
from sglang_dcp.ledger.slices import Slices
from sglang_dcp.upstream.layers.graphs import GraphEngine, GraphError, guest_row_grid
from sglang_dcp.upstream.layers.peers import find_obstacle, own_place, tell_everybody
from sglang_dcp.upstream.step.attached import current

logger = logging.getLogger(__name__)

STOCK_LABEL = "g0"


@dataclass(frozen=True)
class SizeVariants:
    """What SGLang's graph runner asks (layers/attention/graph_variants.AttentionGraphVariants)."""

    capture_labels: tuple[str, ...]

    def select(self, forward_batch: Any) -> str:
        runtime = current()
        mode = None if runtime is None else runtime.mode
        return label_of(mode.guest_rows) if isinstance(mode, Graph) else STOCK_LABEL


def label_of(guest_rows: int) -> str:
    return f"g{guest_rows}"


def captured_guest_rows() -> int:
    """Guest rows of the graph that is being captured; 0 outside a capture and for SGLang's own."""
    from sglang.srt.model_executor.runner_utils.capture_mode import get_capture_attention_variant

    label = get_capture_attention_variant()
    return int(label[1:]) if label else 0


@functools.cache
def process_graphs() -> GraphEngine | None:
    """The graphs of this process, made for whoever asks first: SGLang's runner for its variants, or our backend for its buffers. None
    where steps with sharded rows run eagerly. Only a server that captures graphs asks, and then every instance does."""
    config = DynCpConfig.from_environment()
    if config is None or config.transport not in ("auto", "peer") or not torch.cuda.is_available():
        return None
    from sglang.srt.runtime_context import get_parallel

    parallel = get_parallel()
    group, slices = parallel.tp_group.cpu_group, Slices(config.layout(int(parallel.num_dp_ranks)), parallel.attn_tp_size)
    places = tell_everybody(own_place(), group)
    obstacle = find_obstacle(places, slices.exchange_groups)
    if obstacle is not None:
        if config.transport == "peer" or slices.per_instance > 1:
            with_slices = f" with attention TP {slices.per_instance}, which needs peer memory" if slices.per_instance > 1 else ""
            raise GraphError(f"--dyncp-transport {config.transport}{with_slices}: {obstacle}")
        logger.info("dyncp: --dyncp-transport auto is nccl, steps with sharded rows run without graphs: %s", obstacle)
        return None
    logger.info("dyncp: --dyncp-transport %s: decode graphs over peer memory, other sharded steps over nccl", config.transport)
    return GraphEngine(guest_row_grid(config.max_rows), places, parallel.tp_rank, slices.layout, group, slices.per_instance)


def add_graph_variants(result: Any, hf_config: Any) -> Any:
    """AFTER graph_variants.create_attention_graph_variants: SGLang's runner captures our variants beside its own."""
    graphs = process_graphs()
    return result if graphs is None else SizeVariants((STOCK_LABEL, *(label_of(rows) for rows in graphs.guest_rows)))
