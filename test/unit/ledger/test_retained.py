"""Sequences that outlive their request: the replicated table, a home's book, and the index of prefixes."""

import random

import numpy as np
import pytest

from sglang_dcp.ledger import prefix_index
from sglang_dcp.ledger.guests import GuestBook
from sglang_dcp.ledger.homes import HomeBook
from sglang_dcp.ledger.messages import AskAdmission, Granted
from sglang_dcp.ledger.page_ids import Page, PageIds
from sglang_dcp.ledger.prefix_index import DIGEST_BYTES, PrefixIndex, common_pages, page_digests
from sglang_dcp.ledger.reservations import Grant, GrantedSegment
from sglang_dcp.ledger.retained import RetainedTable
from sglang_dcp.ledger.room import Room
from sglang_dcp.policy.split_limits import Layout, SplitLimits


def table(*sequences):
    """(home, handle, pages, step)"""
    made = RetainedTable(3)
    for sequence in sorted(sequences, key=lambda sequence: sequence[3]):
        made.put(*sequence)
    return made


def test_the_table_counts_pages_where_they_lie():
    made = table((0, 1, ((0, 3), (2, 4)), 5), (2, 1, ((2, 6),), 6))
    assert made.pages == [3, 0, 10]
    digest = made.digest
    assert made.take((0, 1)).pages == ((0, 3), (2, 4))
    assert (made.pages, len(made), made.take((0, 1))) == ([0, 0, 6], 1, None)
    assert made.digest != digest
    with pytest.raises(ValueError, match="home 2, handle 1 is retained already"):
        made.put(2, 1, ((0, 1),), 9)


def test_the_longest_unused_goes_first_and_the_named_one_last():
    made = table((0, 1, ((1, 3),), 5), (0, 2, ((1, 3),), 4), (2, 1, ((1, 3),), 6), (2, 2, ((0, 9),), 1))
    assert made.choose({1: 1}) == [(0, 2)]
    assert made.choose({1: 4}) == [(0, 2), (0, 1)]
    made.name((0, 2))
    assert made.choose({1: 4}) == [(0, 1), (2, 1)]
    assert made.choose({1: 9}) == [(0, 1), (2, 1), (0, 2)]
    made.unname((0, 2))
    assert made.choose({1: 1}) == [(0, 2)]
    assert made.choose({1: 1}, spare=(0, 2)) == [(0, 1)]
    assert made.choose({}) == made.choose({1: 0, 0: -4}) == []


def test_a_choice_costs_the_same_however_many_sequences_there_are():
    """A pool full of retained sequences evicts in most steps, on all instances at once."""

    class Counted(dict):
        num_read = 0

        def __getitem__(self, key):
            self.num_read += 1
            return super().__getitem__(key)

    made = table(*((handle % 3, handle, ((handle % 3, 2),), handle) for handle in range(6_000)))
    made.name((0, 0))
    made.sequences = Counted(made.sequences)
    assert made.choose({0: 3}) == [(0, 3), (0, 6)]
    assert made.sequences.num_read < 60


def test_nothing_is_evicted_for_what_does_not_fit_anyway():
    made = table((0, 1, ((0, 3), (1, 3)), 5), (0, 2, ((1, 3),), 4))
    assert made.choose({1: 7}) is None
    assert made.choose({0: 4, 1: 1}) is None
    assert made.choose({1: 6}, spare=(0, 1)) is None


def test_what_a_later_choice_makes_unneeded_stays():
    made = table((0, 1, ((0, 1),), 1), (0, 2, ((0, 5),), 2), (0, 3, ((0, 5), (1, 2)), 3))
    assert made.choose({0: 5}) == [(0, 2)]
    assert made.choose({0: 5, 1: 1}) == [(0, 3)]


def test_digests_are_chained_and_cover_whole_pages():
    tokens = list(range(30))
    digests = page_digests(tokens, 8)
    assert len(digests) == 3 * DIGEST_BYTES
    assert page_digests(tokens[:17], 8) == digests[: 2 * DIGEST_BYTES]
    assert common_pages(page_digests([*tokens[:20], 99, *tokens[21:]], 8), digests) == 2
    assert common_pages(page_digests([99, *tokens[1:]], 8), digests) == 0
    assert common_pages(page_digests(tokens, 8, ("a", None)), page_digests(tokens, 8, (None, "a"))) == 0
    assert page_digests(tokens[:7], 8) == b""


def test_a_match_is_as_long_as_a_plain_comparison_says():
    choose = random.Random(1)
    index, sequences = PrefixIndex(), {}
    for handle in range(1, 60):
        start = choose.choice(list(sequences.values()) or [[]])
        sequences[handle] = start[: choose.randrange(1, 60)] + [choose.randrange(3) for _ in range(choose.randrange(8, 60))]
        index.put(handle, page_digests(sequences[handle], 4))
    for _ in range(200):
        prompt = choose.choice(list(sequences.values()))[: choose.randrange(60)] + [choose.randrange(3) for _ in range(12)]
        plain = {}
        for handle, tokens in sequences.items():
            same = next((i for i, (a, b) in enumerate(zip(tokens, prompt, strict=False)) if a != b), min(len(tokens), len(prompt)))
            if same // 4 >= len(tokens) // 4 / 2:
                plain[handle] = same // 4
        found = index.matches(page_digests(prompt, 4))
        assert dict(found) == plain
        assert found == sorted(found, key=lambda match: (-match[1], -match[0]))
    for handle in sequences:
        index.take(handle)
    assert not len(index) and not index._of_beginning and not index._lengths


def test_a_beginning_that_all_sequences_have_costs_no_look_at_each(monkeypatch):
    """One system prompt: every waiting request asks in every round."""
    index, looked_at = PrefixIndex(), []
    monkeypatch.setattr(prefix_index, "common_pages", lambda left, right: looked_at.append(left) or common_pages(left, right))
    for handle in range(1, 500):
        index.put(handle, page_digests([0] * 16 + [handle] * 64, 4))
    assert index.matches(page_digests([0] * 16 + [7] * 40 + [1], 4)) == [(7, 14)] and len(looked_at) == 1


@pytest.fixture
def homes():
    return HomeBook(PageIds(home=0, num_instances=3, num_pages=20, page_size=4))


def open_with(homes, *segments):
    """segments: (rank, numbers)."""
    request, first = homes.open(born=1), 0
    places = []
    for rank, numbers in segments:
        places.append((rank, first, numbers))
        first += len(numbers)
    homes.expect(request, Grant(0, request.handle, tuple(GrantedSegment(rank, at, len(numbers)) for rank, at, numbers in places)))
    for rank, at, numbers in places:
        homes.fill(rank, Granted(0, request.handle, at, tuple(numbers)))
    return request


def test_a_request_ends_and_a_later_one_takes_its_pages_over(homes):
    first = open_with(homes, (2, [4, 5, 6]), (0, [7, 8]))
    ids = [homes.ids.encode(Page(0, 7)), homes.ids.encode(Page(2, 4))]
    assert homes.retain(first.handle, page_digests(range(16), 4), 4) == [8]
    assert [homes.handle_of(page_id) for page_id in ids] == [None, None]
    assert all(homes.closed_this_step(page_id) for page_id in ids), "SGLang frees a row in two goes"
    assert (len(homes), list(homes.local_pages()), list(homes.retained.local_pages())) == (0, [], [7])
    assert not +homes.granted_pages
    assert homes.retained.shards(first.handle, 4) == ((2, 3), (0, 1))

    later = homes.open(born=9)
    assert homes.retained.matches(page_digests([*range(12), 99, 99, 99, 99], 4)) == [(first.handle, 3)]
    assert homes.take_over(later, first.handle, 3) == [7]
    assert (later.pages, later.num_kept) == ([Page(2, 4), Page(2, 5), Page(2, 6)], 3)
    homes.expect(later, Grant(0, later.handle, (GrantedSegment(0, 3, 2),)))
    homes.fill(0, Granted(0, later.handle, 3, (9, 10)))
    assert later.ready and later.start_degree == 2
    assert (later.page_counts, dict(homes.granted_pages)) == ({2: 3, 0: 2}, {2: 3, 0: 2})
    assert homes.handle_of(ids[1]) == later.handle
    assert not len(homes.retained)


def test_a_named_sequence_is_not_offered_twice(homes):
    first = open_with(homes, (0, [7, 8]))
    homes.retain(first.handle, page_digests(range(8), 4), 2)
    waiting = homes.open(born=2)
    waiting.previous = first.handle
    homes.retained.name(first.handle, waiting.handle, takes=True)
    assert homes.retained.matches(page_digests(range(8), 4)) == []
    homes.close(waiting.handle)
    assert homes.retained.matches(page_digests(range(8), 4)) == [(first.handle, 2)]


def test_pages_that_are_not_all_there_or_not_ours_are_not_retained(homes):
    request = homes.open(born=1)
    homes.expect(request, Grant(0, request.handle, (GrantedSegment(2, 0, 2),)))
    with pytest.raises(ValueError, match="cannot keep 1 pages"):
        homes.retain(request.handle, page_digests(range(4), 4), 1)
    adopted = homes.open(born=1)
    homes.adopt(adopted, [Page(0, 3), Page(0, 4)], num_tree_pages=1)
    with pytest.raises(ValueError, match="cannot keep 2 pages"):
        homes.retain(adopted.handle, page_digests(range(8), 4), 2)


def test_a_shard_keeps_and_rekeys_a_guests_pages():
    guests = GuestBook()
    guests.lend(1, 7, 0, [4, 5, 6])
    guests.lend(1, 7, 9, [8])
    assert guests.retain(1, 7, 2) == [6, 8]
    assert (len(guests), guests.num_pages, guests.num_retained) == (0, 2, 2)
    assert (list(guests.all_pages()), sorted(guests.all_retained_pages())) == ([], [4, 5])
    assert guests.take_over(1, 7, 9, 1) == [5]
    assert (list(guests.pages_of(1, 9)), guests.num_pages, guests.num_retained) == ([(0, 4)], 1, 0)
    assert np.array_equal(guests.arrays_of(1, 9)[1], [4])
    assert guests.retain(1, 9, 1) == [] and guests.take_back(1, 9) == [4]
    assert (guests.num_pages, guests.num_retained, guests.retained_handles()) == (0, 0, ())
    assert guests.retain(1, 10, 5) == guests.take_over(1, 10, 11, 5) == []


def test_what_is_missing_may_lie_wherever_the_whole_sequence_may():
    """Two nodes of two. The sequence fills the home's; what is behind it fits neither that nor the instance that was asked."""
    limits = SplitLimits(100, 4, 100, Layout(4, 2, crosses=True))
    room = Room(limits, [5, 5, 0, 60], [100] * 4)
    ask = AskAdmission(2, 1, True, ((2, 30),), previous=1, kept=((0, 95), (1, 95)))
    split = room.split(0, ask)
    assert split is not None and sum(pages for _, pages in split) == 30 and dict(split)[3] >= 20


def test_what_is_taken_over_counts_as_guests_pages():
    """--dyncp-max-guest-fraction: 5 of the 8 pages that instance 2 may lend are lent, another 4 lie in a sequence that nobody runs."""
    limits, ask = SplitLimits(16, 3, 8, Layout(3, 3)), AskAdmission(2, 1, True, ((2, 1), (0, 1)), previous=1, kept=((2, 4),))
    assert Room(limits, [9, 9, 7], [8, 8, 3]).split(0, ask) is None
    assert Room(limits, [9, 9, 7], [8, 8, 4]).split(0, ask) == ((0, 2),)
    room = Room(limits, [9, 9, 7], [8, 8, 6])
    assert room.split(0, ask) == ask.segments
    room.take(0, ask.segments, ask.kept)
    assert (room.free, room.guests) == ([8, 9, 6], [8, 8, 1])
