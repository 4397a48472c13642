"""A digest of the ledger's history: instances that decided differently once are told apart in every step after."""

from __future__ import annotations

from sglang_dcp.ledger.digest import digest
from sglang_dcp.ledger.reservations import Decision


class DecisionDigest:
    """Of every decision so far and of the asks that were open then: instances that once differed differ ever after."""

    def __init__(self) -> None:
        self.value = 0

    def add(self, decision: Decision, open_asks: int) -> None:
        """open_asks: their digest, before the decision."""
        words = [self.value, open_asks, len(decision.grants), len(decision.victims)]
        for grant in decision.grants:
            words += (grant.home, grant.handle, grant.previous, grant.num_kept, int(grant.borrows), len(grant.segments))
            for segment in grant.segments:
                words += (segment.rank, segment.first_index, segment.num_pages)
        words += decision.promised
        for key in decision.victims:
            words += key
        for eviction in decision.evicted:
            words += eviction
        self.value = digest(words)
