"""Which homes may still hold the beginning of a prompt: what the router remembers of the prompts that it placed.

Nothing is reported back: a wrong guess costs a miss. All prompts of one program begin alike, so an entry stands for a prefix of some
length, not for a program, and names every home that was sent it lately.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from sglang_dcp.policy.cost_model import CostModel
from sglang_dcp.policy.growth import predicted_level
from sglang_dcp.policy.prefix_digests import chained_digests
from sglang_dcp.policy.types import InstanceLoad

BLOCK_TOKENS = 1024
MOST_ENTRIES = 1 << 18
"""Blocks remembered, some 200 bytes each: 268 million tokens of prompts."""
MOST_HOMES = 8
"""Homes remembered per block, the last ones sent it."""


class PrefixMap:
    """Prompts by a chained digest per `block_tokens`. Bounded: the blocks used longest ago are forgotten."""

    def __init__(self, block_tokens: int = BLOCK_TOKENS, most_entries: int = MOST_ENTRIES) -> None:
        self.block_tokens = block_tokens
        self._most_entries = most_entries
        self._homes: OrderedDict[bytes, dict[int, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._homes)

    def digests(self, tokens: Sequence[int], namespace: Sequence[str | None] = ()) -> list[bytes]:
        """One per whole block; each covers all tokens before it too. namespace: what keeps equal tokens apart."""
        return list(chained_digests(tokens, self.block_tokens, namespace))

    def put(self, digests: Sequence[bytes], home: int, number: int) -> None:
        """A prompt was sent to `home` as its placement `number`. The last blocks are forgotten first: without them the first still match,
        and never the other way round."""
        for block in reversed(digests):
            homes = self._homes.setdefault(block, {})
            homes.pop(home, None)
            homes[home] = number
            if len(homes) > MOST_HOMES:
                del homes[next(iter(homes))]
            self._homes.move_to_end(block)
        while len(self._homes) > self._most_entries:
            self._homes.popitem(last=False)

    def find(self, digests: Sequence[bytes], taken_in: Sequence[int]) -> tuple[tuple[int, int], ...]:
        """(home, tokens) of homes that were sent a prompt with the same beginning, the longest first, then the last one sent it.

        taken_in[h]: newest placement that has arrived at home h. One under way has computed nothing yet, so equal prompts that come at
        once are not all sent after the first.
        """
        found: dict[int, int] = {}
        for index in range(len(digests) - 1, -1, -1):
            for home, number in reversed(self._homes.get(digests[index], {}).items()):
                if home not in found and number <= taken_in[home]:
                    found[home] = (index + 1) * self.block_tokens
        return tuple(found.items())


def prefill_us(cost: CostModel, cached: int, tokens: int) -> float:
    """Time in which one instance computes the tokens of a prompt from `cached` on, all layers."""
    fresh = tokens - cached
    return fresh * (cost.prefill_us_per_token + cost.prefill_attention_us_per_token_context * (cached + tokens) / 2)


def home_by_prefix(
    cached: Sequence[tuple[int, int]], prompt_tokens: int, new_tokens: int, loads: Sequence[InstanceLoad], cost: CostModel
) -> int | None:
    """The home whose prefix is worth going to, or None: then the prompt goes where it would without one.

    A home saves the prefill of its cached tokens. It costs, for every expected output token, what its level stands above the lowest;
    where it has more to do than others, so has the step of everybody. One without room for the rest of the prompt is passed over where
    another has room for all of it: who has to wait wherever it goes waits there.
    """
    levels = [predicted_level(cost, load.kv_tokens, load.home_requests) for load in loads]
    lowest, all_of_it = min(levels), prefill_us(cost, 0, prompt_tokens)
    has_to_wait = all(load.free_tokens < prompt_tokens for load in loads)
    best, best_gain = None, 0.0
    for home, tokens in cached:
        usable = min(tokens, prompt_tokens - 1)
        if loads[home].free_tokens < prompt_tokens - usable and not has_to_wait:
            continue
        gain = all_of_it - prefill_us(cost, usable, prompt_tokens) - new_tokens * cost.num_layers * (levels[home] - lowest)
        if gain > best_gain:
            best, best_gain = home, gain
    return best
