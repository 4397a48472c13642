"""SGLang's own preallocation queue of a decode server, with the ledger's requests in it: who begins, who waits, whom nobody waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.disaggregation.base import KVPoll

from sglang_dcp.config import DynCpConfig
from sglang_dcp.ledger.participant import Participant
from sglang_dcp.ledger.prefix_index import page_digests
from sglang_dcp.policy.types import Placement
from sglang_dcp.upstream.disaggregation import preallocation
from sglang_dcp.upstream.step import attached, retention
from sglang_dcp.upstream.step.admission import sweep_waiting
from sglang_dcp.upstream.step.elsewhere import PATIENCE_STEPS, ask_elsewhere
from sglang_dcp.upstream.step.queued import num_rows_in_use, with_pages, without_pages
from sglang_dcp.upstream.step.runtime import Runtime, cluster_of
from testing.protocol.decode_queue import PreallocationQueue, stand_beside_prefill_servers, without_devices
from testing.protocol.fakes import FakePool, ModelKv

PAGE, PAGES, RESERVED = 16, 20, 64


class Request:
    """SGLang's request, as far as the queue looks at it."""

    lora_id = bootstrap_room = cache_salt = dyncp_extra_key = None
    input_embeds = positional_embed_overrides = multimodal_inputs = session = None
    pd_rebootstrap_in_progress = False
    prefix_len = 0

    def __init__(self, rid: str, prompt: int, placement: Placement | None, new: int = 200, *, flexible: bool = True) -> None:
        self.rid, self.origin_input_ids, self.output_ids = rid, [1] * prompt, []
        self.dyncp, self.dyncp_placement, self.dyncp_placement_flexible = None, placement, flexible
        self.dyncp_prefix_pages, self.extra_key = 0, None
        self.sampling_params = SimpleNamespace(max_new_tokens=new)
        self.finished_reason, self.kv, self.return_logprob = None, ModelKv(0), False
        self.time_stats = SimpleNamespace(set_bootstrap_done_time=lambda: None)

    def finished(self) -> bool:
        return self.finished_reason is not None

    def _compute_max_prefix_len(self, num_tokens: int) -> int:
        return num_tokens - 1


class Cluster:
    """Home 0 of two instances in lock step; the other has no requests of its own."""

    def __init__(self, rows: int = 50, **config: Any) -> None:
        settings = DynCpConfig(**config).resolve(2)
        self.pools = [FakePool(PAGES) for _ in range(2)]
        cluster = cluster_of(settings, 2, PAGES, PAGE)
        self.participants = [Participant(cluster, rank, pool) for rank, pool in enumerate(self.pools)]
        self.scheduler = SimpleNamespace(running_batch=SimpleNamespace(reqs=[], batch_is_full=False), waiting_queue=[])
        stand_beside_prefill_servers(self.scheduler)
        self.runtime = Runtime(self.scheduler, settings, self.participants[0], self.pools[0], None, None)  # type: ignore[arg-type]
        self.queue = self.scheduler.disagg_decode_prealloc_queue = PreallocationQueue(
            self.scheduler, self.pools[0], PAGE, rows, RESERVED, 2 * PAGES * PAGE
        )

    def arrive(self, req: Request) -> Request:
        self.queue.add(req)
        return req

    def step(self) -> list[str]:
        begun = self.queue.pop()
        self.settle()
        return begun

    def settle(self) -> None:
        """The rest of a step, once those whose pages are there have begun."""
        sweep_waiting(self.runtime)
        ask_elsewhere(self.runtime)
        columns = [one.build_columns(None, pool.num_givable_pages(), 0, 0) for one, pool in zip(self.participants, self.pools, strict=True)]
        most = [one.read_columns(columns) for one in self.participants]
        words = [one.own_words for one in self.participants] if max(most) else None
        assert len({repr(one.finish_step(words, True)) for one in self.participants}) == 1

    def run(self, steps: int) -> list[str]:
        return [rid for _ in range(steps) for rid in self.step()]


@pytest.fixture
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    made = Cluster(**getattr(request, "param", {}))
    without_devices(monkeypatch)
    monkeypatch.setattr(attached, "_runtime", made.runtime)
    yield made


def local(rid: str, prompt: int, **more: Any) -> Request:
    return Request(rid, prompt, Placement(0, (0,), (prompt,)), **more)


def sharded(rid: str, prompt: int, **more: Any) -> Request:
    return Request(rid, prompt, Placement(0, (1, 0), (prompt // 2, prompt - prompt // 2)), **more)


def test_a_sharded_request_begins_when_its_pages_are_there(cluster: Cluster) -> None:
    long = cluster.arrive(sharded("long", 30 * PAGE))
    assert cluster.run(1) == [] and cluster.queue.queue and not long.dyncp.ready
    assert cluster.run(3) == ["long"]
    assert long.dyncp.shards == (1, 0) and long.kv.kv_allocated_len == 30 * PAGE
    assert not cluster.queue.queue and not cluster.runtime.queues.waiting
    assert [entry.req for entry in cluster.scheduler.disagg_decode_transfer_queue.queue] == [long]


def test_a_request_that_ends_as_soon_as_it_begins_gives_its_pages_back_once(cluster: Cluster) -> None:
    """A single token, or an abort: it takes its row and leaves it between two looks at who waits for pages."""
    req = cluster.arrive(sharded("single", 30 * PAGE))
    while not cluster.queue.pop():
        cluster.settle()
    retention.end_request(cluster.runtime, req.dyncp)
    req.kv.kv_allocated_len = 0
    assert not cluster.runtime.queues.waiting
    cluster.settle()
    cluster.settle()
    assert [pool.num_givable_pages() for pool in cluster.pools] == [PAGES, PAGES]


RETAINING = pytest.mark.parametrize("cluster", [{"cache_fraction": 1.0, "cache_min_tokens": PAGE}], indirect=True, ids=["retaining"])


def leave_behind(cluster: Cluster, placed: Callable[..., Request], pages: int) -> Request:
    """A request of so many whole pages has run and ended by itself."""
    first = cluster.arrive(placed("first", pages * PAGE))
    assert cluster.run(5) == ["first"]
    cluster.scheduler.disagg_decode_transfer_queue.queue.clear()
    tokens, digests = first.origin_input_ids, page_digests([1] * pages * PAGE, PAGE, (None, None))
    assert len(tokens) == pages * PAGE
    cluster.participants[0].finish(first.dyncp, digests, pages)
    first.dyncp = None
    cluster.run(2)
    return first


@RETAINING
@pytest.mark.parametrize("later", ["sharded", "local"])
def test_a_later_turn_is_sent_what_lies_behind_the_earlier_one(cluster: Cluster, later: str) -> None:
    """Wherever the router would have it: the prefill server is told how many tokens are here."""
    leave_behind(cluster, sharded, 12)
    cluster.arrive({"sharded": sharded, "local": local}[later]("second", 14 * PAGE + 3))
    assert cluster.run(5) == ["second"]
    assert cluster.queue.told == {"first": (12 * PAGE, 0), "second": (2 * PAGE + 3, 12 * PAGE)}
    (entry,) = cluster.scheduler.disagg_decode_transfer_queue.queue
    assert entry.req.prefix_len == 0 and entry.req.kv.kv_allocated_len == 14 * PAGE + 3
    preallocation.begin_behind_prefix(SimpleNamespace(reqs=[entry.req, local("unmanaged", PAGE)]))
    assert entry.req.prefix_len == 12 * PAGE, "what SGLang reports as cached"
    assert entry.req.dyncp.shards == (1, 0), "the pages that it has taken over stay where they are"


@RETAINING
def test_a_request_without_a_placement_is_served_from_its_own_pool(cluster: Cluster) -> None:
    """The router had a fault: whatever is retained of its prompt, nothing says where it may lie."""
    leave_behind(cluster, sharded, 12)
    unplaced = cluster.arrive(Request("unplaced", 9 * PAGE, None))
    assert cluster.run(2) == ["unplaced"] and unplaced.dyncp is None


@RETAINING
def test_what_a_request_reads_of_another_is_not_its_own_to_free(cluster: Cluster) -> None:
    """SGLang asks its tree once more when the K/V has come, and would then free the row from its beginning."""
    first = cluster.arrive(sharded("first", 12 * PAGE + 1))
    assert cluster.run(5) == ["first"]
    cluster.scheduler.running_batch.reqs.append(first)
    cluster.arrive(sharded("second", 14 * PAGE))
    assert cluster.run(5) == ["second"]
    second = next(entry.req for entry in cluster.scheduler.disagg_decode_transfer_queue.queue if entry.req.rid == "second")
    assert second.dyncp.num_borrowed == 12 and second.kv.cache_protected_len == first.kv.cache_protected_len == 12 * PAGE
    second.kv.cache_protected_len = 0
    preallocation.begin_behind_prefix(SimpleNamespace(reqs=[second]))
    assert second.prefix_len == second.kv.cache_protected_len == 12 * PAGE


@RETAINING
def test_what_is_prefilled_again_is_sent_whole(cluster: Cluster) -> None:
    leave_behind(cluster, sharded, 12)
    cluster.arrive(sharded("second", 14 * PAGE))
    cluster.queue.queue[-1].is_rebootstrap = True
    assert cluster.run(5) == ["second"]
    assert cluster.queue.told["second"] == (14 * PAGE, 0)


@RETAINING
def test_a_request_that_ends_before_its_transfer_leaves_the_earlier_turn_as_it_was(cluster: Cluster) -> None:
    leave_behind(cluster, sharded, 12)
    second = cluster.arrive(sharded("second", 14 * PAGE))
    cluster.step()
    second.finished_reason = "abort"
    cluster.queue.queue.clear()
    cluster.run(4)
    assert second.dyncp is None and cluster.participants[0].table.retained.pages == cluster.participants[1].table.retained.pages
    assert sum(cluster.participants[0].table.retained.pages) == 12
    assert not cluster.runtime.queues.waiting


def test_nobody_waits_behind_it(cluster: Cluster) -> None:
    cluster.arrive(sharded("long", 30 * PAGE))
    cluster.arrive(local("short", PAGE, new=4))
    assert cluster.run(1) == ["short"]


def test_a_local_request_leaves_what_is_promised(cluster: Cluster) -> None:
    """Else short ones would come for ever, and the long one that is first never."""
    assert cluster.arrive(local("filler", 10 * PAGE)) and cluster.run(1) == ["filler"]
    cluster.arrive(sharded("long", 34 * PAGE, flexible=False))
    cluster.run(2)
    assert cluster.participants[0].promised[0] >= cluster.pools[0].num_givable_pages() == 10
    cluster.arrive(local("later", 2 * PAGE, new=2, flexible=False))
    assert cluster.run(4) == []


def test_a_local_request_that_fits_its_pool_is_not_asked_for_more_than_the_pool(cluster: Cluster) -> None:
    """SGLang would keep room for all of its output, and the whole queue would wait for ever."""
    cluster.arrive(local("alone", (PAGES - 1) * PAGE, new=4000))
    assert cluster.run(1) == ["alone"]


def test_a_local_request_that_finds_no_room_is_asked_for_elsewhere(cluster: Cluster) -> None:
    cluster.arrive(local("filler", 18 * PAGE))
    req = cluster.arrive(local("blocked", 5 * PAGE))
    behind = cluster.arrive(local("behind", PAGE))
    assert cluster.run(1) == ["filler"] and cluster.runtime.queues.blocked is req
    assert cluster.run(PATIENCE_STEPS + 5)[0] == "blocked"
    assert req.dyncp.shards[0] == 1 and req.skip_radix_cache_insert  # type: ignore[attr-defined]
    assert cluster.runtime.queues.blocked in (None, behind)


def test_a_local_request_that_found_no_room_begins_when_there_is_some(cluster: Cluster) -> None:
    cluster.arrive(local("filler", 18 * PAGE))
    req = cluster.arrive(local("pinned", 5 * PAGE, flexible=False))
    assert cluster.run(2) == ["filler"] and cluster.runtime.queues.blocked is req
    cluster.pools[0].return_pages([page for page in range(1, PAGES + 1) if page not in cluster.pools[0].free])
    cluster.scheduler.disagg_decode_transfer_queue.queue.clear()
    assert cluster.run(1) == ["pinned"]
    assert cluster.runtime.queues.blocked is None and req.dyncp_blocked_since is None  # type: ignore[attr-defined]


def test_an_abort_while_it_waits_gives_everything_back(cluster: Cluster) -> None:
    """Before its grant, and with its pages in hand but no row to begin with."""
    asking = cluster.arrive(sharded("asking", 30 * PAGE))
    cluster.run(1)
    abort(cluster, asking)
    assert cluster.run(3) == [] and asking.dyncp is None
    granted = cluster.arrive(sharded("granted", 30 * PAGE))
    cluster.queue.req_to_token_pool.available_size = lambda: 0
    cluster.run(4)
    assert granted.dyncp.ready and cluster.pools[1].num_givable_pages() < PAGES
    abort(cluster, granted)
    cluster.run(3)
    assert [pool.num_givable_pages() for pool in cluster.pools] == [PAGES, PAGES]
    assert not cluster.queue.queue and not any(one.busy() for one in cluster.participants)


def abort(cluster: Cluster, req: Request) -> None:
    next(entry for entry in cluster.queue.queue if entry.req is req).kv_receiver.state = KVPoll.Failed


def test_without_a_row_everybody_waits_and_nobody_is_sent_elsewhere(cluster: Cluster) -> None:
    cluster.queue.req_to_token_pool.available_size = lambda: 0
    cluster.arrive(local("a", PAGE))
    cluster.arrive(sharded("b", 4 * PAGE))
    assert cluster.run(PATIENCE_STEPS + 4) == [] and cluster.runtime.queues.blocked is None
    cluster.queue.req_to_token_pool.available_size = lambda: 9
    assert sorted(cluster.run(1)) == ["a", "b"]


def test_where_requests_are_found(cluster: Cluster) -> None:
    transfers, scheduler = cluster.scheduler.disagg_decode_transfer_queue, cluster.scheduler
    waiting, moving, held, arrived = (local(name, PAGE) for name in "abcd")
    cluster.arrive(waiting)
    transfers.queue, transfers._deferred_releases = [SimpleNamespace(req=moving)], [(SimpleNamespace(req=held), 0.0, 0.0, 0, 1)]
    scheduler.waiting_queue = [arrived]
    assert list(without_pages(scheduler)) == [waiting] and with_pages(scheduler) == [moving, held, arrived]
    plain = SimpleNamespace(waiting_queue=[arrived], disagg_decode_prealloc_queue=None)
    assert list(without_pages(plain)) == [arrived] and with_pages(plain) == []
    rows = SimpleNamespace(size=8, pre_alloc_size=16, available_size=lambda: 21)
    assert num_rows_in_use(rows) == 3 and num_rows_in_use(SimpleNamespace(size=8, available_size=lambda: 6)) == 2


def test_a_request_without_its_kv_may_be_asked_again(cluster: Cluster) -> None:
    told: list[Any] = []
    for status in (500, 400, None):
        preallocation.end_without_kv(lambda req, message, code: told.append(code), None, "gone", status_code=status)
    assert told == [503, 400, None]
