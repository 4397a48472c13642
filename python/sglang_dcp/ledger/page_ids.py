"""How one integer names a KV page anywhere in the cluster.

An instance numbers its own pages 1..num_pages; page 0 is SGLang's padding page. Seen from home `h`, page `p` of instance `o` has
id `((o - h) mod N) * stride + p`: a home's own pages keep their physical number, so every stock code path keeps working on them.
Token ids follow as `page_id * page_size + offset`, the unit of SGLang's req_to_token.
"""

from __future__ import annotations

from dataclasses import dataclass

INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Page:
    """A physical page: its owner instance and its number there."""

    owner: int
    number: int


@dataclass(frozen=True)
class PageIds:
    """The id space of one home."""

    home: int
    num_instances: int
    num_pages: int
    page_size: int

    def __post_init__(self) -> None:
        top = self.num_instances * self.stride * self.page_size
        if top > INT32_MAX:
            raise ValueError(
                f"{self.num_instances} instances x {self.num_pages} pages x {self.page_size} tokens need token ids up to {top}, "
                f"beyond int32 ({INT32_MAX}); lower --max-total-tokens"
            )

    @property
    def stride(self) -> int:
        """Page ids per instance."""
        return self.num_pages + 1

    def encode(self, page: Page) -> int:
        if not 1 <= page.number <= self.num_pages:
            raise ValueError(f"page {page.number} of instance {page.owner} is outside 1..{self.num_pages}")
        return (page.owner - self.home) % self.num_instances * self.stride + page.number

    def decode(self, page_id: int) -> Page:
        distance, number = divmod(page_id, self.stride)
        return Page((self.home + distance) % self.num_instances, number)

    def is_local(self, page_id: int) -> bool:
        return page_id < self.stride
