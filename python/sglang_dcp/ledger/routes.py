"""One integer says which shards take part in a row, and where the K/V of its new token goes.

Every instance knows every row's route, so both ends of an exchange lay out their slots from the same facts
(dataflow/graph/static_tables.py). Shards are named by their place in the home's exchange group (Layout.group), so a route is as short
as a node is small, however many instances there are.
"""

from __future__ import annotations

from collections.abc import Iterable

MOST_INSTANCES = 48
"""Of an exchange group. Beyond this a route does not fit a control word; such a server has none, and none of its steps runs as a graph with
sharded rows."""
_TAIL_BITS = 8


def route_word(shards: Iterable[int], tail: int, home: int, group: range) -> int:
    """The route of a row: `shards` that attend it, `tail` the owner of its last token's page. Always below 2**56, and 0 for no route.

    group: the ranks that exchange rows with `home`. ValueError for a shard outside it.
    """
    if len(group) > MOST_INSTANCES:
        return 0
    mask = 0
    for shard in shards:
        mask |= 1 << group.index(shard)
    return mask << _TAIL_BITS | (0 if tail == home else group.index(tail) + 1)


def shard_mask(route: int) -> int:
    """A bit per shard, by place in the group."""
    return route >> _TAIL_BITS


def travelling_tail(route: int) -> int:
    """The place in the group of the instance that the new token's K/V travels to, or -1 when it stays at home."""
    return (route & (1 << _TAIL_BITS) - 1) - 1
