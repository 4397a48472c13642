"""What an instance reports as its home requests: every request once, in whatever state."""

from __future__ import annotations

from types import SimpleNamespace

from sglang_dcp.upstream.step.queues import Queues
from sglang_dcp.upstream.step.sync import count_home_requests


def batch_of(count: int, *, extends: bool) -> SimpleNamespace:
    return SimpleNamespace(reqs=[object()] * count, forward_mode=SimpleNamespace(is_extend=lambda: extends))


def count(running: SimpleNamespace, local: SimpleNamespace | None, waiting: int = 0, parked: int = 0) -> int:
    scheduler = SimpleNamespace(running_batch=running, waiting_queue=[object()] * waiting)
    runtime = SimpleNamespace(scheduler=scheduler, queues=Queues(parked=[object()] * parked))
    return count_home_requests(runtime, local)  # type: ignore[arg-type]


def test_a_request_in_prefill_counts():
    assert count(batch_of(2, extends=False), batch_of(1, extends=True), waiting=3, parked=1) == 7
    assert count(batch_of(0, extends=False), batch_of(1, extends=True)) == 1


def test_a_decoding_batch_counts_once():
    running = batch_of(4, extends=False)
    assert count(running, running) == 4
    assert count(running, None) == 4
    converted = batch_of(4, extends=True)
    assert count(converted, converted) == 4
