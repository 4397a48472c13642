"""A stand-in for the flash_mla library that computes with plain torch. Calls are checked against the installed library's signatures, which
are read from its source: it cannot be imported without a GPU."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sglang_dcp.dataflow.reference import partial_attention


def library_parameters(function: str) -> list[str]:
    spec = importlib.util.find_spec("flash_mla")
    if spec is None or spec.origin is None:
        pytest.skip("sgl-flash-mla is not installed")
    tree = ast.parse((Path(spec.origin).parent / "flash_mla_interface.py").read_text())
    (found,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    return [argument.arg for argument in found.args.args]


def bind(function: str, parameters: list[str], call: tuple, given: dict[str, Any]) -> dict[str, Any]:
    assert set(given) <= set(parameters), f"{function} has no parameter {set(given) - set(parameters)}"
    bound = dict(zip(parameters, call, strict=False))
    assert not set(bound) & set(given)
    return bound | given


class SchedMeta:
    """FlashMLASchedMeta, as far as it is used."""

    def __init__(self, tile_scheduler_metadata: torch.Tensor, num_splits: torch.Tensor) -> None:
        self.tile_scheduler_metadata, self.num_splits = tile_scheduler_metadata, num_splits


class FakeFlashMla:
    """The two functions. A schedule is the lengths it was made from: attention with another step's schedule fails."""

    def __init__(self) -> None:
        self.names = {name: library_parameters(name) for name in ("get_mla_decoding_metadata", "flash_mla_with_kvcache")}
        self.num_schedules = self.num_runs = 0

    def get_mla_decoding_metadata(self, *call: Any, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = bind("get_mla_decoding_metadata", self.names["get_mla_decoding_metadata"], call, given)
        lengths = arguments["seqlens_k"]
        assert lengths.dtype == torch.int32 and lengths.is_contiguous() and arguments["h_k"] == 1 and arguments["use_legacy"] is True
        self.num_schedules += 1
        return lengths.clone(), torch.zeros(len(lengths) + 1, dtype=torch.int32)

    def flash_mla_with_kvcache(self, *call: Any, **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        arguments = bind("flash_mla_with_kvcache", self.names["flash_mla_with_kvcache"], call, given)
        queries, cache, table, lengths = (arguments[name] for name in ("q", "k_cache", "block_table", "cache_seqlens"))
        rows, num_tokens, heads, dim = queries.shape
        assert (num_tokens, dim) == (1, 576) and cache.shape[1:] == (64, 1, 576) and arguments["head_dim_v"] == 512
        assert table.dtype == torch.int32 and table.stride(1) == 1 and table.shape[0] == rows and arguments["use_legacy"] is True
        schedule = arguments["tile_scheduler_metadata"].tile_scheduler_metadata
        assert torch.equal(schedule, lengths), "a schedule of another step"
        self.num_runs += 1
        quantised = queries.dtype == cache.dtype == torch.float8_e4m3fn
        assert bool(arguments.get("is_fp8_kvcache")) == quantised == ("descale_q" in arguments)
        assert int(lengths.min()) > 0 or not quantised, "the kernel over quantised latents wants a key in every row"
        queries, cache = (part.float().bfloat16() if quantised else part for part in (queries, cache))
        output, lse = torch.zeros(rows, 1, heads, 512, dtype=queries.dtype), torch.full((rows, heads, 1), float("inf"))
        for row, length in enumerate(lengths.tolist()):
            if length:
                keys = cache[table[row, : -(-length // 64)].long()].flatten(0, 1)[:length]
                state = partial_attention(queries[row], keys, keys[..., :512], scale=arguments["softmax_scale"])
                output[row], lse[row, :, 0] = state.output, state.lse[0]
        return output, lse


def install(monkeypatch: pytest.MonkeyPatch) -> FakeFlashMla:
    """Puts the stand-in where `import flash_mla` finds it."""
    fake = FakeFlashMla()
    library, interface = ModuleType("flash_mla"), ModuleType("flash_mla.flash_mla_interface")
    library.__dict__.update(get_mla_decoding_metadata=fake.get_mla_decoding_metadata, flash_mla_with_kvcache=fake.flash_mla_with_kvcache)
    interface.__dict__.update(FlashMLASchedMeta=SchedMeta)
    monkeypatch.setitem(sys.modules, "flash_mla", library)
    monkeypatch.setitem(sys.modules, "flash_mla.flash_mla_interface", interface)
    return fake
