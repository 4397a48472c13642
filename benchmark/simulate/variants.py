"""Policies by name as the simulator runs them: the served policies, the baselines, ablations and the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmark.simulate.engine import Simulation, SimulationSettings
from benchmark.simulate.results import SimulationResult
from benchmark.simulate.workloads import Requests, Workload
from sglang_dcp.policy.baselines import Local
from sglang_dcp.policy.cost_model import CostModel, load_cost_model
from sglang_dcp.policy.placement import make_policy
from sglang_dcp.policy.types import CapacityError, InstanceLoad, Placement, PlacementPolicy, PlacementRequest

SERVED = ("dual-balance", "length-buckets", "local-least-batch", "local-least-kv", "fixed-2", "fixed-4", "fixed-8")
ABLATIONS = ("dual-frozen", "dual-batch-blind", "dual-kv-blind", "dual-degree-1", "dual-exchange-twice", "dual-prefill-same")
VARIANTS = (
    *SERVED,
    *ABLATIONS,
    "dual-moves",
    "oracle",
    "oracle-exchange",
    "local-round-robin",
    "buckets-exchange-twice",
    "local-least-batch-prefill-same",
    "local-least-kv-prefill-same",
)
PAGE_SIZE = 64


@dataclass(frozen=True)
class Deployment:
    """A model on GPUs. `pool_tokens` None means derived from memory and weights, `node_size` None as many GPUs per node as the constants
    were measured with."""

    model: str = "deepseek-v3"
    gpu: str = "h200"
    num_instances: int = 32
    pool_tokens: int | None = None
    scale: tuple[str, float] | None = None
    node_size: int | None = None

    def cost_model(self) -> CostModel:
        """Constants of the deployment, one of them scaled when `scale` says so."""
        cost = load_cost_model(f"{self.model}.{self.gpu}", self.num_instances)
        cost = replace(cost, gpus_per_node=self.node_size or cost.gpus_per_node)
        return cost.scaled(*self.scale) if self.scale else cost

    def pool(self) -> int:
        """KV tokens per instance. Raises ValueError when the weights leave no room."""
        pool = self.pool_tokens if self.pool_tokens is not None else self.cost_model().pool_tokens
        if not pool:
            raise ValueError(
                f"{self.model} does not fit {self.num_instances} x {self.gpu}: its weights leave no KV pool (--instances, --pool-tokens)"
            )
        return int(pool)

    def label(self) -> str:
        """Unique text for result files."""
        pool = f"-pool{self.pool_tokens}" if self.pool_tokens is not None else ""
        scale = f"-{self.scale[0]}x{self.scale[1]:g}" if self.scale else ""
        nodes = f"-nodes{self.node_size}" if self.node_size is not None else ""
        return f"{self.model}.{self.gpu}x{self.num_instances}{nodes}{pool}{scale}"


class RoundRobin:
    """SGLang's default for data parallelism: in turn, whatever the load; past a pool that could never hold the request."""

    name = "local-round-robin"

    def __init__(self) -> None:
        self._turn = -1

    def place(self, request: PlacementRequest, loads: Sequence[InstanceLoad], page_size: int) -> Placement:
        """See PlacementPolicy."""
        needed = request.prompt_tokens + request.max_new_tokens
        for _ in loads:
            self._turn = (self._turn + 1) % len(loads)
            if loads[self._turn].kv_capacity >= needed:
                return Placement(self._turn, (self._turn,), (request.prompt_tokens,))
        raise CapacityError(f"{needed} tokens exceed {max(load.kv_capacity for load in loads)}, the KV capacity of one instance")


def _policy(name: str, cost: CostModel, num_instances: int, max_guest_fraction: float) -> PlacementPolicy:
    """The policy behind a variant; ablations blind the policy, not the clock."""
    degree, max_degree = None, num_instances
    if name == "local-round-robin":
        return RoundRobin()
    if name == "dual-batch-blind":
        cost = replace(cost, dispatch_us_per_request=0.0, combine_us_per_request=0.0)
    if name == "dual-kv-blind":
        cost = replace(cost, attention_us_per_token=1e-12)
    if name == "dual-degree-1":
        max_degree = 1
    served = name.removesuffix("-prefill-same")
    if served.startswith("dual"):
        served = "dual-balance"
    if served.startswith("buckets"):
        served = "length-buckets"
    if served.startswith("fixed-"):
        served, degree = "fixed", int(name.removeprefix("fixed-"))
    return make_policy(
        served,
        num_instances=num_instances,
        page_size=PAGE_SIZE,
        cost_model=cost,
        degree=degree,
        max_degree=max_degree,
        max_guest_fraction=max_guest_fraction,
    )


def simulate(
    name: str,
    deployment: Deployment,
    workload: Workload,
    requests: Requests,
    *,
    progress=None,
    step_hook=None,
    **overrides,
) -> SimulationResult:
    """Runs a variant. The oracle is one instance of the whole cluster's pool with perfectly divided work and a free exchange;
    `oracle-exchange` pays the fixed part of the exchange inside a node in every step, as whoever splits a request must."""
    if name not in VARIANTS:
        raise ValueError(f"policy {name!r}: expected one of {', '.join(VARIANTS)}")
    cost = deployment.cost_model()
    settings = SimulationSettings(
        num_instances=deployment.num_instances,
        instances_per_node=cost.gpus_per_node,
        pool_tokens=deployment.pool(),
        page_size=PAGE_SIZE,
        max_new_tokens=workload.max_new_tokens,
        max_degree=deployment.num_instances,
        moves=name == "dual-moves",
        grows=name.startswith("dual") and name not in ("dual-frozen", "dual-degree-1"),
        prefill="same" if name.endswith("prefill-same") else "elsewhere",
    )
    settings = replace(settings, **overrides)
    if name.startswith("oracle"):
        policy: PlacementPolicy = Local("least-kv")
        if name == "oracle-exchange":
            cost = replace(cost, layer_other_us=cost.layer_other_us + cost.exchange_fixed_us)
        cost, settings = _perfect(cost, settings)
    else:
        if name.endswith("exchange-twice"):
            for constant in ("exchange_fixed_us", "exchange_us_per_row", "remote_exchange_fixed_us", "remote_exchange_us_per_row"):
                cost = cost.scaled(constant, 2.0)
        policy = _policy(name, cost, deployment.num_instances, settings.max_guest_fraction)
    return Simulation(requests, policy, cost, settings, step_hook=step_hook, progress=progress).run()


def _perfect(cost: CostModel, settings: SimulationSettings) -> tuple[CostModel, SimulationSettings]:
    count = settings.num_instances
    divided = {
        name: getattr(cost, name) / count
        for name in ("attention_us_per_token", "dispatch_us_per_request", "combine_us_per_request", "expert_us_per_request")
    }
    perfect = replace(cost, num_instances=1, attention_us_per_row=cost.attention_us_per_row / count, **divided)
    whole = replace(
        settings, num_instances=1, pool_tokens=settings.pool_tokens * count, max_running=settings.max_running * count, grows=False
    )
    return perfect, whole
