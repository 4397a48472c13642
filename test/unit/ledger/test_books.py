"""The books of a shard and of a home."""

from random import Random

import pytest

from sglang_dcp.ledger.guests import GuestBook
from sglang_dcp.ledger.homes import HomeBook
from sglang_dcp.ledger.messages import Granted
from sglang_dcp.ledger.page_ids import Page, PageIds
from sglang_dcp.ledger.reservations import Grant, GrantedSegment


def test_guest_pages_stay_in_sequence_order():
    book = GuestBook()
    book.lend(1, 7, 4, [30, 31])
    book.lend(1, 7, 0, [9])
    book.lend(2, 7, 0, [8])
    assert list(book.pages_of(1, 7)) == [(0, 9), (4, 30), (5, 31)]
    assert sorted(book.all_pages()) == [8, 9, 30, 31]
    assert (len(book), book.num_pages, set(book.handles())) == (2, 4, {(1, 7), (2, 7)})


def test_a_page_index_is_lent_once():
    book = GuestBook()
    book.lend(1, 7, 4, [30])
    with pytest.raises(ValueError, match=r"home 1, handle 7: page index 4 is lent already \(page 30\)"):
        book.lend(1, 7, 4, [31])


def test_taking_back_what_was_never_lent_is_nothing():
    book = GuestBook()
    book.lend(1, 7, 0, [5, 6])
    assert book.take_back(1, 8) == book.take_back(2, 7) == []
    assert book.take_back(1, 7) == [5, 6]
    assert book.take_back(1, 7) == []
    assert (len(book), book.num_pages, list(book.pages_of(1, 7))) == (0, 0, [])


@pytest.fixture
def homes():
    return HomeBook(PageIds(home=0, num_instances=3, num_pages=20, page_size=4))


def grant(handle, *segments):
    return Grant(0, handle, tuple(GrantedSegment(*segment) for segment in segments))


def test_admission_growth_and_close(homes):
    request = homes.open(born=5)
    assert not request.ready
    homes.expect(request, grant(request.handle, (2, 0, 2), (0, 2, 1)))
    homes.fill(0, Granted(0, request.handle, 2, (11,)))
    assert not request.ready
    assert request.shards == (0,)
    homes.fill(2, Granted(0, request.handle, 0, (4, 11)))
    assert request.ready
    assert request.shards == (2, 0)
    assert request.page_counts == {2: 2, 0: 1} == request.granted_pages
    assert request.start_degree == 2
    request.asked_growth = request.asked_stuck = True
    homes.expect(request, grant(request.handle, (1, 3, 1)))
    assert not request.asked_growth and not request.asked_stuck and not request.ready
    homes.fill(1, Granted(0, request.handle, 3, (11,)))
    assert request.ready and request.start_degree == 2, "growth is no part of it"
    assert list(homes.local_pages()) == [11]
    remote = homes.ids.encode(Page(1, 11))
    assert homes.handle_of(remote) == request.handle
    assert homes.close(request.handle) == [11]
    assert homes.handle_of(remote) is None
    assert homes.closed_this_step(remote)
    homes.forget_closed()
    assert not homes.closed_this_step(remote)
    assert len(homes) == 0


def test_pages_of_the_prefix_cache_are_never_ours(homes):
    request = homes.open(0)
    homes.adopt(request, [Page(0, 3), Page(0, 4), Page(0, 5)], num_tree_pages=2)
    assert list(homes.local_pages()) == [5]
    assert homes.handle_of(3) is None
    assert homes.close(request.handle) == [5]


def test_page_numbers_for_a_released_handle_are_ignored(homes):
    request = homes.open(0)
    homes.expect(request, grant(request.handle, (1, 0, 1)))
    homes.close(request.handle)
    homes.fill(1, Granted(0, request.handle, 0, (4,)))
    assert homes.handle_of(homes.ids.encode(Page(1, 4))) is None


def test_handles_are_not_reused(homes):
    first = homes.open(0)
    homes.close(first.handle)
    assert homes.open(0).handle != first.handle


def test_a_grant_with_a_gap_is_refused(homes):
    request = homes.open(0)
    with pytest.raises(ValueError, match="grant starts at page 1, 0 are there"):
        homes.expect(request, grant(request.handle, (1, 1, 1)))


def test_page_numbers_arrive_once(homes):
    request = homes.open(0)
    homes.expect(request, grant(request.handle, (1, 0, 1)))
    homes.fill(1, Granted(0, request.handle, 0, (4,)))
    with pytest.raises(ValueError, match="arrived twice"):
        homes.fill(1, Granted(0, request.handle, 0, (5,)))


def test_a_page_has_one_request(homes):
    first, second = homes.open(0), homes.open(0)
    homes.append(first, Page(1, 4))
    with pytest.raises(ValueError, match="belongs to handle 1 already, not to 2"):
        homes.append(second, Page(1, 4))


def test_arrays_of_a_request_follow_its_pages(homes):
    """Pages that are still on their way are left out; those that came stay as they are."""
    request = homes.open(0)
    assert [part.tolist() for part in request.page_arrays()] == [[], []]
    homes.expect(request, grant(request.handle, (1, 0, 2), (0, 2, 1)))
    homes.fill(1, Granted(0, request.handle, 0, (4, 5)))
    assert [part.tolist() for part in request.page_arrays()] == [[1, 1], [4, 5]]
    homes.fill(0, Granted(0, request.handle, 2, (7,)))
    assert [part.tolist() for part in request.page_arrays()] == [[1, 1, 0], [4, 5, 7]]
    assert request.page_arrays()[0] is request.page_arrays()[0]
    homes.append(request, Page(0, 9))
    assert [part.tolist() for part in request.page_arrays()] == [[1, 1, 0, 0], [4, 5, 7, 9]]


class Watched(list):
    """Counts how many pages were looked at."""

    looks = 0

    def __getitem__(self, index):
        Watched.looks += 1
        return super().__getitem__(index)

    def __iter__(self):
        raise AssertionError("a report walks all pages of a request")


@pytest.mark.parametrize("seed", range(20))
def test_tokens_per_shard_are_counted_as_a_walk_over_the_pages_would(homes, seed):
    """Pages on the way count nothing; pages behind the last token hold nothing yet; the last one holds a part."""
    page_size, random = 4, Random(seed)
    request = homes.open(0)
    segments, first = [], 0
    for owner in random.sample(range(3), 3):
        segments.append((owner, first, random.randint(1, 6)))
        first += segments[-1][2]
    homes.expect(request, grant(request.handle, *segments))
    for owner, start, count in segments:
        if random.random() < 0.8:
            homes.fill(owner, Granted(0, request.handle, start, tuple(range(start + 1, start + 1 + count))))
    for num_tokens in range(first * page_size + 3):
        walked: dict[int, int] = {}
        for index, page in enumerate(request.pages):
            left = min(page_size, num_tokens - index * page_size)
            if page is not None and left > 0:
                walked[page.owner] = walked.get(page.owner, 0) + left
        assert list(request.tokens_per_shard(num_tokens, page_size).items()) == list(walked.items())


def test_a_long_request_is_described_without_a_walk():
    homes = HomeBook(PageIds(home=0, num_instances=3, num_pages=2000, page_size=4))
    request = homes.open(0)
    homes.adopt(request, [Page(0, number) for number in range(1, 1001)], num_tree_pages=0)
    request.pages = Watched(request.pages)
    assert request.tokens_per_shard(3994, 4) == {0: 3994}
    assert Watched.looks <= 2


def test_arrays_of_a_guest_follow_its_pages():
    book = GuestBook()
    book.lend(1, 7, 4, [30])
    assert [part.tolist() for part in book.arrays_of(1, 7)] == [[4], [30]]
    assert book.arrays_of(1, 7)[0] is book.arrays_of(1, 7)[0]
    book.lend(1, 7, 0, [9])
    assert [part.tolist() for part in book.arrays_of(1, 7)] == [[0, 4], [9, 30]]
    book.take_back(1, 7)
    with pytest.raises(KeyError):
        book.arrays_of(1, 7)
    book.lend(1, 7, 2, [8])
    assert [part.tolist() for part in book.arrays_of(1, 7)] == [[2], [8]]
