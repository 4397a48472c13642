"""Where a turn goes: at random, or by the served router's rules on loads as a router would know them."""

from __future__ import annotations

import random
from dataclasses import replace

from sglang_dcp.conversations.turns import BLOCK_TOKENS, Turn
from sglang_dcp.policy.cost_model import CostModel
from sglang_dcp.policy.prefix_map import BLOCK_TOKENS as MAP_TOKENS
from sglang_dcp.policy.prefix_map import PrefixMap, home_by_prefix
from sglang_dcp.policy.types import InstanceLoad, Placement, PlacementPolicy, PlacementRequest

MAX_NEW_TOKENS = 4096


class Router:
    """policy None: any instance, at random. A turn counts where it was placed from its arrival to its end.

    spreads: of instances with equal load, the one that was sent fewest conversations. What a policy that moves no page needs to use all
    pools while nothing runs.
    """

    def __init__(
        self,
        policy: PlacementPolicy | None,
        cost: CostModel,
        num_instances: int,
        pool_tokens: int,
        *,
        seed: int,
        divide: int,
        spreads: bool,
    ) -> None:
        self._policy, self._cost, self._spreads = policy, cost, spreads
        self._num_begun = [0] * num_instances
        self._divide = divide
        self._random = random.Random(seed)
        self._prefixes = PrefixMap(max(BLOCK_TOKENS, MAP_TOKENS // divide))
        self._loads = [InstanceLoad(rank, rank // cost.gpus_per_node, 0, pool_tokens) for rank in range(num_instances)]
        self._placed: dict[int, Placement] = {}
        self._num_placed = 0

    def place(self, turn: Turn) -> Placement:
        """Counts it too."""
        if self._policy is None:
            home = self._random.randrange(len(self._loads))
            placement = Placement(home, (home,), (turn.prompt_tokens,))
        else:
            placement = self._by_prefix(turn, self._policy)
        self._placed[id(turn)] = placement
        self._count(placement, turn.output_tokens, 1)
        return placement

    def finish(self, turn: Turn) -> None:
        self._count(self._placed.pop(id(turn)), turn.output_tokens, -1)

    def _by_prefix(self, turn: Turn, policy: PlacementPolicy) -> Placement:
        step = self._prefixes.block_tokens // BLOCK_TOKENS
        digests = [b"%d %d" % (turn.conversation, block) for block in turn.blocks[step - 1 :: step].tolist()]
        expected = max(1, 512 // self._divide)
        request = PlacementRequest(turn.prompt_tokens, expected, max(1, MAX_NEW_TOKENS // self._divide))
        self._num_placed += 1
        cached = self._prefixes.find(digests, [self._num_placed] * len(self._loads))
        home = home_by_prefix(cached, turn.prompt_tokens, expected, self._loads, self._cost)
        if home is None and self._spreads:
            home = min(range(len(self._loads)), key=lambda rank: (self._loads[rank].kv_tokens, self._num_begun[rank]))
            self._num_begun[home] += 1
        placement = policy.place(replace(request, home=home), self._loads, BLOCK_TOKENS)
        self._prefixes.put(digests, placement.home, self._num_placed)
        return placement

    def _count(self, placement: Placement, output_tokens: int, sign: int) -> None:
        """The output lies on the tail."""
        self._loads[placement.home].home_requests += sign
        self._loads[placement.tail].kv_tokens += sign * output_tokens
        for rank, tokens in zip(placement.shards, placement.shard_tokens, strict=True):
            self._loads[rank].kv_tokens += sign * tokens
            self._loads[rank].attention_rows += sign
            self._loads[rank].guest_tokens += sign * tokens * (rank != placement.home)
