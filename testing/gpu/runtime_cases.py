"""What the runtime check serves: names of cases, sizes of prompts and pools, bounds, and the servers of each case."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from testing.gpu.servers import GpuServer

CASE_NAME = re.compile(r"(gqa|mla|oss|step)([48]?)(?:_(nccl|gloo|f32|flashmla_fp8|flashmla|fa3_fp8|fa3|fp8|nodes|tp2))?")
WINDOW_MODELS = ("oss", "step")
PAGE_SIZE, FLASH_MLA_PAGE_SIZE = 16, 64
NEW_TOKENS = 24
COST_MODEL = "cpu"
"""Constants of the tiny models, on a GPU too: what does not fit one pool is spread over as many as are asked for here."""
CHUNK_TOKENS = 512
"""Prefill tokens of one instance in one step."""


@dataclass(frozen=True)
class Sizes:
    """pool: of an instance. lengths: prompts that fit one, and have a page for every shard. longs: prompts longer than one pool, than two
    ... growing: (shards at the start, prompt that fits them, output that does not)."""

    pool: int
    lengths: tuple[int, ...]
    longs: tuple[int, ...]
    growing: tuple[tuple[int, int, int], ...]
    soak_requests: int
    soak_new_tokens: int
    new_tokens: int = NEW_TOKENS


SIZES = {
    "cuda": Sizes(4096, (40, 150, 333, 800, 1500, 2600, 3300), (6000,), ((1, 4020, 120),), 40, 40),
    "cpu": Sizes(1024, (40, 150, 333, 800), (1500,), ((1, 1000, 40),), 10, 40),
}
"""Of two instances."""
FOUR_SIZES = {
    "cuda": Sizes(2048, (80, 333, 800, 1500), (3000, 5000), ((1, 2010, 56), (2, 4060, 50)), 24, 16, new_tokens=12),
    "cpu": Sizes(512, (80, 150, 333), (700, 1200), ((1, 490, 40), (2, 985, 60)), 8, 16, new_tokens=12),
}
"""Less of everything: a GPU that four processes share runs them in turns, and an exchange of a layer takes a turn of each."""
NODE_SIZES = {
    "cuda": replace(FOUR_SIZES["cuda"], longs=(3000,), growing=((1, 2010, 56),)),
    "cpu": replace(FOUR_SIZES["cpu"], longs=(700,), growing=((1, 490, 40),)),
}
"""Of four instances in two nodes, or two of two slices each: no request has more than two pools."""
NODE_SIZE = SLICES = 2
EIGHT_SIZES = {
    "cuda": Sizes(1024, (160, 333, 800), (1500, 2600), ((1, 1000, 40),), 16, 12, new_tokens=8),
    "cpu": Sizes(512, (160, 333), (700,), ((1, 490, 40),), 8, 12, new_tokens=8),
}
FLOAT32_SIZES = Sizes(2048, (40, 333, 800, 1500), (3000,), ((1, 2000, 80),), 16, 16)

BOUNDS: dict[str, float] = {"mean_factor": 2.0, "mean_slack": 5e-3, "p99_factor": 2.0, "p99_slack": 5e-2, "tie_gap": 0.25}
"""bfloat16: sharded <= factor * unsharded + slack, because a partial result is rounded to bfloat16 once more than an unsharded one.

tie_gap: where stock's best two tokens are closer than this, either may be chosen.
"""
FP8_BOUNDS = BOUNDS | {"tie_gap": 0.6}
"""FP8 K/V: a last bit of bfloat16, which another batch changes, can move an element of the pool by 6 %. Unsharded answers of two instances
then differ from one's by 0.08 on average and 0.55 at most (H200, four layers of random weights), and so do sharded ones."""
FLOAT32_BOUNDS: dict[str, float] = {"mean": 2e-5, "max": 2e-4, "tie_gap": 1e-3}
"""float32: of every log-probability, whatever the unsharded server does. This model in float32 differs from itself in float64 by 4.6e-6 on
average and 2.5e-5 at most over 1,500 tokens (transformers, CPU); two servers may differ by twice that, and sum in other orders."""
PLUGINS = {("cuda", "fp8"): ("kv_scales",), ("cuda", "fa3_fp8"): ("kv_scales",), ("cpu", "oss"): ("sinks_on_cpu",)}
"""By device, and kind of case or model. Latent attention is served with scales of 1."""
PLAIN_TORCH = {"SGLANG_FORCE_FUSED_OP_BACKEND": "torch"}


@dataclass(frozen=True)
class Case:
    """A pair of servers, by name: gqa or mla (two instances over peer memory), gqa4 or mla4 (four), gqa8 or mla8 (eight), with _nccl or
    _gloo (that transport) or _f32 (float32 in plain torch over NCCL, GQA alone) or _flashmla (that backend, MLA alone), _fa3 (SGLang's
    default under unsharded steps, GQA alone) or _fp8 (quantised K/V under FlashInfer, GQA alone) or _fa3_fp8 or _flashmla_fp8 (under these
    backends; GQA with scales that are not 1) or _nodes (nodes of two, on one host; of four instances alone) or _tp2 (attention TP: two
    slices of each of two instances). oss (gpt-oss) and step (Step-3.5): models with window layers, under fa3."""

    name: str
    model: str
    instances: int
    kind: str | None

    @classmethod
    def parse(cls, name: str) -> Case:
        """ValueError for a name that is no case."""
        found = CASE_NAME.fullmatch(name)
        if found is None:
            raise ValueError(
                f"{name!r} is no case: gqa, mla, oss or step, 4 or 8 for so many instances, _nccl, _gloo, _f32, _flashmla, "
                "_flashmla_fp8, _fa3, _fa3_fp8, _fp8, _nodes or _tp2"
            )
        model, instances, kind = found.groups()
        if kind in ("f32", "fa3", "fa3_fp8", "fp8") and model == "mla":
            raise ValueError(f"mla_{kind}: served for GQA alone")
        if kind is not None and model in WINDOW_MODELS:
            raise ValueError(f"{name}: models with window layers have the one case {model}")
        if kind in ("flashmla", "flashmla_fp8") and model == "gqa":
            raise ValueError(f"gqa_{kind}: FlashMLA serves MLA alone")
        if kind == "nodes" and instances != "4":
            raise ValueError(f"{name}: two nodes of two are four instances, {model}4_nodes")
        if kind == "tp2" and instances:
            raise ValueError(f"{name}: two slices of each of two instances, {model}_tp2")
        return cls(name, model, int(instances or 2), kind)

    @property
    def is_float32(self) -> bool:
        return self.kind == "f32"

    @property
    def is_quantised(self) -> bool:
        return self.kind in ("fp8", "fa3_fp8", "flashmla_fp8")

    @property
    def backend(self) -> str | None:
        """The attention backend that is named on a GPU, ours and stock's alike where stock is of this case alone."""
        kind = self.kind or ""
        if self.is_float32:
            return "torch_native"
        if self.model in WINDOW_MODELS:
            return "fa3"
        return "flashinfer" if kind == "fp8" else next((name for name in ("flashmla", "fa3") if kind.startswith(name)), None)

    @property
    def node_size(self) -> int:
        """Instances that a request may have shards on."""
        return NODE_SIZE if self.kind == "nodes" else self.instances

    @property
    def slices(self) -> int:
        """Processes of an instance."""
        return SLICES if self.kind == "tp2" else 1

    @property
    def num_layers(self) -> int | None:
        """Of the random model; None: as many as it has."""
        if self.model in WINDOW_MODELS:
            return None  # of both kinds
        return 2 if self.instances * self.slices > 2 else None

    @property
    def num_experts(self) -> int | None:
        """Of the random model: one per instance at least. None: as many as it has."""
        return self.instances if self.instances > 4 else None

    @property
    def shape(self) -> tuple[str, int | None, int | None]:
        """What the random model of this case depends on."""
        return self.model, self.num_layers, self.num_experts

    @property
    def page_size(self) -> int:
        return FLASH_MLA_PAGE_SIZE if self.backend == "flashmla" else PAGE_SIZE

    def sizes(self, device: str) -> Sizes:
        if self.kind in ("nodes", "tp2"):
            return NODE_SIZES[device]
        if self.instances > 2:
            return (FOUR_SIZES if self.instances == 4 else EIGHT_SIZES)[device]
        if self.backend == "flashmla":  # every prompt has a page for each shard
            return replace(SIZES[device], lengths=tuple(length for length in SIZES[device].lengths if length > self.page_size))
        return FLOAT32_SIZES if self.is_float32 and device == "cuda" else SIZES[device]

    def bounds(self, device: str) -> Mapping[str, float]:
        if device == "cuda" and self.is_quantised:
            return FP8_BOUNDS
        return FLOAT32_BOUNDS if self.is_float32 and device == "cuda" else BOUNDS

    def flags(self, device: str, *, dyncp: bool) -> tuple[str, ...]:
        flags: tuple[str, ...] = ()
        if self.model == "mla" and device == "cuda":
            flags += ("--flashinfer-mla-disable-ragged",)
        if self.is_float32 and device == "cuda":
            flags += ("--dtype", "float32")
        if self.model == "step":
            flags += ("--trust-remote-code",)
        if self.model in WINDOW_MODELS and device == "cpu" and not dyncp:
            flags += ("--disable-hybrid-swa-memory",)  # SGLang's torch_native looks for window K/V at the ids of the other pool
        if self.model == "oss":
            flags += ("--moe-runner-backend", "triton")  # SGLang's choice differs with the number of instances
        if self.is_quantised and device == "cuda":
            flags += ("--kv-cache-dtype", "fp8_e4m3")
        if self.backend is not None and device == "cuda" and (dyncp or self.kind != "flashmla"):
            flags += ("--attention-backend", self.backend)
            if self.backend == "flashmla":
                flags += ("--page-size", str(self.page_size))
        if not dyncp:
            return flags
        flags += ("--dyncp-cost-model", COST_MODEL)
        if self.kind in ("nccl", "gloo"):
            flags += ("--dyncp-transport", self.kind)
        elif self.is_float32:
            flags += ("--dyncp-transport", "nccl" if device == "cuda" else "gloo")
        elif self.kind == "nodes":
            flags += ("--dyncp-node-size", str(self.node_size))
        if self.kind == "gloo":
            flags += ("--disable-overlap-schedule",)
        return flags

    def server(self, path: Path, device: str, *, dyncp: bool, one_gpu: bool) -> GpuServer:
        """Ours, or stock: one instance whose pool holds what all of ours do, and more."""
        pool = self.sizes(device).pool
        plain = self.is_float32 and device == "cuda"
        return GpuServer(
            self.name if dyncp else f"{self.stock_name}_stock",
            path,
            self.instances if dyncp else 1,
            pool if dyncp else 4 * pool,
            dyncp,
            self.flags(device, dyncp=dyncp),
            chunk_tokens=CHUNK_TOKENS if dyncp and device == "cuda" else None,
            slices=self.slices if dyncp else 1,
            one_gpu=one_gpu,
            device=device,
            environment=dict(PLAIN_TORCH) if plain else {},
            plugins=("plain_ops",) if plain else PLUGINS.get((device, self.kind or self.model), ()),
        )

    @property
    def stock_name(self) -> str:
        """Cases of the same name share a stock server."""
        return self.name.removesuffix("_nccl").removesuffix("_gloo").removesuffix("_flashmla").removesuffix("_nodes")


def build_servers(
    cases: Sequence[Case], models: Mapping[str, Path], device: str, *, one_gpu: bool, with_stock: bool
) -> dict[str, tuple[GpuServer, GpuServer | None]]:
    """Name of the case -> (ours, stock). models: by case.stock_name."""
    pairs: dict[str, tuple[GpuServer, GpuServer | None]] = {}
    stock: dict[str, GpuServer] = {}
    for case in cases:
        path = models[case.stock_name]
        if with_stock and case.stock_name not in stock:
            stock[case.stock_name] = case.server(path, device, dyncp=False, one_gpu=one_gpu)
        pairs[case.name] = case.server(path, device, dyncp=True, one_gpu=one_gpu), stock.get(case.stock_name)
    return pairs


def within_bounds(sharded: dict[str, Any], unsharded: dict[str, Any], bounds: Mapping[str, float] = BOUNDS) -> bool:
    """Whether a summary of differences from stock holds. unsharded: of the same server without sharded requests."""
    ours, base = sharded["all"], unsharded["all"]
    if sharded["parted_without_tie"]:
        return False
    if "max" in bounds:
        return bool(ours["count"] and ours["mean"] <= bounds["mean"] and ours["max"] <= bounds["max"])
    return bool(
        ours["mean"] <= bounds["mean_factor"] * base["mean"] + bounds["mean_slack"]
        and ours["p99"] <= bounds["p99_factor"] * base["p99"] + bounds["p99_slack"]
    )
