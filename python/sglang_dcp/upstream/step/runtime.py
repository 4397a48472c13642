"""What this scheduler process runs, in one object: its scheduler, its part of the protocol, and what carries its sharded steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from sglang_dcp.config import DynCpConfig
from sglang_dcp.dataflow.attention.partial_attention import PartialAttention, torch_partial_attention
from sglang_dcp.dataflow.step_mode import STOCK, StepMode
from sglang_dcp.dataflow.step_rows import StepRows
from sglang_dcp.dataflow.transport.base import Transport
from sglang_dcp.ledger.cluster import Cluster
from sglang_dcp.ledger.participant import Participant
from sglang_dcp.observe.request_log import RequestLog
from sglang_dcp.upstream.layers.layer_roll import LayerRoll
from sglang_dcp.upstream.observe.host_clock import HostClock
from sglang_dcp.upstream.router.placement_request import cost_model_of
from sglang_dcp.upstream.step.columns import SyncRow
from sglang_dcp.upstream.step.own_batch import OwnBatch
from sglang_dcp.upstream.step.queues import Queues

if TYPE_CHECKING:
    from sglang_dcp.upstream.disaggregation.destinations import Destinations
    from sglang_dcp.upstream.layers.graphs import GraphEngine
    from sglang_dcp.upstream.pool.kv_pool import LedgerAllocator


class StepObserver(Protocol):
    """Takes note of steps and ends of requests: the metrics, where they are on."""

    def after_step(self, runtime: Runtime) -> None: ...

    def observe_end(self, where: dict[str, Any]) -> None: ...


@dataclass
class Counters:
    """Forward passes that this instance ran as a CUDA graph (sharded_graph_steps: those of them with sharded rows), and otherwise.
    crossing_steps: those in which it shared a row with an instance of another node."""

    graph_steps: int = 0
    sharded_graph_steps: int = 0
    eager_steps: int = 0
    crossing_steps: int = 0


@dataclass
class Runtime:
    """mode: what the step runs as, since its settling. own_batch: the rows of the step beside those of the step before; rows: with
    those of other homes. graphs: None where sharded steps run eagerly. layer_roll: attention layers of the eager sharded step being run,
    as they enter our path. givable_pages: free ones and what eviction would free, when the last step was synchronised. idle_audited: the
    pool was looked at since this instance fell idle; audit_every_round: it is looked at in every one. metrics: None without
    --enable-metrics. driver: the StepDriver, which hooks of the step call. destinations: of K/V that prefill servers send; None where
    there are none.
    """

    scheduler: Any
    config: DynCpConfig
    participant: Participant
    pool: LedgerAllocator
    transport: Transport
    control_group: Any
    graphs: GraphEngine | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    partial_attention: PartialAttention = torch_partial_attention
    layer_roll: LayerRoll = field(default_factory=lambda: LayerRoll({}))
    queues: Queues = field(default_factory=Queues)
    counters: Counters = field(default_factory=Counters)
    mode: StepMode = STOCK
    givable_pages: int = 0
    idle_audited: bool = False
    audit_every_round: bool = False
    sync_row: SyncRow = field(default_factory=SyncRow)
    host_clock: HostClock = field(default_factory=HostClock)
    request_log: RequestLog = field(default_factory=RequestLog)
    metrics: StepObserver | None = None
    driver: Any = None
    destinations: Destinations | None = None
    own_batch: OwnBatch = field(init=False)
    rows: StepRows = field(init=False)

    def __post_init__(self) -> None:
        self.own_batch = OwnBatch(self.participant)
        self.rows = StepRows(self.participant, self.own_batch)


def cluster_of(config: DynCpConfig, num_instances: int, num_pages: int, page_size: int) -> Cluster:
    """What the ledger computes from, by the server's settings: the same on every instance, or they do not start (agreement.py)."""
    limits, cost_model = config.split_limits(num_instances, num_pages), cost_model_of(config, num_instances)
    return Cluster(limits, page_size, cost_model, config.most_retained(num_pages))
