"""Each way in which a page can lose its one owner is named."""

import pytest

from sglang_dcp.ledger.guests import GuestBook
from sglang_dcp.ledger.homes import HomeBook
from sglang_dcp.ledger.integrity import IntegrityError, check_cluster, check_instance
from sglang_dcp.ledger.page_ids import Page, PageIds


def test_a_whole_pool_passes():
    check_instance(4, {"free": [1, 4], "guest": iter([2]), "managed": [3]})
    check_instance(4, {"free": [1]}, complete=False)


@pytest.mark.parametrize(
    ("owners", "text"),
    [
        ({"free": [1, 2, 3, 4], "guest": [2]}, "page 2 belongs to free and to guest"),
        ({"free": [1, 2, 2, 3, 4]}, "page 2 belongs to free and to free"),
        ({"free": [1, 2], "guest": [3]}, r"1 pages have no owner, first \[4\]"),
        ({"free": [0, 1, 2, 3, 4]}, r"free holds page 0, outside 1\.\.4"),
        ({"free": [1, 2, 3, 4, 5]}, r"free holds page 5, outside 1\.\.4"),
    ],
)
def test_instance_errors(owners, text):
    with pytest.raises(IntegrityError, match=text):
        check_instance(4, owners)


def test_a_double_owner_is_found_in_an_incomplete_list_too():
    with pytest.raises(IntegrityError, match="belongs to a and to b"):
        check_instance(4, {"a": [1], "b": [1]}, complete=False)


def cluster():
    homes = {rank: HomeBook(PageIds(rank, 2, 9, 4)) for rank in range(2)}
    guests = {rank: GuestBook() for rank in range(2)}
    request = homes[0].open(0)
    for page in (Page(1, 5), Page(0, 5), Page(1, 6)):
        homes[0].append(request, page)
    guests[1].lend(0, request.handle, 0, [5])
    guests[1].lend(0, request.handle, 2, [6])
    return homes, guests, request


def test_books_that_agree_pass():
    homes, guests, _ = cluster()
    check_cluster(homes, guests)


def test_a_page_that_the_home_does_not_know():
    homes, guests, request = cluster()
    guests[1].lend(0, request.handle, 3, [7])
    with pytest.raises(IntegrityError, match=r"home 0, handle 1: believes .* on 1, which lent .*\(3, 7\)"):
        check_cluster(homes, guests)


def test_a_page_that_the_shard_never_lent():
    homes, guests, request = cluster()
    guests[1].take_back(0, request.handle)
    with pytest.raises(IntegrityError, match=r"which lent \[\]"):
        check_cluster(homes, guests)


def test_a_page_of_another_number():
    homes, guests, request = cluster()
    homes[0].requests[request.handle].pages[0] = Page(1, 8)
    with pytest.raises(IntegrityError, match=r"believes \[\(0, 8\)"):
        check_cluster(homes, guests)


def test_a_guest_whose_home_forgot_it():
    homes, guests, request = cluster()
    homes[0].close(request.handle)
    with pytest.raises(IntegrityError, match="instance 1 hosts handle 1 of home 0, which does not know it"):
        check_cluster(homes, guests)
