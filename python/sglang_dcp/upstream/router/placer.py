"""The router's view of the cluster: SGLang's load snapshots plus a ledger of placements that they do not show yet."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang_dcp.config import DynCpConfig
from sglang_dcp.observe.placement_log import PlacementLog
from sglang_dcp.policy.placement import make_policy
from sglang_dcp.policy.types import InstanceLoad, Placement, PlacementPolicy
from sglang_dcp.upstream.router.placement_request import cost_model_of, describe_request, most_pools, node_of


@dataclass(frozen=True)
class InFlight:
    """A placement that the snapshots may not show yet."""

    placement: Placement
    placed_at: float


@dataclass
class _HomeView:
    snapshot_time: float = 0.0
    num_waiting: int = 0
    num_running: int = 0
    placed: deque[InFlight] = field(default_factory=deque)


class Placer:
    """Places requests; keeps, per home and in order, what was sent there and is not admitted yet.

    A home admits in the order of arrival, near enough: of what was sent before its last snapshot, all but the newest `num_waiting` are
    admitted, and then their tokens show in the snapshots of their shards.
    """

    def __init__(self, config: DynCpConfig, num_instances: int, clock: Callable[[], float] = time.time) -> None:
        self._config = config
        self._clock = clock
        self._homes = [_HomeView() for _ in range(num_instances)]
        self._used = [0] * num_instances
        self._capacity = [0] * num_instances
        self._policy: PlacementPolicy | None = None
        self._page_size = 0
        self._log = PlacementLog.from_environment()

    def configure(self, page_size: int) -> None:
        """Builds the policy; called once the page size is known."""
        num_instances = len(self._homes)
        self._page_size = page_size
        cost_model = cost_model_of(self._config, num_instances)
        settings: dict[str, Any] = {
            "num_instances": num_instances,
            "page_size": page_size,
            "degree": self._config.degree,
            "max_degree": self._config.max_degree or num_instances,
            "max_guest_fraction": self._config.max_guest_fraction,
        }
        self._policy = make_policy(self._config.policy, cost_model=cost_model, **settings)
        if self._log is not None:
            self._log.begin(policy=self._config.policy, cost_model=cost_model.name, constants=dataclasses.asdict(cost_model), **settings)

    def update(self, snapshots: Sequence[Any]) -> None:
        """Takes in SGLang's LoadSnapshot of every instance."""
        for snapshot in snapshots:
            view = self._homes[snapshot.dp_rank]
            self._used[snapshot.dp_rank] = snapshot.num_used_tokens
            self._capacity[snapshot.dp_rank] = snapshot.max_total_num_tokens
            view.snapshot_time = snapshot.timestamp
            view.num_waiting, view.num_running = snapshot.num_waiting_reqs, snapshot.num_running_reqs
        for view in self._homes:
            seen = sum(1 for entry in view.placed if entry.placed_at < view.snapshot_time)
            for _ in range(seen - view.num_waiting):
                view.placed.popleft()

    def loads(self) -> list[InstanceLoad]:
        tokens, guests = list(self._used), [0] * len(self._homes)
        requests = []
        for home, view in enumerate(self._homes):
            unseen = sum(1 for entry in view.placed if entry.placed_at >= view.snapshot_time)
            requests.append(view.num_running + view.num_waiting + unseen)
            for entry in view.placed:
                for rank, count in zip(entry.placement.shards, entry.placement.shard_tokens, strict=True):
                    tokens[rank] += count
                    guests[rank] += count if rank != home else 0
        return [
            InstanceLoad(
                rank=rank,
                node=node_of(rank),
                kv_tokens=tokens[rank],
                kv_capacity=self._capacity[rank],
                guest_tokens=guests[rank],
                home_requests=requests[rank],
                attention_rows=requests[rank],
            )
            for rank in range(len(self._homes))
        ]

    def place(self, req: Any) -> tuple[Placement, bool]:
        """(placement, flexible) of a tokenized request. A pinned placement is not flexible: no grant may split it otherwise."""
        assert self._policy is not None, "configure() comes first"
        pin = (req.sampling_params.custom_params or {}).get("dyncp") or {}
        page_size = self._page_size
        reach_tokens = most_pools(self._config, len(self._homes)) * (min(self._capacity) // page_size * page_size)
        request = describe_request(len(req.input_ids), req.sampling_params.max_new_tokens, pin, reach_tokens)
        loads, now = self.loads(), self._clock()
        placement = self._policy.place(request, loads, self._page_size)
        self._homes[placement.home].placed.append(InFlight(placement, now))
        if self._log is not None:
            self._log.add(now, req.rid, request, loads, placement)
        pinned = bool(pin) or self._config.policy in ("fixed", "length-buckets")
        return placement, not pinned
