"""SGLang's own preallocation queue of a decode server, with our handlers around its methods and a pool of numbers."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from sglang.srt.disaggregation import decode
from sglang.srt.disaggregation.base import KVPoll
from sglang.srt.disaggregation.decode import DecodePreallocQueue, DecodeRequest

from sglang_dcp.upstream.disaggregation import preallocation
from testing.protocol.fakes import FakePool

SWITCHES = ("enable_hisparse", "enable_priority_scheduling", "enable_lora", "enable_decode_hicache")
"""Of SGLang's scheduler: all off."""


class Receiver:
    """Has met its prefill server."""

    state = KVPoll.WaitingForInput

    def poll(self) -> KVPoll:
        return self.state

    def failure_exception(self) -> None:
        raise RuntimeError("aborted")

    def clear(self) -> None:
        pass


def stand_beside_prefill_servers(scheduler: Any) -> None:
    """What the queues ask of SGLang's scheduler."""
    scheduler.disagg_decode_transfer_queue = SimpleNamespace(queue=[], _deferred_releases=[], enable_staging=False)
    scheduler.output_streamer = SimpleNamespace(stream_output=lambda *_: None)
    scheduler.metrics_reporter = SimpleNamespace(enable_metrics=False)
    scheduler.last_batch = None
    for switch in SWITCHES:
        setattr(scheduler, switch, False)


def without_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's module asks its server's arguments, its peers and its state pools."""
    settings = SimpleNamespace(disaggregation_decode_host_receive_threshold=1, disaggregation_decode_enable_radix_cache=False)
    monkeypatch.setattr(decode, "get_disagg", lambda: settings)
    monkeypatch.setattr(decode, "poll_and_all_reduce", lambda receivers, group: [receiver.poll() for receiver in receivers])
    monkeypatch.setattr(decode, "ensure_mamba_capacity", lambda *_: True)


class PreallocationQueue(DecodePreallocQueue):
    """begun: names of the requests that have begun. told: by name, tokens that are sent and those before them, which are here.

    rows: that it may give out, ever. reserved: --num-reserved-decode-tokens. longest: tokens of a row."""

    def __init__(self, scheduler: Any, pool: FakePool, page_size: int, rows: int, reserved: int, longest: int) -> None:
        self.scheduler, self.queue, self.pending_reqs, self.retracted_queue = scheduler, [], [], []
        self.pp_size, self.tp_rank, self.gloo_group, self.num_reserved_decode_tokens = 1, 0, None, reserved
        self._prefill_dp_rank_queries: dict[str, Any] = {}
        self.token_to_kv_pool, self.pool, self.tree_cache = None, pool, None
        self.transfer_queue = scheduler.disagg_decode_transfer_queue
        self.req_to_token_pool = SimpleNamespace(
            size=rows, available_size=lambda: rows - len(self.begun), req_to_token=defaultdict(lambda: np.zeros(longest, dtype=np.int32))
        )
        self.kv_manager = SimpleNamespace(kv_args=SimpleNamespace(state_types=[]))
        self.req_to_metadata_buffer_idx_allocator = SimpleNamespace(available_size=lambda: 99)
        self.begun: list[str] = []
        self.told: dict[str, tuple[int, int]] = {}
        self.token_to_kv_pool_allocator = SimpleNamespace(
            page_size=page_size,
            prealloc_fits_assumes_reclaim=lambda: False,
            available_size=lambda: pool.num_givable_pages() * page_size,
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
        begun, _ = preallocation.pop_preallocated(DecodePreallocQueue.pop_preallocated, self)
        self.transfer_queue.queue += begun
        return [entry.req.rid for entry in begun]

    def _pre_alloc(self, req: Any, *_: Any) -> Any:
        tokens = self._pre_alloc_fill_len(req)
        if req.dyncp is None:
            pages = self.pool.take_pages(-(-tokens // self.token_to_kv_pool_allocator.page_size))
            assert pages is not None, "SGLang ends here: its budget was wrong"
            req.pages = pages
        else:
            assert req.dyncp.ready
        req.kv.kv_allocated_len = tokens
        self.begun.append(req.rid)
        return [0] * tokens

    def _send_kv_metadata(self, entry: Any, ids: Any, *_: Any, decode_prefix_len: int) -> None:
        self.told[entry.req.rid] = len(ids), decode_prefix_len

    def _mamba_payload(self) -> None:
        pass

    def add(self, req: Any, is_retracted: bool = False, is_rebootstrap: bool = False) -> None:
        self.queue.append(DecodeRequest(req, Receiver(), is_rebootstrap=is_rebootstrap))  # type: ignore[arg-type]
