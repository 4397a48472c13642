"""The router's placement on its way to the home: one action in SGLang's KV-hint envelope."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang_dcp.policy.types import Placement

ACTION_TYPE, ACTION_VERSION = "dyncp.place", "1"


@dataclass(frozen=True, slots=True)
class PlacedHint:
    """What the home reads. number: of the placement among those with this home, from 1 (policy/cluster_view.py)."""

    placement: Placement
    flexible: bool
    number: int


def strip_hints(hints: Any) -> Any:
    """The envelope without our action: a client must not place requests through it."""
    if hints is None or not any(action.action_type == ACTION_TYPE for action in hints.actions):
        return hints
    import msgspec

    return msgspec.structs.replace(hints, actions=[action for action in hints.actions if action.action_type != ACTION_TYPE])


def write_placement(hints: Any, placement: Placement, *, flexible: bool, number: int) -> Any:
    """The envelope with the placement as its last action."""
    import msgspec
    from sglang.srt.managers.kv_hints import KvHintAction, KvHintsEnvelope

    shards, tokens = list(placement.shards), list(placement.shard_tokens)
    payload = {"home": placement.home, "shards": shards, "tokens": tokens, "flexible": flexible, "number": number}
    action = KvHintAction(action_id="dyncp", action_type=ACTION_TYPE, action_version=ACTION_VERSION, payload=payload)
    if hints is None:
        return KvHintsEnvelope(protocol_version="dyncp/1", message_id="dyncp", actions=[action])
    return msgspec.structs.replace(hints, actions=[*strip_hints(hints).actions, action])


def read_placement(hints: Any) -> PlacedHint | None:
    """None for a request that the router did not place."""
    for action in hints.actions if hints is not None else ():
        if action.action_type == ACTION_TYPE:
            payload = action.payload
            placement = Placement(payload["home"], tuple(payload["shards"]), tuple(payload["tokens"]))
            return PlacedHint(placement, bool(payload["flexible"]), int(payload["number"]))
    return None
