"""Token ids of a decode step: stock allocates every step but those in which a managed request begins a page."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_dcp.config import DynCpConfig
from sglang_dcp.ledger.messages import RowColumns
from sglang_dcp.ledger.page_ids import Page
from sglang_dcp.ledger.participant import Participant, ProtocolError
from sglang_dcp.ledger.positions import token_id, token_ids
from sglang_dcp.ledger.reservations import Grant, GrantedSegment
from sglang_dcp.upstream.disaggregation.preallocation import allocate
from sglang_dcp.upstream.pool.kv_pool import PAGES_AHEAD, LedgerAllocator
from sglang_dcp.upstream.step import attached
from sglang_dcp.upstream.step.driver import StepDriver
from sglang_dcp.upstream.step.handlers import alloc_decode
from sglang_dcp.upstream.step.runtime import Runtime, cluster_of

PAGE_SIZE, NUM_PAGES = 4, 100
ROOMY = 2 * PAGES_AHEAD
NO_CACHE = SimpleNamespace(supports_prefix_sharing=lambda: False, evictable_size=lambda: 0)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    pool = LedgerAllocator(NUM_PAGES * PAGE_SIZE, PAGE_SIZE, torch.bfloat16, "cpu", None, False)
    config = DynCpConfig().resolve(2)
    participant = Participant(cluster_of(config, 2, NUM_PAGES, PAGE_SIZE), 0, pool)
    pool.bind(participant, NO_CACHE)
    made = Runtime(None, config, participant, pool, None, None)  # type: ignore[arg-type]
    StepDriver(made)
    monkeypatch.setattr(attached, "_runtime", made)
    return made


def make_requests(runtime: Runtime, books: list[list[Page] | None], lengths: list[int]) -> list[Any]:
    """lengths: with the new token, which is not counted yet."""
    reqs = []
    for book, length in zip(books, lengths, strict=True):
        req = SimpleNamespace(dyncp=None, kv=SimpleNamespace(kv_allocated_len=length - 1))
        if book is not None:
            req.dyncp = runtime.participant.open_request()
            runtime.participant.homes.adopt(req.dyncp, book, 0)
        reqs.append(req)
    return reqs


def stock_alloc(runtime: Runtime) -> Any:
    """alloc_paged_token_slots_decode down to SGLang's allocator."""
    return lambda tree, lengths, lengths_cpu, last_loc, *rest: runtime.pool.alloc_decode(lengths, lengths_cpu, last_loc)


@pytest.mark.parametrize("staged", [False, True])
def test_each_row_gets_the_token_id_of_its_own_book(runtime: Runtime, staged: bool) -> None:
    """A local and a managed row within a page, two local and two managed ones that begin a page, here or elsewhere. staged: freed pages
    that SGLang has not sorted in again are taken too."""
    pool = runtime.pool
    if staged:
        pool.need_sort = True
        pool.free_page_ids(pool.free_pages[1:].clone())
        pool.free_pages = pool.free_pages[:1]
    free = sorted(pool.get_all_free_pages().tolist())
    books = [None, [Page(1, 5), Page(0, 96)], None, [Page(1, 8), Page(1, 9)], [Page(0, 91), Page(1, 12)], None]
    lengths = [3, 7, 9, 5, 5, 5]
    reqs = make_requests(runtime, books, lengths)
    last = [402, 0, 407, 0, 0, 399]
    for i, req in enumerate(reqs):
        if req.dyncp is not None:
            last[i] = token_id(runtime.participant.ids, req.dyncp, lengths[i] - 2)
    given = torch.tensor(lengths)
    got = alloc_decode(
        stock_alloc(runtime), None, given, given.clone(), torch.tensor(last, dtype=torch.int32), batch=SimpleNamespace(reqs=reqs)
    )
    expected = [403, token_id(runtime.participant.ids, reqs[1].dyncp, 6), free[0] * PAGE_SIZE]
    expected += [token_id(runtime.participant.ids, reqs[i].dyncp, lengths[i] - 1) for i in (3, 4)]
    assert got.tolist() == [*expected, free[1] * PAGE_SIZE] and got.dtype == torch.int64
    assert sorted(pool.get_all_free_pages().tolist()) == free[2:], "managed requests take no page of the pool"
    assert given.tolist() == lengths, "the batch's own lengths stay"


def test_a_step_without_new_pages_of_ours_is_stock(runtime: Runtime) -> None:
    reqs = make_requests(runtime, [[Page(1, 5)], None], [3, 5])
    lengths, batch, seen = torch.tensor([3, 5]), SimpleNamespace(reqs=reqs), []
    alloc_decode(lambda *args: seen.append(args), None, lengths, lengths, lengths, batch=batch)
    assert seen[0][1] is lengths and seen[0][2] is lengths and seen[0][-1] is batch


def test_a_pool_without_the_pages_is_an_error_that_says_so(runtime: Runtime) -> None:
    """`claim_decode_page` has made sure of them, so this is a defect of ours."""
    assert runtime.pool.take_pages(NUM_PAGES - 1) is not None
    reqs = make_requests(runtime, [None, None, [Page(1, 8), Page(1, 9)]], [5, 9, 5])
    lengths = torch.tensor([5, 9, 5])
    with pytest.raises(RuntimeError, match="needs 2 pages, 1 can be had"):
        alloc_decode(stock_alloc(runtime), None, lengths, lengths, lengths, batch=SimpleNamespace(reqs=reqs))


def test_pages_are_read_ahead_where_the_pool_has_room(runtime: Runtime) -> None:
    """They stay free pages to everybody: counted, listed, and given out when nothing else is left; each once."""
    pool, taken = runtime.pool, []
    while pool.num_givable_pages():
        before = pool.available_size()
        found = pool.take_pages(1)
        assert found is not None and pool.available_size() == before - PAGE_SIZE
        taken += found
        left = pool.get_all_free_pages().tolist()
        assert len(left) * PAGE_SIZE == pool.available_size() and sorted(taken + left) == list(range(1, NUM_PAGES + 1))
    assert pool.take_pages(1) is None


def test_pages_read_ahead_come_back_when_free_ones_are_short(runtime: Runtime) -> None:
    pool = runtime.pool
    assert pool.take_pages(1) is not None and len(pool.free_pages) == NUM_PAGES - PAGES_AHEAD
    assert pool.alloc((NUM_PAGES - 1) * PAGE_SIZE) is not None, "stock's allocation gets every free page"
    assert pool.available_size() == 0 and pool.take_pages(1) is None
    pool.clear()
    assert pool.take_pages(3) is not None
    pool.clear()
    assert pool.available_size() == NUM_PAGES * PAGE_SIZE and sorted(pool.get_all_free_pages().tolist()) == list(range(1, NUM_PAGES + 1))


def test_free_pages_are_counted_as_stock_counts_them(runtime: Runtime) -> None:
    """Through whatever SGLang does with them, freed pages that it has not sorted in among it."""
    pool = runtime.pool
    pool.need_sort = True
    for change in (
        lambda: pool.alloc(5 * PAGE_SIZE),
        lambda: pool.take_pages(1),
        lambda: pool.free_page_ids(torch.tensor([1, 2])),
        lambda: pool.alloc_decode(torch.tensor([5]), torch.tensor([5]), torch.tensor([3])),
        lambda: pool.merge_and_sort_free(),
        lambda: pool.clear(),
    ):
        change()
        stock = super(LedgerAllocator, pool).available_size() // PAGE_SIZE
        assert pool.num_givable_pages() == stock + len(pool._ahead) == len(pool.get_all_free_pages())
        assert pool.has_free(len(pool.free_pages)) and not pool.has_free(len(pool.free_pages) + 1)


def test_claimed_pages_are_left_to_stock(runtime: Runtime) -> None:
    pool = runtime.pool
    assert pool.take_pages(NUM_PAGES - ROOMY) is not None
    assert all(pool.claim_decode_page() for _ in range(ROOMY - 1))
    assert pool.take_pages(2) is None and len(pool.take_pages(1) or ()) == 1 and pool.take_pages(1) is None


def test_pages_that_are_kept_are_nobody_s_while_a_step_is_secured(runtime: Runtime) -> None:
    pool = runtime.pool
    assert pool.take_pages(NUM_PAGES - 4) is not None
    pool.keep_free(3)
    assert pool.claim_decode_page() and not pool.claim_decode_page() and pool.take_pages(1) is None
    pool.settle_decode_claims()
    assert len(pool.take_pages(4) or ()) == 4


def test_a_grant_that_the_pool_cannot_give_tells_what_was_said_and_what_is_there(runtime: Runtime) -> None:
    """A page set aside for nobody is counted as free: the others' books would go apart, so the instance ends."""
    participant, pool = runtime.participant, runtime.pool
    assert pool.take_pages(NUM_PAGES - 3) is not None and pool.claim_decode_page()
    participant.build_columns(RowColumns.of([]), pool.num_givable_pages(), 0, 0)
    with pytest.raises(ProtocolError, match=r"rank 0, step 0: 3 pages were granted and cannot be had; 3 were told, 3 are free"):
        participant._apply_grant(Grant(1, 1, (GrantedSegment(0, 0, 3),)))


def test_a_page_that_is_given_and_given_back_between_two_steps_is_free(runtime: Runtime) -> None:
    """A decode server gives a local request the pages of one that has just ended; its prefill server is gone, and it ends as well."""
    pool = runtime.pool
    free = pool.available_size()
    (ended,) = make_requests(runtime, [[Page(0, number) for number in pool.take_pages(2) or ()]], [8])
    pool.free_segments([(torch.from_numpy(token_ids(runtime.participant.ids, ended.dyncp, 0, 4)), 0)])
    pool.free_segments([(torch.from_numpy(token_ids(runtime.participant.ids, ended.dyncp, 4, 8)), 4)])
    assert pool.available_size() == free and not len(runtime.participant.homes)
    given = allocate(lambda queue, allocator, **_: allocator.alloc(8), None, pool, req=SimpleNamespace(dyncp=None), fill_len=8)
    assert set((given // PAGE_SIZE).tolist()) == {page.number for page in ended.dyncp.pages}
    pool.free_segments([(given, 0)])
    assert pool.available_size() == free
