"""SGLang's own preallocation queue of a decode server, with the ledger's requests in it: who begins, who waits, whom nobody waits for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sglang.srt.disaggregation import decode
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.decode import DecodePreallocQueue, DecodeRequest

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
from testing.protocol.fakes import FakePool

PAGE, PAGES, RESERVED = 16, 20, 64


class Kv:
    kv_allocated_len = cache_protected_len = req_pool_idx = 0
    holds_kv = holds_mamba = False


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
        self.finished_reason, self.kv, self.return_logprob = None, Kv(), False
        self.time_stats = SimpleNamespace(set_bootstrap_done_time=lambda: None)

    def finished(self) -> bool:
        return self.finished_reason is not None

    def _compute_max_prefix_len(self, num_tokens: int) -> int:
        return num_tokens - 1


class Receiver:
    """Has met its prefill server."""

    state = KVPoll.WaitingForInput

    def poll(self) -> KVPoll:
        return self.state

    def failure_exception(self) -> None:
        raise RuntimeError("aborted")

    def clear(self) -> None:
        pass


class Queue(DecodePreallocQueue):
    """SGLang's, with our handlers around its methods and a pool of numbers."""

    def __init__(self, scheduler: Any, pool: FakePool, rows: int) -> None:
        self.scheduler, self.queue, self.pending_reqs, self.retracted_queue = scheduler, [], [], []
        self.pp_size, self.tp_rank, self.gloo_group, self.num_reserved_decode_tokens = 1, 0, None, RESERVED
        self._prefill_dp_rank_queries: dict[str, Any] = {}
        self.token_to_kv_pool, self.pool, self.tree_cache = None, pool, None
        self.transfer_queue = scheduler.disagg_decode_transfer_queue
        self.req_to_token_pool = SimpleNamespace(
            size=rows, available_size=lambda: rows - len(self.begun), req_to_token=np.zeros((1, 2 * PAGES * PAGE), dtype=np.int32)
        )
        self.kv_manager = SimpleNamespace(kv_args=SimpleNamespace(state_types=[]))
        self.req_to_metadata_buffer_idx_allocator = SimpleNamespace(available_size=lambda: 99)
        self.begun: list[str] = []
        self.told: dict[str, tuple[int, int]] = {}
        self.token_to_kv_pool_allocator = SimpleNamespace(
            page_size=PAGE,
            prealloc_fits_assumes_reclaim=lambda: False,
            available_size=lambda: pool.num_givable_pages() * PAGE,
            prealloc_fits=lambda _tree, full, _swa, *, full_budget_tokens, swa_budget_tokens: full <= full_budget_tokens,
            translate_kv_indices_for_transfer=lambda indices: indices,
        )

    def _update_handshake_waiters(self, *args: Any) -> None:
        preallocation.take_ready(super()._update_handshake_waiters(*args), self)

    def _active_req_count(self, extra_reserved_reqs: int = 0) -> int:
        return preallocation.count_active(super()._active_req_count(extra_reserved_reqs), self)

    def _allocatable_token_budgets(self, *args: Any, **kwargs: Any) -> int:
        return preallocation.leave_withheld(super()._allocatable_token_budgets(*args, **kwargs), self)

    def _need_space_for_single_req(self, retractable_tokens: int | None = None) -> int:
        return preallocation.space_for_one(DecodePreallocQueue._need_space_for_single_req, self, retractable_tokens)

    def _required_admission_tokens(self, *args: Any) -> int:
        return preallocation.required_tokens(DecodePreallocQueue._required_admission_tokens, self, *args)

    def pop(self) -> list[str]:
        begun, failed = preallocation.pop_preallocated(DecodePreallocQueue.pop_preallocated, self)
        self.transfer_queue.queue += begun
        return [entry.req.rid for entry in begun]

    def _pre_alloc(self, req: Any, *_: Any) -> Any:
        tokens = len(req.origin_input_ids)
        if req.dyncp is None:
            assert self.pool.take_pages(-(-tokens // PAGE)) is not None, "SGLang ends here: its budget was wrong"
        else:
            assert req.dyncp.ready
        req.kv.kv_allocated_len, req.kv.holds_kv = tokens, True
        self.begun.append(req.rid)
        return [0] * tokens

    def _send_kv_metadata(self, entry: Any, ids: Any, *_: Any, decode_prefix_len: int) -> None:
        self.told[entry.req.rid] = len(ids), decode_prefix_len

    def _mamba_payload(self) -> None:
        pass

    def arrive(self, req: Request) -> Request:
        self.queue.append(DecodeRequest(req, Receiver()))  # type: ignore[arg-type]
        return req


class Cluster:
    """Home 0 of two instances in lock step; the other has no requests of its own."""

    def __init__(self, rows: int = 50, **config: Any) -> None:
        settings = DynCpConfig(**config).resolve(2)
        self.pools = [FakePool(PAGES) for _ in range(2)]
        cluster = cluster_of(settings, 2, PAGES, PAGE)
        self.participants = [Participant(cluster, rank, pool) for rank, pool in enumerate(self.pools)]
        running = SimpleNamespace(reqs=[], batch_is_full=False)
        streamer = SimpleNamespace(stream_output=lambda *_: None)
        transfers = SimpleNamespace(queue=[], _deferred_releases=[], enable_staging=False)
        self.scheduler = SimpleNamespace(running_batch=running, waiting_queue=[], last_batch=None, output_streamer=streamer)
        self.scheduler.disagg_decode_transfer_queue = transfers
        for switch in ("enable_hisparse", "enable_priority_scheduling", "enable_lora", "enable_decode_hicache"):
            setattr(self.scheduler, switch, False)
        self.scheduler.metrics_reporter = SimpleNamespace(enable_metrics=False)
        self.runtime = Runtime(self.scheduler, settings, self.participants[0], self.pools[0], None, None)  # type: ignore[arg-type]
        self.queue = self.scheduler.disagg_decode_prealloc_queue = Queue(self.scheduler, self.pools[0], rows)

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
    settings = SimpleNamespace(disaggregation_decode_host_receive_threshold=1, disaggregation_decode_enable_radix_cache=False)
    monkeypatch.setattr(decode, "get_disagg", lambda: settings)
    monkeypatch.setattr(decode, "poll_and_all_reduce", lambda receivers, group: [receiver.poll() for receiver in receivers])
    monkeypatch.setattr(decode, "ensure_mamba_capacity", lambda *_: True)
    monkeypatch.setattr(attached, "_runtime", made.runtime)
    yield made


def local(rid: str, prompt: int, **more: Any) -> Request:
    return Request(rid, prompt, Placement(0, (0,), (prompt,)), **more)


def sharded(rid: str, prompt: int, **more: Any) -> Request:
    return Request(rid, prompt, Placement(0, (1, 0), (prompt // 2, prompt - prompt // 2)), **more)


def test_a_sharded_request_begins_when_its_pages_are_there(cluster: Cluster) -> None:
    long = cluster.queue.arrive(sharded("long", 30 * PAGE))
    assert cluster.run(1) == [] and cluster.queue.queue and not long.dyncp.ready
    assert cluster.run(3) == ["long"]
    assert long.dyncp.shards == (1, 0) and long.kv.kv_allocated_len == 30 * PAGE
    assert not cluster.queue.queue and not cluster.runtime.queues.waiting
    assert [entry.req for entry in cluster.scheduler.disagg_decode_transfer_queue.queue] == [long]


def test_a_request_that_ends_as_soon_as_it_begins_gives_its_pages_back_once(cluster: Cluster) -> None:
    """A single token, or an abort: it takes its row and leaves it between two looks at who waits for pages."""
    req = cluster.queue.arrive(sharded("single", 30 * PAGE))
    while not cluster.queue.pop():
        cluster.settle()
    retention.end_request(cluster.runtime, req.dyncp)
    req.kv.holds_kv = False
    assert not cluster.runtime.queues.waiting
    cluster.settle()
    cluster.settle()
    assert [pool.num_givable_pages() for pool in cluster.pools] == [PAGES, PAGES]


RETAINING = pytest.mark.parametrize("cluster", [{"cache_fraction": 1.0, "cache_min_tokens": PAGE}], indirect=True, ids=["retaining"])


def leave_behind(cluster: Cluster, placed: Callable[..., Request], pages: int) -> Request:
    """A request of so many whole pages has run and ended by itself."""
    first = cluster.queue.arrive(placed("first", pages * PAGE))
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
    cluster.queue.arrive({"sharded": sharded, "local": local}[later]("second", 14 * PAGE + 3))
    assert cluster.run(5) == ["second"]
    assert cluster.queue.told == {"first": (12 * PAGE, 0), "second": (2 * PAGE + 3, 12 * PAGE)}
    (entry,) = cluster.scheduler.disagg_decode_transfer_queue.queue
    assert entry.req.prefix_len == 0 and entry.req.kv.kv_allocated_len == 14 * PAGE + 3
    preallocation.begin_behind_prefix(SimpleNamespace(reqs=[entry.req, local("unmanaged", PAGE)]))
    assert entry.req.prefix_len == 12 * PAGE, "what SGLang reports as cached"
    assert entry.req.dyncp.shards == (1, 0), "the pages that it has taken over stay where they are"


@RETAINING
def test_what_a_request_reads_of_another_is_not_its_own_to_free(cluster: Cluster) -> None:
    """SGLang asks its tree once more when the K/V has come, and would then free the row from its beginning."""
    first = cluster.queue.arrive(sharded("first", 12 * PAGE + 1))
    assert cluster.run(5) == ["first"]
    cluster.scheduler.running_batch.reqs.append(first)
    cluster.queue.arrive(sharded("second", 14 * PAGE))
    assert cluster.run(5) == ["second"]
    second = next(entry.req for entry in cluster.scheduler.disagg_decode_transfer_queue.queue if entry.req.rid == "second")
    assert second.dyncp.num_borrowed == 12 and second.kv.cache_protected_len == first.kv.cache_protected_len == 12 * PAGE
    second.kv.cache_protected_len = 0
    preallocation.begin_behind_prefix(SimpleNamespace(reqs=[second]))
    assert second.prefix_len == second.kv.cache_protected_len == 12 * PAGE


@RETAINING
def test_what_is_prefilled_again_is_sent_whole(cluster: Cluster) -> None:
    leave_behind(cluster, sharded, 12)
    cluster.queue.arrive(sharded("second", 14 * PAGE))
    cluster.queue.queue[-1].is_rebootstrap = True
    assert cluster.run(5) == ["second"]
    assert cluster.queue.told["second"] == (14 * PAGE, 0)


@RETAINING
def test_a_request_that_ends_before_its_transfer_leaves_the_earlier_turn_as_it_was(cluster: Cluster) -> None:
    leave_behind(cluster, sharded, 12)
    second = cluster.queue.arrive(sharded("second", 14 * PAGE))
    cluster.step()
    second.finished_reason = "abort"
    cluster.queue.queue.clear()
    cluster.run(4)
    assert second.dyncp is None and cluster.participants[0].table.retained.pages == cluster.participants[1].table.retained.pages
    assert sum(cluster.participants[0].table.retained.pages) == 12
    assert not cluster.runtime.queues.waiting


def test_nobody_waits_behind_it(cluster: Cluster) -> None:
    cluster.queue.arrive(sharded("long", 30 * PAGE))
    cluster.queue.arrive(local("short", PAGE, new=4))
    assert cluster.run(1) == ["short"]


def test_a_local_request_leaves_what_is_promised(cluster: Cluster) -> None:
    """Else short ones would come for ever, and the long one that is first never."""
    assert cluster.queue.arrive(local("filler", 10 * PAGE)) and cluster.run(1) == ["filler"]
    cluster.queue.arrive(sharded("long", 34 * PAGE, flexible=False))
    cluster.run(2)
    assert cluster.participants[0].promised[0] >= cluster.pools[0].num_givable_pages() == 10
    cluster.queue.arrive(local("later", 2 * PAGE, new=2, flexible=False))
    assert cluster.run(4) == []


def test_a_local_request_that_fits_its_pool_is_not_asked_for_more_than_the_pool(cluster: Cluster) -> None:
    """SGLang would keep room for all of its output, and the whole queue would wait for ever."""
    cluster.queue.arrive(local("alone", (PAGES - 1) * PAGE, new=4000))
    assert cluster.run(1) == ["alone"]


def test_a_local_request_that_finds_no_room_is_asked_for_elsewhere(cluster: Cluster) -> None:
    cluster.queue.arrive(local("filler", 18 * PAGE))
    req = cluster.queue.arrive(local("blocked", 5 * PAGE))
    behind = cluster.queue.arrive(local("behind", PAGE))
    assert cluster.run(1) == ["filler"] and cluster.runtime.queues.blocked is req
    assert cluster.run(PATIENCE_STEPS + 5)[0] == "blocked"
    assert req.dyncp.shards[0] == 1 and req.skip_radix_cache_insert  # type: ignore[attr-defined]
    assert cluster.runtime.queues.blocked in (None, behind)


def test_a_local_request_that_found_no_room_begins_when_there_is_some(cluster: Cluster) -> None:
    cluster.queue.arrive(local("filler", 18 * PAGE))
    req = cluster.queue.arrive(local("pinned", 5 * PAGE, flexible=False))
    assert cluster.run(2) == ["filler"] and cluster.runtime.queues.blocked is req
    cluster.pools[0].return_pages([page for page in range(1, PAGES + 1) if page not in cluster.pools[0].free])
    cluster.scheduler.disagg_decode_transfer_queue.queue.clear()
    assert cluster.run(1) == ["pinned"]
    assert cluster.runtime.queues.blocked is None and req.dyncp_blocked_since is None  # type: ignore[attr-defined]


def test_an_abort_while_it_waits_gives_everything_back(cluster: Cluster) -> None:
    """Before its grant, and with its pages in hand but no row to begin with."""
    asking = cluster.queue.arrive(sharded("asking", 30 * PAGE))
    cluster.run(1)
    abort(cluster, asking)
    assert cluster.run(3) == [] and asking.dyncp is None
    granted = cluster.queue.arrive(sharded("granted", 30 * PAGE))
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
    cluster.queue.arrive(local("a", PAGE))
    cluster.queue.arrive(sharded("b", 4 * PAGE))
    assert cluster.run(PATIENCE_STEPS + 4) == [] and cluster.runtime.queues.blocked is None
    cluster.queue.req_to_token_pool.available_size = lambda: 9
    assert sorted(cluster.run(1)) == ["a", "b"]


def test_where_requests_are_found(cluster: Cluster) -> None:
    transfers, scheduler = cluster.scheduler.disagg_decode_transfer_queue, cluster.scheduler
    waiting, moving, held, arrived = (local(name, PAGE) for name in "abcd")
    cluster.queue.arrive(waiting)
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
