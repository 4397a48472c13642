"""Token ids of a decode step: stock's allocator counts on within pages, and only pages that managed requests begin are ours."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.allocator.paged import alloc_decode_naive

from sglang_dcp.config import DynCpConfig
from sglang_dcp.ledger.page_ids import Page
from sglang_dcp.upstream import binding as bindings
from sglang_dcp.upstream.decode import alloc_decode
from sglang_dcp.upstream.instance import Instance

PAGE_SIZE, FREE = 4, [70, 71, 72]


class Stock:
    """alloc_paged_token_slots_decode over SGLang's own arithmetic, and how many pages it took."""

    def __init__(self) -> None:
        self.pages_taken = 0

    def __call__(self, tree_cache: Any, seq_lens: Any, seq_lens_cpu: Any, last_loc: Any, token_per_req: int, rows: Any, batch: Any) -> Any:
        out = torch.empty(len(seq_lens), dtype=torch.int64)
        assert torch.equal(seq_lens, seq_lens_cpu)
        self.pages_taken = int(((seq_lens_cpu - 1) % PAGE_SIZE == 0).sum())
        alloc_decode_naive(seq_lens, last_loc, torch.tensor(FREE), out, PAGE_SIZE, self.pages_taken)
        return out


@pytest.fixture
def instance(monkeypatch: pytest.MonkeyPatch) -> Instance:
    made = Instance(DynCpConfig().resolve(2), 0, 2, 100, PAGE_SIZE, SimpleNamespace(settle_decode_claims=lambda: None))  # type: ignore[arg-type]
    monkeypatch.setattr(bindings, "_binding", bindings.Binding(None, made, None, None))  # type: ignore[arg-type]
    return made


def test_each_row_gets_the_token_id_of_its_own_book(instance: Instance) -> None:
    """A local and a managed row within a page, one of each that begins a page, and one whose new page lies elsewhere."""
    books = [None, [Page(1, 5), Page(0, 6)], None, [Page(1, 8), Page(1, 9)], [Page(0, 11), Page(1, 12)]]
    lengths = [3, 7, 9, 5, 5]
    reqs = []
    for book in books:
        req = SimpleNamespace(dyncp=None)
        if book is not None:
            req.dyncp = instance.open_request()
            instance.homes.adopt(req.dyncp, book, 0)
        reqs.append(req)
    last = [402, 0, 407, 0, 0]
    for i, req in enumerate(reqs):
        if req.dyncp is not None:
            last[i] = instance.token_id(req.dyncp, lengths[i] - 2)
    stock, given = Stock(), torch.tensor(lengths)
    got = alloc_decode(stock, None, given, given.clone(), torch.tensor(last), batch=SimpleNamespace(reqs=reqs))
    expected = [403, *(instance.token_id(reqs[1].dyncp, 6),), FREE[0] * PAGE_SIZE]
    expected += [instance.token_id(reqs[i].dyncp, lengths[i] - 1) for i in (3, 4)]
    assert got.tolist() == expected
    assert stock.pages_taken == 1, "managed requests take no page of the pool"
    assert given.tolist() == lengths, "the batch's own lengths stay"


def test_a_step_without_new_pages_of_ours_is_stock(instance: Instance) -> None:
    req = SimpleNamespace(dyncp=instance.open_request())
    instance.homes.adopt(req.dyncp, [Page(1, 5)], 0)
    lengths, batch = torch.tensor([3, 5]), SimpleNamespace(reqs=[req, SimpleNamespace(dyncp=None)])
    seen: list[Any] = []
    alloc_decode(lambda *args: seen.append(args), None, lengths, lengths, lengths, batch=batch)
    assert seen[0][1] is lengths and seen[0][2] is lengths and seen[0][-1] is batch
