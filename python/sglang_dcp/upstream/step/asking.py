"""What waiting requests of an instance ask for ahead of a step's columns: in most steps nobody waits."""

from __future__ import annotations

from sglang_dcp.upstream.step import elsewhere, retention
from sglang_dcp.upstream.step.admission import ask_again, sweep_waiting
from sglang_dcp.upstream.step.runtime import Runtime


def ask(runtime: Runtime) -> int:
    """Asks and takes back. Returns the free pages that this instance's own requests need of retained ones."""
    queues, participant = runtime.queues, runtime.participant
    retains = participant.table.retained.pages[participant.rank]
    if not (retains or queues.waiting or queues.blocked is not None or participant.retention.lost):
        return 0
    sweep_waiting(runtime)
    ask_again(runtime)
    wanted = retention.wanted_pages(runtime)  # before the request that wants them is sent elsewhere
    elsewhere.ask_elsewhere(runtime)
    return wanted
