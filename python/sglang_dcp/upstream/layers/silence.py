"""A step that a peer did not answer in is never handed out: its requests end with an error, then the server ends.

Only graphs need this. Their kernels give up a wait and go on without the peer's rows; eager steps wait for it in a collective that fails.
"""

from __future__ import annotations

import time
from http import HTTPStatus
from typing import Any

import torch

from sglang_dcp.dataflow.step_mode import Graph
from sglang_dcp.dataflow.transport.base import TransportError
from sglang_dcp.upstream.step.attached import before
from sglang_dcp.upstream.step.runtime import Runtime

ANSWER_SECONDS = 1.0
"""Between the errors of a step's requests and the end of the server: for the main process to pass them on."""


def note_silence(runtime: Runtime, mode: Graph, result: Any) -> None:
    """Behind the layers of a step that ran as a graph with sharded rows, on their stream. The note goes with SGLang's result of the
    step: with overlap scheduling that is processed when the next step is under way."""
    assert runtime.graphs is not None
    result.dyncp_silence = runtime.graphs.attention.note_silence(mode.step.step)


@before
def end_if_silent(runtime: Runtime, scheduler: Any, batch: Any, result: Any, *args: Any, **kwargs: Any) -> None:
    """BEFORE Scheduler.process_batch_result. Raises TransportError, which ends the server, behind the errors of the batch's requests."""
    note = getattr(result, "dyncp_silence", None)
    if note is None:
        return
    wait_for_result(result)
    assert runtime.graphs is not None
    try:
        runtime.graphs.attention.raise_if_silent(note)
    except TransportError:
        answer_with_error(scheduler, batch, f"an instance of this server did not answer in step {note.step}; the server ends")
        time.sleep(ANSWER_SECONDS)
        raise


def wait_for_result(result: Any) -> None:
    """As SGLang does when it reads the tokens, a moment later: the layers have run, and what was queued behind them."""
    if result.copy_done is not None:
        result.copy_done.synchronize()
    else:
        torch.cuda.current_stream().synchronize()


def answer_with_error(scheduler: Any, batch: Any, message: str) -> None:
    """Ends the batch's requests with HTTP 503, tokens of this step aside."""
    from sglang.srt.managers.io_struct import AbortReq

    for req in batch.reqs:
        if not req.finished():
            reason = {"type": "abort", "status_code": HTTPStatus.SERVICE_UNAVAILABLE, "message": message}
            scheduler.send_abort_output(AbortReq(rid=req.rid, finished_reason=reason), req)
