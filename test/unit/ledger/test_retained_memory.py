"""What a retained page costs the processes that keep book of it, and that nothing is left of turns that are over."""

import gc
import random
import tracemalloc

import pytest

from sglang_dcp.ledger.guests import GuestBook
from sglang_dcp.ledger.page_ids import Page
from sglang_dcp.ledger.prefix_index import page_digests
from sglang_dcp.ledger.retained import RetainedTable
from sglang_dcp.ledger.retained_book import RetainedBook

MOST_BYTES_PER_PAGE = 64
NUM_PAGES = 8_192


def traced_bytes(make):
    """Bytes that are alive because of what `make` returns."""
    gc.collect()
    gc.freeze()  # what other tests have imported is not searched again
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        made = make()
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before, made
    finally:
        tracemalloc.stop()
        gc.unfreeze()


@pytest.mark.parametrize("pages_each", [16, 64, 1024], ids=["the shortest by default", "4K tokens", "64K tokens"])
def test_bookkeeping_of_a_page_on_its_home_and_on_a_shard(pages_each):
    """Half of each sequence lies at home, half on a shard; every instance keeps the table."""
    choose = random.Random(1)
    sequences = NUM_PAGES // pages_each
    half = pages_each // 2

    def at_home():
        book, table = RetainedBook(0), RetainedTable(8)
        for handle in range(1, sequences + 1):
            pages = [Page(0 if index < half else 1, choose.randrange(1 << 20)) for index in range(pages_each)]
            digests = page_digests([choose.randrange(1 << 17) for _ in range(pages_each)], 1)
            book.put(handle, pages, digests)
            table.put(0, handle, book.shards(handle, pages_each), handle)
        return book, table

    def on_a_shard():
        book, table = GuestBook(), RetainedTable(8)
        for handle in range(1, sequences + 1):
            book.lend(0, handle, half, [choose.randrange(1 << 20) for _ in range(half)])
            book.retain(0, handle, pages_each)
            table.put(0, handle, ((0, half), (1, half)), handle)
        return book, table

    home_bytes, _ = traced_bytes(at_home)
    shard_bytes, _ = traced_bytes(on_a_shard)
    assert home_bytes <= MOST_BYTES_PER_PAGE * NUM_PAGES
    assert shard_bytes <= MOST_BYTES_PER_PAGE * NUM_PAGES
