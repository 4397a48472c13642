"""One decode step of an instance, from the batch that SGLang chose to the result that it is handed: start reading here.

SGLang's scheduler runs the step; `handlers.py` calls these methods from its hooks, in this order:

    rejoin     requests that sat out and got their page join the running batch; whom the last step named starts over
    secure     every request of the batch has a page for its next token, or sits out and asks for one
    allocate   token ids of the new tokens: those of the ledger's pages for requests that begin one
    tell       this instance's control columns go on the step's all-gather
    settle     everybody's columns are here: messages, the same grants on all instances, and what the step runs as
    launch     a graph's tables are filled; the layers of an eager sharded step plan themselves; stock prepares its own
    account    behind the layers: what ran as what, who did not answer, was a layer missed

A step that prefills passes `rejoin`, `tell`, `settle`, `launch` and `account`; its pages were reserved in admission.py. The device's half
of a step is dataflow/attention_step.py. docs/one_step.md tells the same with pictures.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch

from sglang_dcp.dataflow.step_mode import Eager, Graph, Stock
from sglang_dcp.upstream.layers import step_path
from sglang_dcp.upstream.pool.page_audit import check_when_due
from sglang_dcp.upstream.step import allocation, retraction, sitting_out, sync
from sglang_dcp.upstream.step.asking import ask
from sglang_dcp.upstream.step.looking_again import look_again
from sglang_dcp.upstream.step.runtime import Runtime


class StepDriver:
    """batch: SGLang's of the step that is synchronised, None where this instance has none. anybody_ran: the last step had rows on some
    instance."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        runtime.driver = self
        self.batch: Any = None
        self.anybody_ran = False

    def rejoin(self, running_batch: Any) -> Any:
        """The running batch of the round that begins. Requests that sat out and ended are closed, victims start over first."""
        runtime = self.runtime
        check_when_due(runtime)
        if runtime.queues.blocked is not None or runtime.queues.waiting or runtime.participant.local_waits_long:
            look_again(runtime, running_batch)
        if runtime.queues.parked or runtime.participant.victims:
            retraction.end_parked(runtime)
            return sitting_out.rejoin(runtime, running_batch)
        return running_batch

    def secure(self, batch: Any) -> bool:
        """Takes out of the batch whoever has no page for the next token. False: nobody is left."""
        if not batch.reqs:
            return True
        began = perf_counter()
        leave = sitting_out.find_leavers(self.runtime, batch)
        self.runtime.pool.settle_decode_claims()
        self.runtime.host_clock.spent("secure", perf_counter() - began)
        return not leave or sitting_out.sit_out(self.runtime, batch, leave)

    def allocate(self, batch: Any, seq_lens: torch.Tensor, last_loc: torch.Tensor) -> torch.Tensor | None:
        """Token ids of the batch's new tokens; None where stock allocates them all. seq_lens: with the new token, on the host."""
        began = perf_counter()
        ids = allocation.decode_ids(self.runtime, batch.reqs, seq_lens, last_loc)
        self.runtime.host_clock.spent("allocate", perf_counter() - began)
        return ids

    def tell(self, row: torch.Tensor) -> torch.Tensor:
        """SGLang's row of the all-gather with this instance's columns behind it."""
        began, runtime = perf_counter(), self.runtime
        wide = runtime.sync_row.widen(row, sync.own_columns(runtime, self.batch, ask(runtime)))
        runtime.host_clock.spent("columns", perf_counter() - began)
        return wide

    def settle(self, info: Any) -> None:
        """What all instances do alike with the step's columns. info: SGLang's record of the meeting."""
        began, runtime = perf_counter(), self.runtime
        words = sync.read_gathered(runtime, info)
        runtime.host_clock.end_step(ran=self.anybody_ran, sharded=not isinstance(runtime.mode, Stock))
        self.anybody_ran = max(info.global_num_tokens) > 0
        runtime.participant.finish_step(words, anybody_runs=self.anybody_ran)
        if runtime.metrics is not None:
            runtime.metrics.after_step(runtime)
        runtime.participant.counters.admission_waits.clear()
        runtime.mode = sync.choose_mode(runtime, info)
        runtime.host_clock.spent("settle", perf_counter() - began)

    def launch(self, forward_batch: Any, *, as_graph: bool) -> bool:
        """Ahead of the layers, which SGLang replays as a graph or not. Whether stock's own metadata is to be prepared."""
        mode = self.runtime.mode
        if isinstance(mode, Graph):
            step_path.load_graph(self.runtime, mode, forward_batch, as_graph=as_graph)
            return False
        return as_graph or not isinstance(mode, Eager)

    def account(self, result: Any) -> None:
        """Behind the layers. result: SGLang's of the forward pass."""
        step_path.count_forward(self.runtime, result)
