"""What the ledger asks of the pool of its instance."""

from __future__ import annotations

from typing import Protocol


class PagePool(Protocol):
    """The pages of this instance, by number."""

    def num_givable_pages(self) -> int:
        """Free ones, and those that eviction from the prefix cache would free."""
        ...

    def take_pages(self, count: int) -> list[int] | None:
        """None when they are not there; then none is taken."""
        ...

    def return_pages(self, pages: list[int]) -> None: ...
