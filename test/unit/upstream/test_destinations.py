"""A request's K/V comes to all of its shards: SGLang's own messages, read by SGLang's own code of the prefill side, and a stand-in that
sends by its rules."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVReceiver
from sglang.srt.disaggregation.mooncake.conn import MooncakeKVManager, TransferInfo

from sglang_dcp.ledger.page_ids import Page, PageIds
from sglang_dcp.upstream.disaggregation import destinations, sending
from sglang_dcp.upstream.disaggregation.announcing import register_all
from sglang_dcp.upstream.disaggregation.announcing import send_metadata as hook
from sglang_dcp.upstream.disaggregation.destinations import PADDING_PAGE, SESSION, Destination, Destinations, page_lists
from sglang_dcp.upstream.disaggregation.sending import send_owned
from sglang_dcp.upstream.step import attached

POOL_PAGES, ROOM, BIN, HOME_SLOT = 40, 77, 0, 5


def session_of(rank: int) -> str:
    return f"10.0.0.1:{9000 + rank}"


class Manager:
    """The part of MooncakeKVManager that builds messages, on the home."""

    local_ip, rank_port = "10.0.0.1", 4444
    enable_staging, is_mla_backend, attn_tp_size = False, True, 1
    build_receiver_metadata_message = MooncakeKVManager.build_receiver_metadata_message

    def __init__(self, home: int) -> None:
        self.home = home

    def get_session_id(self) -> str:
        return session_of(self.home)


class Receiver(CommonKVReceiver):
    """SGLang's, with an outbox per prefill rank instead of sockets."""

    def __init__(self, home: int, servers: int, fail_after: int | None = None) -> None:
        self.kv_mgr, self.bootstrap_room, self.conclude_state = Manager(home), ROOM, None
        self.prefill_info = SimpleNamespace(attn_tp_size=servers)
        self.required_dst_info_num, self.init_time = 1, None
        self.bootstrap_infos = [{"is_dummy": rank > 0, "rank": rank} for rank in range(servers)]
        self.sent: list[tuple[str, int, list[bytes]]] = []
        self.left, self.invalidated = fail_after, False

    def _send_bootstrap_message(self, *, bootstrap_info: dict[str, Any], message: list[bytes], operation: Any) -> bool:
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                return False
        self.sent.append((operation, bootstrap_info["rank"], list(message)))
        return True

    def invalidate_cached_bootstrap_infos(self) -> None:
        self.invalidated = True

    def infos(self, rank: int = 0) -> list[TransferInfo]:
        return [TransferInfo.from_zmq(message) for kind, server, message in self.sent if kind == "send_metadata" and server == rank]


@pytest.fixture(params=[2, 4])
def cluster(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> PageIds:
    """The last instance is the home of the request."""
    count = request.param
    ids = PageIds(count - 1, count, POOL_PAGES, 16)
    of = tuple(Destination(session_of(rank).encode(), [b"None", b"", b"", session_of(rank).encode()], BIN) for rank in range(count))
    runtime = SimpleNamespace(participant=SimpleNamespace(ids=ids, rank=ids.home), destinations=Destinations(ids.home, of))
    monkeypatch.setattr(attached, "_runtime", runtime)
    return ids


def send(receiver: Receiver, pages: list[Page], ids: PageIds) -> None:
    encoded = np.array([ids.encode(page) for page in pages], dtype=np.int32)
    hook(CommonKVReceiver.send_metadata, receiver, encoded, HOME_SLOT, None, decode_prefix_len=0)


def shuffled_pages(ids: PageIds, count: int, owners: list[int]) -> list[Page]:
    """Pages of the given instances, in turns of three."""
    numbers = {owner: iter(range(POOL_PAGES, 0, -1)) for owner in owners}
    return [Page(owner, next(numbers[owner])) for owner in (owners[index // 3 % len(owners)] for index in range(count))]


def prefill(infos: list[TransferInfo], num_pages: int, chunk: int, send_pages: Callable[..., int]) -> dict[str, np.ndarray]:
    """What a prefill server does: waits for as many destinations as each message says, then sends every chunk to each of them, by position.
    The pools afterwards; K/V of the prompt's page i is i + 1."""
    assert len({info.mooncake_session_id for info in infos}) == len(infos) == infos[0].required_dst_info_num
    pools = {info.mooncake_session_id: np.zeros(POOL_PAGES + 1, dtype=np.int64) for info in infos}
    for start in range(0, num_pages, chunk):
        sources = np.arange(start, min(num_pages, start + chunk))
        for info in infos:
            assert len(info.dst_kv_indices) == num_pages
            send_pages(
                pools[info.mooncake_session_id], prefill_kv_indices=sources, dst_kv_indices=info.dst_kv_indices[start : start + chunk]
            )
    return pools


def write(pool: np.ndarray, prefill_kv_indices: np.ndarray, dst_kv_indices: np.ndarray) -> int:
    pool[dst_kv_indices] = prefill_kv_indices + 1
    return 0


def write_owned(pool: np.ndarray, **pages: np.ndarray) -> int:
    return send_owned(write, pool, **pages)


@pytest.mark.parametrize("send_pages", [write, write_owned])
def test_every_page_arrives_where_it_lies(cluster: PageIds, send_pages: Callable[..., int]) -> None:
    pages = shuffled_pages(cluster, 31, [0, cluster.home])
    receiver = Receiver(cluster.home, servers=1)
    send(receiver, pages, cluster)
    pools = prefill(receiver.infos(), len(pages), 7, send_pages)
    for index, page in enumerate(pages):
        assert pools[session_of(page.owner)][page.number] == index + 1
    strangers = sum(int(np.count_nonzero(pool[1:])) for pool in pools.values())
    assert strangers == len(pages), "nothing is written elsewhere but to the padding page"
    if send_pages is write_owned:
        assert not any(pool[PADDING_PAGE] for pool in pools.values())


def test_only_the_home_hears_and_reads_the_first_token(cluster: PageIds) -> None:
    owners = [rank for rank in range(cluster.num_instances) if rank != cluster.home]
    receiver = Receiver(cluster.home, servers=1)
    send(receiver, shuffled_pages(cluster, 12, owners), cluster)
    infos = {info.mooncake_session_id: info for info in receiver.infos()}
    assert len(infos) == cluster.num_instances, "the home is a destination though it holds no page"
    assert {(info.endpoint, info.dst_port) for info in infos.values()} == {("10.0.0.1", 4444)}
    assert {session: info.dst_aux_index for session, info in infos.items()} == {
        session_of(rank): HOME_SLOT if rank == cluster.home else BIN for rank in range(cluster.num_instances)
    }
    assert receiver.init_time is not None


def test_a_request_of_one_pool_is_sent_as_by_sglang(cluster: PageIds) -> None:
    receiver = Receiver(cluster.home, servers=1)
    send(receiver, shuffled_pages(cluster, 9, [cluster.home]), cluster)
    (info,) = receiver.infos()
    assert info.required_dst_info_num == 1 and info.dst_kv_indices.tolist() == list(range(POOL_PAGES, POOL_PAGES - 9, -1))


def test_prefill_ranks_that_send_nothing_wait_for_as_many_messages(cluster: PageIds) -> None:
    receiver = Receiver(cluster.home, servers=2)
    send(receiver, shuffled_pages(cluster, 9, [0, cluster.home]), cluster)
    dummies = receiver.infos(rank=1)
    assert len({info.mooncake_session_id for info in dummies}) == 2 and all(
        info.is_dummy and info.required_dst_info_num == 2 for info in dummies
    )


def test_heads_of_gqa_are_not_put_together_from_several_prefill_ranks(cluster: PageIds) -> None:
    receiver = Receiver(cluster.home, servers=2)
    failures: list[Any] = []
    receiver.kv_mgr.is_mla_backend = False
    receiver.kv_mgr.record_failure = receiver.kv_mgr.update_status = lambda room, what: failures.append(what)  # type: ignore[attr-defined]
    send(receiver, shuffled_pages(cluster, 9, [0, cluster.home]), cluster)
    assert not receiver.sent and receiver.conclude_state == KVPoll.Failed == failures[1]
    assert "attention tensor parallelism 2" in failures[0]
    receiver.conclude_state = None
    send(receiver, shuffled_pages(cluster, 9, [cluster.home]), cluster)
    assert receiver.sent, "SGLang itself can, for a request of one pool"


def test_a_message_that_does_not_leave_ends_it(cluster: PageIds) -> None:
    receiver = Receiver(cluster.home, servers=1, fail_after=1)
    send(receiver, shuffled_pages(cluster, 9, [0, cluster.home]), cluster)
    assert len(receiver.sent) == 1 and receiver.invalidated


def test_a_prefill_server_learns_of_all_pools_once(cluster: PageIds) -> None:
    receiver = Receiver(cluster.home, servers=2)
    assert register_all(True, receiver) and not register_all(False, receiver)
    told = [(rank, message[SESSION].decode()) for _, rank, message in receiver.sent]
    assert sorted(told) == sorted((rank, session_of(other)) for rank in (0, 1) for other in range(cluster.num_instances - 1))


def test_page_lists_of_all_zero_ids_do_not_exist() -> None:
    """Page 0 is nobody's: an id that names it would be taken for a gap."""
    ids = PageIds(1, 3, 10, 16)
    lists = page_lists(ids, np.array([ids.encode(Page(2, 1)), ids.encode(Page(0, 10)), ids.encode(Page(2, 7))]))
    assert {rank: pages.tolist() for rank, pages in lists.items()} == {0: [0, 10, 0], 1: [0, 0, 0], 2: [1, 0, 7]}


def scheduler_of(manager: Any) -> SimpleNamespace:
    slots = iter([BIN])
    return SimpleNamespace(
        disagg_decode_prealloc_queue=SimpleNamespace(kv_manager=manager),
        req_to_metadata_buffer_idx_allocator=SimpleNamespace(alloc=lambda: next(slots, None)),
    )


def introducing(monkeypatch: pytest.MonkeyPatch, registration: list[bytes], state_types: list[str] | None = None) -> Destinations | None:
    manager = SimpleNamespace(
        get_session_id=lambda: session_of(1),
        build_receiver_registration_message=lambda: registration,
        kv_args=SimpleNamespace(state_types=state_types or []),
    )

    def gather(everybody: list[Any], own: Destination, group: Any) -> None:
        everybody[:] = [Destination(b"other", [b"message"], 3), own]

    monkeypatch.setattr(destinations.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(destinations.dist, "all_gather_object", gather)
    return destinations.introduce(scheduler_of(manager), 1, None)


def test_instances_introduce_their_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    registration = [b"None", b"", b"", session_of(1).encode(), b"pointers"]
    found = introducing(monkeypatch, registration)
    assert found is not None and found.of[1] == Destination(session_of(1).encode(), registration, BIN)
    assert [other.session for other in found.others] == [b"other"]


def test_what_cannot_be_sent_to_several_pools_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(destinations.TransferError, match="is not its session"):
        introducing(monkeypatch, [b"None", b"", b"", b"someone else"])
    with pytest.raises(destinations.TransferError, match="SWA"):
        introducing(monkeypatch, [b"None", b"", b"", session_of(1).encode()], ["SWA"])


def test_servers_without_a_transfer_have_no_destinations() -> None:
    assert destinations.introduce(SimpleNamespace(disagg_decode_prealloc_queue=None), 0, None) is None
    assert destinations.introduce(scheduler_of(object()), 0, None) is None, "SGLang's fake transfer"


def test_children_of_a_prefill_server_know_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sending.PREFILL_VARIABLE, "1")
    sending.mark_prefill_server(False)
    assert not sending.is_prefill_server()
    sending.mark_prefill_server(True)
    assert sending.is_prefill_server()
