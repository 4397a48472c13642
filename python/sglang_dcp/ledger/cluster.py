"""What all instances of a server have alike, as far as the ledger computes from it."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_dcp.policy.cost_model import CostModel
from sglang_dcp.policy.split_limits import SplitLimits


@dataclass(frozen=True)
class Cluster:
    """page_size: tokens of a page. cost_model: predicts levels, where growth may choose. most_retained_pages: of one pool, that finished
    requests may keep for later ones."""

    limits: SplitLimits
    page_size: int
    cost_model: CostModel
    most_retained_pages: int = 0

    @property
    def num_instances(self) -> int:
        return self.limits.layout.num_instances

    @property
    def num_pages(self) -> int:
        """Of each instance's pool."""
        return self.limits.pool_pages
