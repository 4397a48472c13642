"""Predicted time of one decode step from what every instance holds.

Inside a layer the MoE exchange is a barrier, so a layer lasts as long as its slowest instance, twice:

    layer = max_i(attention_i + exchange_i + dispatch_i) + experts(mean batch) + max_i(combine_i) + constant part
    step  = num_layers * layer + host part (which grows with the sharded rows, where a model says so)

attention_i follows the KV tokens that instance i reads, dispatch_i and combine_i the batch it is home to. Constants come from a
data file per (model, GPU); each carries its source. All times are microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

DATA_FOLDER = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class InstanceWork:
    """What one instance does in a step. `routed_*` count rows whose home and shard differ; `remote_*` those of them that cross nodes."""

    kv_tokens: int
    attention_rows: int
    home_requests: int
    routed_out: int = 0
    routed_in: int = 0
    remote_out: int = 0
    remote_in: int = 0


@dataclass(frozen=True, slots=True)
class CostModel:
    """Constants of one model on one kind of GPU at one expert-parallel size; microseconds per layer unless the name says otherwise.

    sharded_step_*: host time that a step with routed rows takes more, and that each of them adds. The constants that ship have none, so
    the simulator does not know it; those that a server takes do (served_model.py).
    """

    name: str
    num_instances: int
    num_layers: int
    gpus_per_node: int
    attention_fixed_us: float
    attention_us_per_token: float
    attention_us_per_row: float
    projection_us: float
    expert_weight_us: float
    expert_us_per_request: float
    layer_other_us: float
    dispatch_fixed_us: float
    dispatch_us_per_request: float
    combine_fixed_us: float
    combine_us_per_request: float
    exchange_fixed_us: float
    exchange_us_per_row: float
    remote_exchange_fixed_us: float
    remote_exchange_us_per_row: float
    step_fixed_us: float
    prefill_us_per_token: float
    prefill_attention_us_per_token_context: float
    sharded_step_fixed_us: float = 0.0
    sharded_step_us_per_row: float = 0.0
    pool_tokens: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith(("_us", "_us_per_token", "_us_per_row", "_us_per_request", "_context")) and not value >= 0:
                raise ValueError(f"cost model {self.name}: {field.name} must be >= 0, got {value}")
        if self.num_instances < 1 or self.num_layers < 1 or self.gpus_per_node < 1:
            raise ValueError(f"cost model {self.name}: instances, layers and GPUs per node must be >= 1")

    @property
    def constant_layer_us(self) -> float:
        """The part of a layer that no placement changes."""
        return self.attention_fixed_us + self.projection_us + self.layer_other_us + self.dispatch_fixed_us + self.combine_fixed_us

    @property
    def request_us(self) -> float:
        """What one more home request adds to its instance's layer."""
        return self.dispatch_us_per_request + self.combine_us_per_request

    @property
    def sharded_fixed_us(self) -> float:
        """The host's part of a first sharded row, spread over the layers."""
        return self.sharded_step_fixed_us / self.num_layers

    @property
    def sharded_row_us(self) -> float:
        """The host's part of one more routed row, spread over the layers."""
        return self.sharded_step_us_per_row / self.num_layers

    def instance_us(self, work: InstanceWork) -> float:
        """Attention, exchange beyond its fixed part, and dispatch of one instance in one layer."""
        rows = max(work.routed_out, work.routed_in)
        remote_rows = max(work.remote_out, work.remote_in)
        return (
            self.attention_us_per_token * work.kv_tokens
            + self.attention_us_per_row * work.attention_rows
            + self.exchange_us_per_row * (rows - min(rows, remote_rows))
            + self.remote_exchange_us_per_row * remote_rows
            + self.dispatch_us_per_request * work.home_requests
        )

    def expert_us(self, mean_batch: float) -> float:
        """Expert GEMMs of one layer: reading the weights or computing, whichever is longer."""
        return max(self.expert_weight_us, self.expert_us_per_request * mean_batch)

    def exchange_us(self, work: Sequence[InstanceWork]) -> float:
        """Fixed part of the exchange: nothing when no row of the step is routed, for all instances when one is."""
        if any(item.remote_out or item.remote_in for item in work):
            return self.exchange_fixed_us + self.remote_exchange_fixed_us
        if any(item.routed_out or item.routed_in for item in work):
            return self.exchange_fixed_us
        return 0.0

    def layer_us(self, work: Sequence[InstanceWork]) -> float:
        """One layer of a step in which instance i does `work[i]`."""
        if not work:
            raise ValueError("cost model: a step needs at least one instance")
        batches = [item.home_requests for item in work]
        return (
            self.constant_layer_us
            + max(self.instance_us(item) for item in work)
            + self.exchange_us(work)
            + self.expert_us(sum(batches) / len(batches))
            + self.combine_us_per_request * max(batches)
        )

    def step_us(self, work: Sequence[InstanceWork]) -> float:
        """One decode step; the slowest instance ends it."""
        return self.num_layers * self.layer_us(work) + self.step_fixed_us + self.sharded_host_us(work)

    def sharded_host_us(self, work: Sequence[InstanceWork]) -> float:
        """What the host of the busiest instance does for its routed rows."""
        rows = max(max(item.routed_out, item.routed_in) for item in work)
        return self.sharded_step_fixed_us + self.sharded_step_us_per_row * rows if rows else 0.0

    def scaled(self, constant: str, factor: float) -> CostModel:
        """The same model with one constant multiplied: for sensitivity runs."""
        return replace(self, **{constant: getattr(self, constant) * factor})


def available_cost_models() -> list[str]:
    """Names that `load_cost_model` accepts besides a file path."""
    return sorted(path.name.removesuffix(".json") for path in DATA_FOLDER.glob("*.json"))


def load_cost_model(name_or_path: str, num_instances: int) -> CostModel:
    """Reads `data/<name>.json` (for example `deepseek-v3.h200` or `cpu`) or a file of the same form.

    The expert-parallel constants are those of the largest tabulated size <= `num_instances`, else the smallest. Raises
    ValueError naming the file and the key when something is missing, FileNotFoundError listing the known names.
    """
    path, data = read_constants(name_or_path)
    return build_cost_model(path, data, num_instances)


def read_constants(name_or_path: str) -> tuple[Path, dict]:
    """(file, content). Raises as `load_cost_model`."""
    path = Path(name_or_path)
    if not name_or_path.endswith(".json"):
        path = DATA_FOLDER / f"{name_or_path}.json"
    if not path.is_file():
        raise FileNotFoundError(f"cost model {name_or_path!r}: no such file; known names: {', '.join(available_cost_models())}")
    try:
        return path, json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"cost model {path}: not JSON: {error}") from error


def build_cost_model(path: Path, data: dict, num_instances: int, *, serving: bool = False) -> CostModel:
    """serving: with the constants of this runtime, where the file has some (`serving`), in place of the authors'."""
    try:
        return _parse(data, num_instances, data.get("serving", {}) if serving else {})
    except KeyError as error:
        raise ValueError(f"cost model {path}: key {error} is missing") from error
    except TypeError as error:
        raise ValueError(f"cost model {path}: {error}") from error


def _parse(data: dict, num_instances: int, replaced: dict) -> CostModel:
    sizes = sorted(int(size) for size in data["expert_parallel"])
    size = max((size for size in sizes if size <= num_instances), default=sizes[0])
    return CostModel(
        name=f"{data['model']}.{data['gpu']}",
        num_instances=num_instances,
        num_layers=data["num_layers"],
        gpus_per_node=data["gpus_per_node"],
        pool_tokens=_pool_tokens(data, num_instances),
        **{key: float(entry["value"]) for key, entry in (data["constants"] | replaced).items()},
        **{key: float(value) for key, value in data["expert_parallel"][str(size)].items()},
    )


def _pool_tokens(data: dict, num_instances: int) -> int | None:
    """KV tokens that fit one instance beside its weights; None when the file describes no memory, 0 when the weights do not fit."""
    memory = data.get("memory")
    if memory is None:
        return None
    free = (
        memory["gpu_bytes"] * memory["usable_fraction"]
        - memory["replicated_weight_bytes"]
        - memory["expert_weight_bytes"] / num_instances
        - memory["reserved_bytes"]
    )
    return max(0, int(free // (data["kv_bytes_per_token_layer"] * data["num_layers"])))
