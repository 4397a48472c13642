"""What a placement policy sees and what it answers. Standard library only: the router and the simulator share it.

Words (docs/glossary.md): *home* owns a request's batch row, *shards* hold its KV, the last shard is the *tail*, which takes new
tokens; *degree* is the number of distinct shards; a *guest* token lives on an instance that is not its home.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class CapacityError(ValueError):
    """The request cannot fit even an empty cluster; the message names the value, the limit and the flag."""


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """One request as a policy may see it. The true output length is never known here.

    Lengths are in tokens. `degree` and `home` are pins (custom_params.dyncp); None leaves the choice to the policy.
    """

    prompt_tokens: int
    expected_new_tokens: int
    max_new_tokens: int
    degree: int | None = None
    home: int | None = None


@dataclass(slots=True)
class InstanceLoad:
    """Load of one instance: what it holds plus what is already promised to it (placements in flight)."""

    rank: int
    node: int
    kv_tokens: int
    kv_capacity: int
    guest_tokens: int = 0
    home_requests: int = 0
    attention_rows: int = 0

    @property
    def free_tokens(self) -> int:
        return max(0, self.kv_capacity - self.kv_tokens)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request lives. `shards` are in sequence order; the last one is the tail.

    `shard_tokens[i]` prompt tokens go to `shards[i]`: multiples of the page size except the last. Degree 1 may be foreign
    (`shards[0] != home`).
    """

    home: int
    shards: tuple[int, ...]
    shard_tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.shards or len(self.shards) != len(self.shard_tokens):
            raise ValueError(f"placement needs one token count per shard, got shards {self.shards}, tokens {self.shard_tokens}")
        if len(set(self.shards)) != len(self.shards):
            raise ValueError(f"placement names a shard twice: {self.shards}")

    @property
    def degree(self) -> int:
        return len(self.shards)

    @property
    def tail(self) -> int:
        return self.shards[-1]

    @property
    def is_local(self) -> bool:
        return self.shards == (self.home,)


class PlacementPolicy(Protocol):
    """Chooses home and shards. Pure: no clock, no I/O, deterministic for equal inputs and equal own state."""

    name: str

    def place(self, request: PlacementRequest, loads: Sequence[InstanceLoad], page_size: int) -> Placement:
        """Returns a placement that fits an empty cluster; it may have to wait for room.

        `loads[i].rank == i`. Raises CapacityError when the request fits not even an empty cluster, or a pin makes that so.
        """
        ...
