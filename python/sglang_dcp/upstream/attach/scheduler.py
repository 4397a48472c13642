"""Puts an instance into SGLang's scheduler process, and keeps its idle and leak checks true."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Any

import torch

from sglang_dcp.config import DynCpConfig
from sglang_dcp.dataflow.token_ids import kernel_token_ids, torch_token_ids
from sglang_dcp.dataflow.transport.gloo import create_gloo_group
from sglang_dcp.ledger.homes import HomeRequest
from sglang_dcp.ledger.participant import Participant
from sglang_dcp.ledger.slices import Slices
from sglang_dcp.upstream.attach.agreement import check_agreement
from sglang_dcp.upstream.attach.install import verify_installed
from sglang_dcp.upstream.attach.models import attention_layers, check_model
from sglang_dcp.upstream.disaggregation.destinations import introduce
from sglang_dcp.upstream.layers.graphs import GraphEngine
from sglang_dcp.upstream.layers.layer_roll import LayerRoll
from sglang_dcp.upstream.layers.step_path import choose_partial_attention, choose_transport, prepare_kernels
from sglang_dcp.upstream.observe.metrics import attach_metrics
from sglang_dcp.upstream.pool.kv_pool import LedgerAllocator
from sglang_dcp.upstream.pool.page_audit import every_round_asked_for
from sglang_dcp.upstream.step.attached import after, around, attach, current
from sglang_dcp.upstream.step.driver import StepDriver
from sglang_dcp.upstream.step.managed import is_managed
from sglang_dcp.upstream.step.retention import end_request
from sglang_dcp.upstream.step.runtime import Runtime, cluster_of

logger = logging.getLogger(__name__)

EXCHANGE_TIMEOUT_SECONDS = 120.0
"""Longest wait for a peer inside a step; beyond it the rank ends with an error that names rank, step and layer."""


class UnsupportedError(RuntimeError):
    """Something of this server or model that dynamic context parallelism does not serve; the message names it."""


def attach_instance(result: Any, scheduler: Any, server_args: Any, port_args: Any) -> None:
    """AFTER Scheduler.__init__."""
    config = DynCpConfig.from_environment()
    if config is None:
        raise UnsupportedError("the dyncp hooks are installed but no configuration came with the environment")
    verify_installed()
    if "SGLANG_DYNCP_MUTANT" in os.environ:
        from sglang_dcp.mutants import install_mutant

        install_mutant()
    runner = scheduler.tp_worker.model_runner
    check_model(runner.model)
    graphs: GraphEngine | None = getattr(runner, "dyncp_graphs", None)
    if graphs is not None:
        graphs.end_captured()
    runtime = build_runtime(scheduler, config, graphs)
    runtime.destinations = introduce(scheduler, runtime.participant.rank, runtime.control_group)
    attach_metrics(runtime)
    runtime.audit_every_round = every_round_asked_for()
    StepDriver(runtime)
    attach(runtime)
    scheduler.dyncp_ports = port_args
    cluster = runtime.participant.cluster
    logger.info(
        "dyncp: instance %d of %d, policy %s, cost model %s for %d layers, %d pages of %d tokens",
        runtime.participant.rank,
        cluster.num_instances,
        config.policy,
        cluster.cost_model.name,
        cluster.cost_model.num_layers,
        cluster.num_pages,
        cluster.page_size,
    )


def build_runtime(scheduler: Any, config: DynCpConfig, graphs: GraphEngine | None) -> Runtime:
    """Every process of every instance calls it: groups are made, and settings compared. graphs: those that were captured, with all their
    buffers."""
    from sglang.srt.runtime_context import get_parallel

    pool = scheduler.token_to_kv_pool_allocator
    if not isinstance(pool, LedgerAllocator):
        raise UnsupportedError(f"--enable-dyncp needs a paged KV pool (--page-size above 1), this server has {type(pool).__name__}")
    runner, parallel = scheduler.tp_worker.model_runner, get_parallel()
    config = config.resolve(parallel.num_dp_ranks)
    cluster = cluster_of(config, parallel.num_dp_ranks, pool.num_pages, pool.page_size)
    slices, device = Slices(cluster.limits.layout, parallel.attn_tp_size), torch.device(runner.device)
    attention = choose_partial_attention(device, pool.page_size, runner)
    if cluster.limits.max_degree > 1 or config.cache_fraction > 0.0:
        # Whole ones lie elsewhere, too, where what they were to go on from was evicted. Ahead of the first exchange: hosts with unlike
        # caches reach it minutes apart. SGLang's groups wait so long, ours would not.
        prepare_kernels(attention, runner, device)
    check_agreement(config, cluster, runner.kv_cache_dtype, parallel.tp_group.cpu_group)
    instance, own_slice = slices.place(parallel.tp_rank)
    participant = Participant(cluster, instance, pool, own_slice)
    # With graphs the kernels are here; without, torch does it.
    pool.bind(participant, scheduler.tree_cache, torch_token_ids if graphs is None else kernel_token_ids(), end_freed)
    group = create_gloo_group(EXCHANGE_TIMEOUT_SECONDS, slices.control_groups)
    transport = choose_transport(config.transport, device, slices.exchange_groups, EXCHANGE_TIMEOUT_SECONDS, graphs)
    roll = LayerRoll(attention_layers(runner.model))
    return Runtime(scheduler, config, participant, pool, transport, group, graphs, device, attention, roll)


def end_freed(request: HomeRequest) -> None:
    """SGLang frees the row of a managed request."""
    runtime = current()
    assert runtime is not None, "managed requests come with the runtime"
    end_request(runtime, request)


def get_allocator_class(platform: Any) -> type:
    """REPLACE SRTPlatform.get_paged_allocator_cls."""
    return LedgerAllocator


@after
def is_fully_idle(runtime: Runtime, result: bool, scheduler: Any, for_health_check: bool = False, ignore_waiting: bool = False) -> bool:
    """AFTER Scheduler.is_fully_idle: guests of a busy home, and requests that sit out, keep the pool from being flushed. So do
    retained sequences, once somebody wants it flushed."""
    participant, queues = runtime.participant, runtime.queues
    busy = participant.busy() or queues.parked or (queues.flushing and participant.retention.num_pages_here)
    return result and (for_health_check or not busy)


@around
def check_full_pool(runtime: Runtime, original: Callable[..., Any], checker: Any, ps: Any, uncached: int = 0) -> tuple[bool, str]:
    """AROUND SchedulerInvariantChecker._check_full_pool: counts pages that the ledger owns instead of managed requests' rows."""
    from sglang.srt.managers.scheduler_components.pool_stats_observer import kv_private_tokens

    part = runtime.participant
    stock = sum(kv_private_tokens(req.kv, checker.page_size) for req in checker._requests_owning_rows() if not is_managed(req))
    ledger_pages = sum(1 for _ in part.homes.local_pages()) + part.homes.retained.num_local_pages + part.guests.num_pages
    return original(checker, ps, (stock if uncached else 0) + ledger_pages * part.page_size)
