"""What this scheduler process runs: its scheduler and its instance. Hooks find them here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from sglang_dcp.dataflow.attention.partial_attention import PartialAttention, torch_partial_attention
from sglang_dcp.dataflow.transport.base import Transport
from sglang_dcp.observe.request_log import RequestLog
from sglang_dcp.upstream.layers.layer_roll import LayerRoll
from sglang_dcp.upstream.observe.host_clock import HostClock
from sglang_dcp.upstream.step.columns import WidenedRow
from sglang_dcp.upstream.step.instance import Instance
from sglang_dcp.upstream.step.own_batch import OwnBatch


class StepObserver(Protocol):
    """Takes note of steps and ends of requests: the metrics, where they are on."""

    def after_step(self, binding: Binding) -> None: ...

    def observe_end(self, where: dict[str, Any]) -> None: ...


@dataclass
class Binding:
    """parked: requests that sit out decode steps for want of a tail page. waiting: those with an open reservation, by handle.
    local_batch: the batch of the step being synchronised; own_batch: its rows, beside those of the step before. metrics: None without
    --enable-metrics. graph_guest_rows: guest rows of the graph that the step runs as, 0 for none or SGLang's own; graph_step: its rows.
    graph_steps, eager_steps: forward passes that this instance ran as a CUDA graph (sharded_graph_steps: those of them with sharded
    rows), and otherwise. step_ran: the last step had rows on some instance. own_row, fallback_row: what SGLang's all-gather gets of us.
    idle_audited: the pool was looked at since this instance fell idle. givable_pages: free ones and what eviction would free, when the
    last step was synchronised. layer_roll: attention layers of the eager sharded step being run, as they enter our path.
    placements_taken_in: number of the newest placement by the router that has arrived here. blocked: the local request that found no room
    last; asked_elsewhere: handle of the newest one whose pages were asked for elsewhere instead.
    """

    scheduler: Any
    instance: Instance
    transport: Transport
    control_group: Any
    parked: list[Any] = field(default_factory=list)
    waiting: dict[int, Any] = field(default_factory=dict)
    local_batch: Any = None
    pending_rows: Any = None
    idle_audited: bool = False
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    partial_attention: PartialAttention = torch_partial_attention
    graph_guest_rows: int = 0
    graph_step: Any = None
    graph_steps: int = 0
    sharded_graph_steps: int = 0
    eager_steps: int = 0
    request_log: RequestLog = field(default_factory=RequestLog)
    metrics: StepObserver | None = None
    host_clock: HostClock = field(default_factory=HostClock)
    step_ran: bool = False
    own_row: WidenedRow = field(default_factory=WidenedRow)
    fallback_row: torch.Tensor | None = None
    givable_pages: int = 0
    placements_taken_in: int = 0
    blocked: Any = None
    asked_elsewhere: int | None = None
    layer_roll: LayerRoll = field(default_factory=lambda: LayerRoll({}))
    own_batch: OwnBatch = field(init=False)

    def __post_init__(self) -> None:
        self.own_batch = OwnBatch(self.instance)


_binding: Binding | None = None


def bind(binding: Binding) -> None:
    global _binding
    _binding = binding


def current() -> Binding | None:
    """None before the scheduler is built, and in processes that have none."""
    return _binding
