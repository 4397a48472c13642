"""Placement in SGLang's router process (the data-parallel controller)."""

from __future__ import annotations

import logging
import types
from typing import Any

from sglang_dcp.config import DynCpConfig
from sglang_dcp.upstream.router.fresh_reports import keep_reports_fresh
from sglang_dcp.upstream.router.placement_hint import strip_hints, write_placement
from sglang_dcp.upstream.router.placer import Placer

logger = logging.getLogger(__name__)


def install_placement(result: Any, controller: Any, server_args: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER DataParallelController.__init__: every request leaves the router with a placement.

    Snapshots of several hosts are taken in whether or not requests come. Policy `local` leaves SGLang's own total_tokens balancing in
    charge: its requests carry no placement.
    """
    from sglang.srt.runtime_context import get_parallel, get_schedule

    config = DynCpConfig.from_environment()
    if config is None:
        raise RuntimeError("the dyncp hooks are installed but no configuration came with the environment")
    if get_parallel().node_rank != 0:
        return
    keep_reports_fresh(controller)
    if config.policy == "local":
        return
    controller.dyncp = Placer(config.resolve(controller.launch_dp_size), controller.launch_dp_size)
    controller.dyncp.configure(get_schedule().page_size)
    controller.dispatching = types.MethodType(dispatch, controller)
    controller.refresh_load_budget_on_dispatch = True


def dispatch(controller: Any, req: Any) -> None:
    """Places a request and sends it to its home. A rank that the client named becomes the home: without a placement its scheduler could
    serve it from its own pool alone, and a longer prompt would wait there for ever."""
    placer: Placer = controller.dyncp
    placer.update(controller.load_snapshot_reader.read_all())
    req.kv_hints = strip_hints(req.kv_hints)
    if getattr(req, "input_ids", None) is None:
        controller.round_robin_scheduler(req)
        return
    try:
        placement, flexible = placer.place(req)
    except Exception:  # noqa: BLE001 - every instance's requests pass here: no single one may take the router down
        # The main process refuses what cannot be placed (request_limits.py); this is one that slipped through, or a fault of the policy.
        # Without a placement an instance serves it from its own pool, or refuses it by length (admission.py).
        logger.exception("dyncp: request %s has no placement", req.rid)
        controller.total_tokens_scheduler(req)
        return
    req.kv_hints = write_placement(req.kv_hints, placement, flexible=flexible, number=placer.num_placed(placement.home))
    req.routed_dp_rank = placement.home
    controller.maybe_external_dp_rank_routing(req)
