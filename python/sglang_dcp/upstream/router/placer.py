"""Places requests by the policy, on the loads that the instances report and the placements that they have not taken in yet."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from sglang_dcp.config import DynCpConfig
from sglang_dcp.observe.placement_log import PlacementLog
from sglang_dcp.policy.cluster_view import ClusterView, HomeReport
from sglang_dcp.policy.placement import make_policy
from sglang_dcp.policy.prefix_map import BLOCK_TOKENS, PrefixMap, home_by_prefix
from sglang_dcp.policy.types import InstanceLoad, Placement, PlacementPolicy, PlacementRequest
from sglang_dcp.upstream.router.placement_request import cost_model_of, describe_request

logger = logging.getLogger(__name__)


class Placer:
    """The router's half of placement. `clock` stamps the lines of the placement log; nothing else depends on it."""

    def __init__(self, config: DynCpConfig, num_instances: int, clock: Callable[[], float] = time.time) -> None:
        self._config = config
        self._clock = clock
        self._num_instances = num_instances
        self._view = ClusterView(config.layout(num_instances).nodes)
        self._policy: PlacementPolicy | None = None
        self._page_size = 0
        self._prefixes = PrefixMap(min(BLOCK_TOKENS, config.cache_min_tokens)) if config.cache_fraction else None
        self._log = PlacementLog.from_environment()

    def configure(self, page_size: int) -> None:
        """Builds the policy; called once the page size is known."""
        self._page_size = page_size
        cost_model = cost_model_of(self._config, self._num_instances)
        settings: dict[str, Any] = {
            "num_instances": self._num_instances,
            "page_size": page_size,
            "degree": self._config.degree,
            "max_degree": self._config.max_degree or self._num_instances,
            "max_guest_fraction": self._config.max_guest_fraction,
            "crosses_nodes": self._config.layout(self._num_instances).crosses,
        }
        self._cost_model = cost_model
        self._policy = make_policy(self._config.policy, cost_model=cost_model, **settings)
        if self._log is not None:
            self._log.begin(policy=self._config.policy, cost_model=cost_model.name, constants=dataclasses.asdict(cost_model), **settings)

    def update(self, snapshots: Sequence[Any]) -> None:
        """Takes in the load snapshot of every instance (load_report.py). One without a report of ours is SGLang's own, written before the
        instance was attached: it has taken in no placement."""
        for snapshot in snapshots:
            rank = snapshot.dp_rank
            report = getattr(snapshot, "dyncp", None)
            if report is None:
                num_requests = snapshot.num_running_reqs + snapshot.num_waiting_reqs
                report = HomeReport(0, num_requests, {rank: snapshot.num_used_tokens})
            self._view.take_report(rank, snapshot.max_total_num_tokens, report)

    def loads(self) -> list[InstanceLoad]:
        """What the policy sees."""
        return self._view.loads()

    def num_placed(self, home: int) -> int:
        """Placements that were sent to `home`: the number of the newest."""
        return self._view.num_placed(home)

    def place(self, req: Any) -> tuple[Placement, bool]:
        """(placement, flexible) of a tokenized request.

        A rank that the client named is the home, and how the request is split stays free. A pinned placement is not flexible: no grant
        may split it otherwise.
        """
        assert self._policy is not None, "configure() comes first"
        pin = (req.sampling_params.custom_params or {}).get("dyncp") or {}
        page_size = self._page_size
        limits = self._config.split_limits(self._num_instances, self._view.smallest_capacity // page_size)
        max_new_tokens = req.sampling_params.max_new_tokens
        named_home = getattr(req, "routed_dp_rank", None)
        num_tokens = len(req.input_ids)
        request = describe_request(
            num_tokens,
            max_new_tokens,
            pin,
            limits.reach_pages * page_size,
            named_home,
            page_size=page_size,
            largest_degree=limits.max_degree,
        )
        loads = self.loads()
        digests = self._digests(req)
        if request.home is None:
            request = dataclasses.replace(request, home=self._home_by_prefix(digests, request, loads))
        placement = self._policy.place(request, loads, page_size)
        number = self._view.place(placement)
        if self._prefixes is not None:
            self._prefixes.put(digests, placement.home, number)
        self._note(req.rid, request, loads, placement)
        pinned = bool(pin) or self._config.policy in ("fixed", "length-buckets")
        return placement, not pinned

    def _note(self, rid: str, request: PlacementRequest, loads: Sequence[InstanceLoad], placement: Placement) -> None:
        """Into the placement log. A disk that is full must cost the measurement, and no request its placement."""
        if self._log is None:
            return
        try:
            self._log.add(self._clock(), rid, request, loads, placement)
        except OSError:
            logger.exception("dyncp: the placement log ends here (%s)", self._log.path)
            self._log = None

    def _digests(self, req: Any) -> list[bytes]:
        return [] if self._prefixes is None else self._prefixes.digests(req.input_ids, (req.extra_key, req.cache_salt))

    def _home_by_prefix(self, digests: Sequence[bytes], request: PlacementRequest, loads: Sequence[InstanceLoad]) -> int | None:
        """Where the prompt's beginning may still lie, if it is worth going there."""
        if self._prefixes is None or not digests:
            return None
        cached = self._prefixes.find(digests, self._view.taken_in())
        return home_by_prefix(cached, request.prompt_tokens, request.expected_new_tokens, loads, self._cost_model)
