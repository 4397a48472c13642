"""The policies of `--dyncp-policy`, by name."""

from __future__ import annotations

from sglang_dcp.policy.baselines import FixedDegree, LengthBuckets, Local
from sglang_dcp.policy.cost_model import CostModel
from sglang_dcp.policy.dual_balance import DualBalance
from sglang_dcp.policy.split_limits import SplitRule
from sglang_dcp.policy.types import PlacementPolicy

POLICY_NAMES = ("dual-balance", "length-buckets", "fixed", "local")
LOCAL_VARIANTS = ("local-least-batch", "local-least-kv")
"""Of `local`, which alone means least KV; for plans and the simulator."""


def make_policy(
    name: str,
    *,
    num_instances: int,
    page_size: int,
    cost_model: CostModel,
    degree: int | None,
    max_degree: int,
    max_guest_fraction: float,
    crosses_nodes: bool = False,
) -> PlacementPolicy:
    """The policy of `--dyncp-policy`. Raises ValueError naming the flag for a value that cannot work.

    crosses_nodes: shards may leave the home's node (Layout.crosses). LOCAL_VARIANTS are known too.
    """
    if page_size < 2:
        raise ValueError(f"--page-size {page_size}: placement needs pages of at least 2 tokens")
    if not 1 <= max_degree <= num_instances:
        raise ValueError(f"--dyncp-max-degree {max_degree} is outside 1..{num_instances}")
    if not 0.0 <= max_guest_fraction <= 1.0:
        raise ValueError(f"--dyncp-max-guest-fraction {max_guest_fraction} is outside 0..1")
    if (degree is not None) != (name == "fixed"):
        raise ValueError(f"--dyncp-degree goes with --dyncp-policy fixed and only with it, got degree {degree} and policy {name}")
    rule = SplitRule(max_degree, max_guest_fraction, crosses_nodes)
    if name == "dual-balance":
        return DualBalance(cost_model, rule)
    if name == "length-buckets":
        return LengthBuckets.for_cost_model(cost_model, rule)
    if name == "fixed" and degree is not None:
        return FixedDegree(degree, rule)
    if name in ("local", "local-least-kv"):
        return Local("least-kv")
    if name == "local-least-batch":
        return Local("least-batch")
    raise ValueError(f"--dyncp-policy {name!r}: expected one of {', '.join(POLICY_NAMES)}")
