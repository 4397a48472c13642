"""A request whose next tail page must come from elsewhere asks for it in time: it decodes on over the page's end."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from sglang_dcp.config import DynCpConfig
from sglang_dcp.ledger.page_ids import Page
from sglang_dcp.ledger.participant import Participant
from sglang_dcp.upstream.step.own_batch import GROW_AHEAD_TOKENS, OwnBatch
from sglang_dcp.upstream.step.runtime import cluster_of
from testing.protocol.fakes import FakePool, ModelRequest
from testing.protocol.model import ProtocolModel


def sat_out(model: ProtocolModel, *reqs: ModelRequest) -> int:
    """Steps that these requests of the first home sit out between their first tokens and their last ones."""
    waited = 0
    while not all(req.finished() for req in reqs):
        model.step()
        waited += sum(bool(req.output_ids) and req in model.homes[0].runtime.queues.parked for req in reqs)
        assert model.num_steps < 2_000
    return waited


def pages_to_grow(req: ModelRequest, page_size: int) -> int:
    """Beyond those that it is admitted with. The last token's K/V is never written."""
    prompt = len(req.origin_input_ids)
    return max(0, -(-(prompt + req.max_new_tokens - 1) // page_size) - (-(-prompt // page_size) + 1))


@pytest.mark.parametrize("page_size", [2, 4, 8, 9, 16, 64])
@pytest.mark.parametrize("shards", [(1,), (1, 2)])
def test_a_degree_used_up_without_the_home_stalls_at_no_page_end(page_size: int, shards: tuple[int, ...]) -> None:
    """However much room the home has. Local requests of the batch begin pages beside it, and one of its kind joins half a page later."""
    model = ProtocolModel(1, 3, 60, page_size, max_degree=len(shards), chunk_tokens=8 * page_size)
    reqs = [model.arrive(0, 5 * page_size - 1, 5 * page_size, shards), *(model.arrive(0, 3 + i, 4 * page_size) for i in range(3))]
    for _ in range(page_size // 2 + 2):
        model.step()
    assert all(req.output_ids for req in reqs)
    reqs.append(model.arrive(0, 5 * page_size + 1, 5 * page_size, shards))
    assert sat_out(model, *reqs) == 0
    assert model.num_growths[0] == sum(pages_to_grow(req, page_size) for req in reqs if req.dyncp_placement) > 4


def test_a_batch_that_has_changed_is_looked_at_anew() -> None:
    """Others join while requests come near their page's end: in such a step the batch is not the last one, one token on."""
    model, reqs = ProtocolModel(1, 2, 200, 16, max_degree=1, chunk_tokens=200), []
    for prompt in range(33, 50):
        reqs.append(model.arrive(0, prompt, 40, (1,)))
        for _ in range(3):
            model.step()
    assert sat_out(model, *reqs) == 0 < model.num_growths[0]


def test_a_degree_that_growth_used_up_counts_from_then_on() -> None:
    """The pools of the home and of its only shard are full when it asks, so the page comes from a second shard; then the home has room
    again, and must not give any. The hoarded pages are nobody's meanwhile."""
    model = ProtocolModel(1, 3, 40, 16, max_degree=2, chunk_tokens=200, check_every=10_000)
    req, home = model.arrive(0, 40, 100, (1,)), model.homes[0]
    while len(req.output_ids) < 8:  # its batch is looked at as one that may grow at home
        model.step()
    hoards = [(pool, pool.take_pages(pool.num_givable_pages()) or []) for pool in (home.pool, model.homes[1].pool)]
    while req.dyncp.ready:
        model.step()
    for pool, pages in hoards:
        pool.return_pages(pages)
    assert home.participant.may_grow_at_home(req.dyncp)
    assert sat_out(model, req) == 0 and not home.participant.may_grow_at_home(req.dyncp)
    assert model.num_growths[0] == pages_to_grow(req, 16) > 3


def test_no_page_is_asked_for_that_the_output_does_not_reach() -> None:
    """Outputs that end before a page's end, with it and behind it."""
    for output in range(14, 50):
        model = ProtocolModel(1, 2, 40, 16, max_degree=1, chunk_tokens=200)
        req = model.arrive(0, 32, output, (1,))
        assert sat_out(model, req) == 0
        assert model.num_growths[0] == pages_to_grow(req, 16)
    assert model.num_growths[0] == 2


def test_steps_between_stay_quiet() -> None:
    """Once per page such a request is looked at ahead of the page's end; one that may grow at home is not."""
    config, unread = DynCpConfig(max_degree=1).resolve(2), cast(Any, None)
    for owner, wanted in ((1, [0, GROW_AHEAD_TOKENS]), (0, [0])):
        participant = Participant(cluster_of(config, 2, 500, 64), 0, FakePool(500))  # type: ignore[arg-type]
        batch, req = OwnBatch(participant), SimpleNamespace(dyncp=participant.homes.open(0), kv=SimpleNamespace(kv_allocated_len=0))
        participant.homes.adopt(req.dyncp, [Page(owner, number) for number in range(1, 5)], 0)
        found = []
        for length in range(65, 65 + 64):
            req.kv.kv_allocated_len = length
            batch.take_decode([req], torch.tensor([length]))
            looked = bool(batch.to_secure([req], unread, home_is_full=False))
            assert looked != batch.is_quiet([req])
            if looked:
                found.append(-length % 64)
        assert sorted(found) == wanted
