"""SGLang's FlashAttention 3 backend is given our schedules ahead of its layers."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from sglang_dcp.dataflow.attention import flash_schedule
from sglang_dcp.upstream.layers import backends, flash_schedules
from test.unit.dataflow.test_flash_attention3 import FakeSchedule


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeSchedule]:
    """The schedules that were made."""
    schedules: list[FakeSchedule] = []

    def make(*sizes: Any, **more: Any) -> FakeSchedule:
        schedules.append(FakeSchedule(*sizes, **more))
        return schedules[-1]

    monkeypatch.setattr(flash_schedule, "FlashSchedule", make)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))
    return schedules


def backend_of(heads: int, kv_heads: int = 4, head_dim: int = 128) -> Any:
    given = {"num_attention_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "page_size": 64}
    return SimpleNamespace(decode_num_splits=0, kv_cache_dtype=torch.bfloat16, _compute_scheduler_metadata=None, **given)


def test_a_step_s_rows_are_scheduled_for_all_its_layers(made: list[FakeSchedule], monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(flash_schedules, "check_layout", lambda *given: checked.append(given))
    backend = backend_of(32)
    flash_schedules.schedule_ahead(backend, "cpu")
    assert backend.decode_num_splits == 33 and checked == [(32, 4, 128, torch.bfloat16, 64, True, "cpu")]
    assert [schedule.sizes[0] for schedule in made] == [64, 128, 256, 512], "device code is there before the first step"
    lengths = torch.tensor([7, 1, 1], dtype=torch.int32)
    first = backend._compute_scheduler_metadata(3, 7, lengths, None)
    again = backend._compute_scheduler_metadata(3, 8, lengths + 1, None)
    assert first is again is made[-1].metadata and made[-1].planned == [[7, 1, 1], [8, 2, 2]] and len(made) == 5
    assert made[-1].sizes == (3, 4, 33, "cpu") and made[-1].more["causal"]


def test_more_rows_than_code_was_built_for_are_left_to_the_library(made: list[FakeSchedule]) -> None:
    schedules = flash_schedules.FlashSchedules(4, 64, torch.bfloat16, "cpu")
    assert schedules(513, 1, torch.ones(513, dtype=torch.int32), None) is None and len(made) == 4
    assert schedules(0, 0, torch.ones(0, dtype=torch.int32), None) is None and len(made) == 4
    assert not made[0].more["causal"], "heads of 64 elements"


def test_heads_that_do_not_fit_a_tile_are_left_to_the_library(made: list[FakeSchedule]) -> None:
    backend = backend_of(128, kv_heads=1)
    flash_schedules.schedule_ahead(backend, "cpu")
    assert backend.decode_num_splits == 128 and backend._compute_scheduler_metadata is None and made == []
    assert backend._disable_scheduler_metadata_precompute, "SGLang would schedule for a number of parts of its own"


@pytest.mark.parametrize(("own", "wanted"), [(True, [("fa3", "cuda")]), (False, [])], ids=["auto", "stock"])
def test_a_server_schedules_ahead_unless_it_is_to_split_as_stock(monkeypatch: pytest.MonkeyPatch, own: bool, wanted: list[Any]) -> None:
    module = ModuleType("sglang.srt.layers.attention.flashattention_backend")
    module.__dict__["FlashAttentionBackend"] = None
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(backends, "make_backend_class", lambda stock, kernel: lambda runner: SimpleNamespace(kernel=kernel))
    monkeypatch.setattr(backends, "check_kv_type", lambda runner, name: None)
    monkeypatch.setattr(backends, "splits_long_rows", lambda: own)
    asked: list[Any] = []
    monkeypatch.setattr(flash_schedules, "schedule_ahead", lambda backend, device: asked.append((backend.kernel, device)))
    runner = SimpleNamespace(use_mla_backend=False, device="cuda", kv_cache_dtype=torch.bfloat16)
    assert backends.create_fa3(runner).dyncp_runner is runner and asked == wanted


def test_sglang_asks_as_it_did() -> None:
    """Read from its source: SGLang's backend imports on a GPU alone."""
    spec = importlib.util.find_spec("sglang.srt")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("SGLang is not installed")
    source = Path(spec.submodule_search_locations[0], "layers", "attention", "flashattention_backend.py").read_text()
    functions = {node.name: node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)}
    asked = [argument.arg for argument in functions["_compute_scheduler_metadata"].args.args]
    assert asked == ["self", "batch_size", "max_seq_len_k", "cache_seqlens", "cu_seqlens_q"]
    # Into a buffer of four vectors and a counter, cut to what it is given; the decode's call takes both.
    assert "1 + b_rounded * 4" in source and "self._sched_meta_buf[:n] = sched" in source
    decode = ast.unparse(functions["forward_decode"])
    assert "scheduler_metadata=sched_meta" in decode and "self.decode_num_splits" in decode
