"""Predicted time of one decode step from what every instance holds.

Inside a layer the MoE exchange is a barrier, so a layer lasts as long as its slowest instance, twice:

    layer = max_i(attention_i + exchange_i + dispatch_i) + experts(batch) + max_i(combine_i) + constant part
    step  = max(num_layers * layer + fixed part, host) + the host's part of sharded rows

attention_i follows the KV tokens, the rows and the longest row of instance i, dispatch_i and combine_i the batch it is home to. Constants
come from a data file per (model, GPU); each carries its source. All times are microseconds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from sglang_dcp.policy.attention_table import BFLOAT16, KV_DTYPES, OUR_SPLIT, table_constants

DATA_FOLDER = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True)
class InstanceWork:
    """What one instance does in a step. `routed_*` count rows whose home and shard differ; `remote_*` those of them that cross nodes.

    longest_row: tokens of the longest row here; 0 where that is not known. captured_rows: rows that the step's graph was captured with,
    padding included; 0: as many as it has. Both matter to kernels alone that do not split a long row over the whole GPU.
    """

    kv_tokens: int
    attention_rows: int
    home_requests: int
    routed_out: int = 0
    routed_in: int = 0
    remote_out: int = 0
    remote_in: int = 0
    longest_row: int = 0
    captured_rows: int = 0


def unsplit_tokens(work: InstanceWork, chunks: int) -> float:
    """Tokens of the longest run of one row that one thread block reads alone, where a kernel has `chunks` for all captured rows: each row
    has one, and the longest row gets what is left."""
    spare = chunks - max(work.captured_rows, work.attention_rows)
    return float(work.longest_row) if spare <= 0 else max(work.longest_row / (1 + spare), work.kv_tokens / chunks)


@dataclass(frozen=True, slots=True)
class CostModel:
    """Constants of one model on one kind of GPU at one expert-parallel size; microseconds per layer unless the name says otherwise.

    attention_us_per_unsplit_token, attention_chunks: see unsplit_tokens; 0 where long rows are split over all multiprocessors, as ours are.
    expert_token_share: experts of a token over all experts; 1 where every step is taken to read all expert weights.
    host_step_us: no step is shorter, however little the GPU does. sharded_step_*: host time that a step with routed rows takes more, and
    that each of them adds. The authors' constants have none of the three, so the simulator does not know them; those that a server takes
    do (served_model.py).
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
    attention_us_per_unsplit_token: float = 0.0
    attention_chunks: int = 0
    expert_token_share: float = 1.0
    host_step_us: float = 0.0
    pool_tokens: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.endswith(("_us", "_us_per_token", "_us_per_row", "_us_per_request", "_context")) and not value >= 0:
                raise ValueError(f"cost model {self.name}: {field.name} must be >= 0, got {value}")
        if not 0 < self.expert_token_share <= 1:
            raise ValueError(f"cost model {self.name}: expert_token_share must be in (0, 1], got {self.expert_token_share}")
        if self.num_instances < 1 or self.num_layers < 1 or self.gpus_per_node < 1:
            raise ValueError(f"cost model {self.name}: instances, layers and GPUs per node must be >= 1")

    def lone_row_us(self, tokens: float) -> float:
        """Attention lasts no less once a row of these tokens is there, where long rows are not split and all chunks are taken."""
        return self.attention_us_per_unsplit_token * tokens

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

    def attention_us(self, work: InstanceWork) -> float:
        """Attention of one instance in one layer, beyond its fixed part: the time of all bytes, or of one block's long row if longer."""
        us = self.attention_us_per_token * work.kv_tokens
        if self.attention_us_per_unsplit_token:
            us = max(us, self.attention_us_per_unsplit_token * unsplit_tokens(work, self.attention_chunks))
        return us + self.attention_us_per_row * work.attention_rows

    def instance_us(self, work: InstanceWork) -> float:
        """Attention and exchange beyond their fixed parts, and dispatch, of one instance in one layer."""
        rows = max(work.routed_out, work.routed_in)
        remote_rows = max(work.remote_out, work.remote_in)
        return (
            self.attention_us(work)
            + self.exchange_us_per_row * (rows - min(rows, remote_rows))
            + self.remote_exchange_us_per_row * remote_rows
            + self.dispatch_us_per_request * work.home_requests
        )

    def expert_us(self, num_requests: float) -> float:
        """Expert GEMMs of one layer for the whole batch: reading the weights of the experts that its tokens choose (evenly, one by one), or
        computing, whichever is longer."""
        chosen = 1.0 - (1.0 - self.expert_token_share) ** num_requests
        return max(self.expert_weight_us * chosen, self.expert_us_per_request * num_requests / self.num_instances)

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
            + self.expert_us(sum(batches))
            + self.combine_us_per_request * max(batches)
        )

    def step_us(self, work: Sequence[InstanceWork]) -> float:
        """One decode step; the slowest instance ends it."""
        device_us = self.num_layers * self.layer_us(work) + self.step_fixed_us
        return max(device_us, self.host_step_us) + self.sharded_host_us(work)

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
    path = DATA_FOLDER / f"{name_or_path}.json"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        raise FileNotFoundError(f"cost model {name_or_path!r}: no such file; known names: {', '.join(available_cost_models())}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"cost model {path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"cost model {path}: not a JSON object")
    return path, data


def build_cost_model(
    path: Path, data: dict, num_instances: int, *, serving: bool = False, kv_dtype: str = BFLOAT16, split: str = OUR_SPLIT
) -> CostModel:
    """serving: with the constants of this runtime in place of the authors': those of the file (`serving`), and for a file that ships, the
    card's attention with this `split` of long rows, or with ours. kv_dtype: of the pools; a file without constants of it (`kv_dtypes`)
    keeps its own."""
    try:
        replaced = _values(data.get("serving", {})) if serving else {}
        if serving:
            asked = ((kv, by) for by in (split, OUR_SPLIT) for kv in (kv_dtype, BFLOAT16))
            replaced |= next((found for kv, by in asked if (found := shipped_attention(path, data, kv, by))), {})
        return _parse(data, num_instances, replaced | _values(data.get("kv_dtypes", {}).get(kv_dtype, {})), KV_DTYPES[kv_dtype])
    except KeyError as error:
        raise ValueError(f"cost model {path}: key {error} is missing") from error
    except TypeError as error:
        raise ValueError(f"cost model {path}: {error}") from error


def shipped_attention(path: Path, data: dict, kv_dtype: str, split: str = OUR_SPLIT) -> dict[str, float]:
    """What was measured for the attention of the file's own model; of a file of the operator's, nothing beside it is taken."""
    if path.parent != DATA_FOLDER or "layer" not in data:
        return {}
    layer = data["layer"]
    shape = {"latent": layer["latent"], "num_heads": layer["num_heads"], "kv_bytes": data["kv_bytes_per_token_layer"]}
    return table_constants(data["gpu"], **shape, kv_dtype=kv_dtype, split=split)


def _values(entries: dict) -> dict[str, float]:
    return {key: float(entry["value"]) for key, entry in entries.items()}


def expert_parallel_size(data: dict, num_instances: int) -> int:
    """The tabulated size whose constants `num_instances` get: the largest that is not larger, else the smallest."""
    sizes = sorted(int(size) for size in data["expert_parallel"])
    return max((size for size in sizes if size <= num_instances), default=sizes[0])


def _parse(data: dict, num_instances: int, replaced: dict, kv_bytes: int) -> CostModel:
    constants = {key: float(value) for key, value in data["expert_parallel"][str(expert_parallel_size(data, num_instances))].items()}
    constants |= _values(data["constants"]) | replaced
    return CostModel(
        name=f"{data['model']}.{data['gpu']}",
        num_instances=num_instances,
        num_layers=data["num_layers"],
        gpus_per_node=data["gpus_per_node"],
        pool_tokens=_pool_tokens(data, num_instances, kv_bytes),
        attention_chunks=int(constants.pop("attention_chunks", 0)),
        **constants,
    )


def _pool_tokens(data: dict, num_instances: int, kv_bytes: int) -> int | None:
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
    token_bytes = data["kv_bytes_per_token_layer"] // KV_DTYPES[BFLOAT16] * kv_bytes
    return max(0, int(free // (token_bytes * data["num_layers"])))
