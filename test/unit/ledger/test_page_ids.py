"""Ids of pages as each home sees them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_dcp.ledger.page_ids import INT32_MAX, Page, PageIds


@given(st.integers(1, 8), st.integers(1, 500), st.sampled_from([2, 16, 64]), st.data())
def test_every_page_has_one_id_and_back(num_instances, num_pages, page_size, data):
    home = data.draw(st.integers(0, num_instances - 1))
    ids = PageIds(home, num_instances, num_pages, page_size)
    page = Page(data.draw(st.integers(0, num_instances - 1)), data.draw(st.integers(1, num_pages)))
    page_id = ids.encode(page)
    assert ids.decode(page_id) == page
    assert 0 < page_id < num_instances * ids.stride
    assert ids.is_local(page_id) == (page.owner == home)


def test_all_ids_of_a_home_differ():
    ids = PageIds(2, 4, 5, 16)
    pages = [Page(owner, number) for owner in range(4) for number in range(1, 6)]
    assert len({ids.encode(page) for page in pages}) == len(pages)


def test_own_pages_keep_their_physical_number():
    for home in range(3):
        assert [PageIds(home, 3, 9, 4).encode(Page(home, number)) for number in range(1, 10)] == list(range(1, 10))


@pytest.mark.parametrize("number", [0, -1, 10])
def test_a_page_outside_the_pool_is_refused(number):
    with pytest.raises(ValueError, match=rf"page {number} of instance 1 is outside 1\.\.9"):
        PageIds(0, 2, 9, 4).encode(Page(1, number))


def test_ids_beyond_int32_are_refused_by_flag():
    largest = INT32_MAX // (4 * 64) - 1
    PageIds(0, 4, largest, 64)
    with pytest.raises(ValueError, match="--max-total-tokens"):
        PageIds(0, 4, largest + 1, 64)
