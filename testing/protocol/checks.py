"""What must hold between two steps: one owner per page, homes and shards of one mind, and K/V that is what was written."""

from __future__ import annotations

from collections.abc import Sequence

from sglang_dcp.ledger.integrity import check_instance
from sglang_dcp.ledger.messages import Granted, Release, Retain
from sglang_dcp.ledger.page_ids import Page
from sglang_dcp.ledger.participant import Participant
from testing.protocol.fakes import ModelRequest
from testing.protocol.scheduler import ModelScheduler


def check_owners(homes: Sequence[ModelScheduler]) -> None:
    """Every page has one owner, and what homes believe is what shards lent, messages in flight considered."""
    for home in homes:
        instance = home.participant
        owners = {
            "free": home.pool.free,
            "local": [page for req in home.requests if req.dyncp is None for page in req.pages],
            "managed": instance.homes.local_pages(),
            "guest": instance.guests.all_pages(),
            "retained": [*instance.homes.retained.local_pages(), *instance.guests.all_retained_pages()],
        }
        assert len(owners["retained"]) == instance.retention.num_pages_here
        check_instance(instance.num_pages, owners)
    for shard in homes:
        _check_lent(shard.participant, [home.participant for home in homes if home is not shard])


def _check_lent(shard: Participant, others: Sequence[Participant]) -> None:
    told: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for message in shard.outbox:
        if isinstance(message, Granted):
            told.setdefault((message.home, message.handle), []).extend(enumerate(message.pages, message.first_index))
    for home in others:
        released = {message.handle for message in home.outbox if isinstance(message, Release | Retain)}
        unknown = {handle for rank, handle in shard.guests.handles() if rank == home.rank} - released - set(home.homes.requests)
        assert not unknown, f"{shard.rank} hosts handles {unknown} of {home.rank}, which does not know them"
        for handle, request in home.homes.requests.items():
            believed = [(i, page.number) for i, page in enumerate(request.pages) if page is not None and page.owner == shard.rank]
            expected = sorted(believed + told.get((home.rank, handle), []))
            assert expected == list(shard.guests.pages_of(home.rank, handle)), (home.rank, handle, expected)


def check_asked_pages(homes: Sequence[ModelScheduler]) -> None:
    """Stands for the layers: a shard holds exactly the pages that the home's rows of this step will ask it for."""
    for home in homes:
        for req, prefix_len, num_new in home.batch:
            if req.dyncp is None:
                continue
            num_pages = -(-(prefix_len + num_new) // home.participant.page_size)
            expected: dict[int, list[int]] = {}
            for page in req.dyncp.pages[:num_pages]:
                expected.setdefault(page.owner, []).append(page.number)
            for shard in (h.participant for h in homes if h is not home):
                held = [number for i, number in shard.guests.pages_of(home.participant.rank, req.dyncp.handle) if i < num_pages]
                assert held == expected.get(shard.rank, []), (shard.rank, req.rid, held, expected)


class WrittenKv:
    """What tokens each page of each pool was written with: K/V by the layers' own order of writing and reading."""

    def __init__(self, num_instances: int, page_size: int) -> None:
        self.page_size = page_size
        self._pages: list[dict[int, list[int]]] = [{} for _ in range(num_instances)]

    def write(self, homes: Sequence[ModelScheduler], *, read: bool) -> None:
        """What the layers write in this step. read: check that every row finds the K/V of its own tokens in all the pages before."""
        for home in homes:
            for req, prefix_len, num_new in home.batch:
                pages = self.put(home.participant.rank, req, range(prefix_len, prefix_len + num_new))
                if read:
                    self._check_row(req.rid, req.full_untruncated_fill_ids[: prefix_len + num_new], pages)

    def put(self, home: int, req: ModelRequest, positions: range) -> Sequence[Page | None]:
        """Writes these tokens of a request. Returns its pages."""
        ids = req.full_untruncated_fill_ids
        pages: Sequence[Page | None] = req.dyncp.pages if req.dyncp is not None else [Page(home, number) for number in req.pages]
        for position in positions:
            page = pages[position // self.page_size]
            assert page is not None, f"{req.rid} has no page for token {position}"
            written = self._pages[page.owner].setdefault(page.number, [0] * self.page_size)
            written[position % self.page_size] = ids[position]
        return pages

    def _check_row(self, rid: str, ids: list[int], pages: Sequence[Page | None]) -> None:
        for index, begin in enumerate(range(0, len(ids), self.page_size)):
            page, expected = pages[index], ids[begin : begin + self.page_size]
            assert page is not None, f"{rid} has no page {index}"
            found = self._pages[page.owner].get(page.number, [])[: len(expected)]
            assert found == expected, f"{rid} reads {found} in page {index}, {expected} were written"
