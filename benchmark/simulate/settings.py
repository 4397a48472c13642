"""What a simulated cluster is, apart from policy and constants."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_dcp.policy.split_limits import Layout, SplitLimits, SplitRule


@dataclass(frozen=True, slots=True)
class SimulationSettings:
    """What the cluster is, apart from policy and constants.

    `grows`: a full tail may continue on another instance (ours); without it the youngest request of the instance is retracted.
    `prefill`: "elsewhere" (KV arrives complete) or "same" (chunks of `chunk_tokens` per home and step beside the decode step).
    `moves`: pages of running requests may move between instances (moves.py).
    `admission`: who waits behind a request that has no room: those of its "home" (an engine's own queue), all ("global"), or none ("any").
    `overload_fraction`: the run is given up as unstable once more than this share of all requests waits.
    """

    num_instances: int = 32
    instances_per_node: int = 8
    pool_tokens: int = 1_000_000
    page_size: int = 64
    max_running: int = 256
    max_new_tokens: int = 4096
    max_degree: int = 32
    max_guest_fraction: float = 1.0
    grows: bool = True
    moves: bool = False
    prefill: str = "elsewhere"
    admission: str = "home"
    chunk_tokens: int = 512
    overload_fraction: float = 0.05
    first_estimate: float = 512.0

    def limits(self) -> SplitLimits:
        """How a request may be split, for grants and growth."""
        rule = SplitRule(min(self.max_degree, self.num_instances), self.max_guest_fraction)
        return rule.limits(self.pool_tokens // self.page_size, Layout(self.num_instances, self.instances_per_node))

    def __post_init__(self) -> None:
        if self.prefill not in ("elsewhere", "same"):
            raise ValueError(f"prefill {self.prefill!r}: expected elsewhere or same")
        if self.admission not in ("home", "global", "any"):
            raise ValueError(f"admission {self.admission!r}: expected home, global or any")
        if self.pool_tokens < 2 * self.page_size:
            raise ValueError(f"pool_tokens {self.pool_tokens} is below two pages of {self.page_size}: the weights leave no room")
