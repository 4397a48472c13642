"""What a layer of an eager step costs beside its attention kernels: launches, and elements that they produce. Counted, never timed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sglang_dcp.dataflow import attention_step as layer
from sglang_dcp.dataflow.attention.paged_attention import PagedPartialAttention
from sglang_dcp.dataflow.contracts import GuestRow, HomeRow, KVScales, NewKV, PartialState
from sglang_dcp.dataflow.step_plan import build_step_plan

HEADS, KV_HEADS, DIM, PAGE = 8, 2, 16, 64
CHUNK = 8192
NO_LAUNCH = {"view", "slice", "select", "split", "split_with_sizes", "unsqueeze", "empty", "new_empty", "expand", "as_strided", "detach"}


class Launches(TorchDispatchMode):
    """Counts operations that would launch a kernel, and the elements of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name not in NO_LAUNCH and func is not torch.ops.aten.view.dtype:
            self.names[name] += 1
            self.elements += result.numel()
        return result

    @property
    def count(self) -> int:
        return sum(self.names.values())


class SilentKernel:
    """An attention kernel whose own launch is not counted; its results lie where it is told."""

    def __init__(self, shape: Any, page_size: int, device: Any) -> None:
        self.shape = shape

    def plan(self, table: Any, page_indices: torch.Tensor, *, causal: bool, window: int | None = None) -> None:
        shape = self.shape
        self.result = PartialState.neutral(table.num_queries, shape.num_heads, v_head_dim=shape.v_head_dim, dtype=shape.dtype, device="cpu")

    def run(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: PartialState | None, kv_scales: KVScales
    ) -> PartialState:
        return self.result if out is None else out


class Pool:
    def __init__(self) -> None:
        self.keys = torch.zeros(PAGE, KV_HEADS, DIM, dtype=torch.bfloat16)
        self.writes = 0

    def write(self, slots: torch.Tensor, new_kv: NewKV) -> None:
        self.writes += 1

    def keys_and_values(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.keys, self.keys


class Nowhere:
    """Brings as much as was announced."""

    def all_to_all(self, message: torch.Tensor, send_splits: Any, receive_splits: Any, **_: Any) -> torch.Tensor:
        assert message.is_contiguous() and message.numel() == sum(send_splits)
        return message.new_empty(sum(receive_splits))


def run_layer(home_rows: list[HomeRow], guest_rows: list[GuestRow], num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Launches of a layer that is not the step's first; a merge is one, which it is on a GPU."""
    plan = build_step_plan(0, 0, range(2), PAGE, num_tokens, home_rows, guest_rows)
    queries = torch.zeros(num_tokens, HEADS, DIM, dtype=torch.bfloat16)
    keys = torch.zeros(num_tokens, KV_HEADS, DIM, dtype=torch.bfloat16)
    attention, pool = PagedPartialAttention(PAGE, SilentKernel), Pool()
    counted = Launches()

    def merge(state: PartialState, merges: Any, own: PartialState, returned: PartialState) -> None:
        counted.names["merge"] += 1
        counted.elements += len(merges) * HEADS * DIM

    monkeypatch.setattr(layer, "merge_into", merge)
    arguments = (queries, NewKV(keys, keys, latent=False), plan, pool, attention, Nowhere())
    layer.attention_step(*arguments, scale=1.0, layer=0)
    pool.writes, counted.names, counted.elements = 0, Counter(), 0
    with counted:
        layer.attention_step(*arguments, scale=1.0, layer=1)
    counted.names["write"] = pool.writes
    return counted


def sequence(owners: list[int]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(owners), np.arange(1, len(owners) + 1)


SHARDED = sequence([1, 1, 0, 0])
DECODES = [HomeRow(i, 1, 200, *SHARDED) for i in range(16)]
CASES: dict[str, tuple[list[HomeRow], list[GuestRow], int, int, float]] = {
    "local prefill, a guest's decode": (
        [HomeRow(0, CHUNK, 0, *sequence([0] * 128))],
        [GuestRow(1, 1, 200, np.array([0, 1]), np.array([5, 6]))],
        CHUNK,
        21,
        7.6,
    ),
    "local prefill, a sharded decode": (
        [HomeRow(0, CHUNK - 1, 0, *sequence([0] * 128)), HomeRow(CHUNK - 1, 1, 200, *SHARDED)],
        [],
        CHUNK,
        45,
        19.8,
    ),
    "first chunk, half of it remote": ([HomeRow(0, CHUNK, 0, *sequence([1] * 64 + [0] * 64))], [], CHUNK, 41, 21.1),
    "chunk at home, earlier ones remote": ([HomeRow(0, CHUNK, CHUNK, *sequence([1] * 128 + [0] * 128))], [], CHUNK, 36, 18.8),
    "decodes of two homes": (DECODES, [GuestRow(1, 1, 200, np.array([0, 1]), np.array([5, 6]))] * 16, 16, 36, 23.9),
}
"""home rows, guest rows, tokens; then launches of a layer, and elements that they produced per query element, as of commit 730015a."""


@pytest.mark.parametrize("name", CASES)
def test_launches_of_a_layer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home_rows, guest_rows, num_tokens, launches_before, elements_before = CASES[name]
    counted = run_layer(home_rows, guest_rows, num_tokens, monkeypatch)
    elements = counted.elements / (num_tokens * HEADS * DIM)
    print(f"{name}: {launches_before} -> {counted.count} launches, {elements_before} -> {elements:.2f} per query element; {counted.names}")
    assert counted.count <= launches_before / 2
    assert elements <= elements_before / 3


def test_a_sharded_decode_leaves_the_prefill_beside_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is merged or moved is the one row; the 8,191 are written by their attention kernel, once."""
    home_rows, guest_rows, num_tokens, _, _ = CASES["local prefill, a sharded decode"]
    counted = run_layer(home_rows, guest_rows, num_tokens, monkeypatch)
    assert counted.elements < 1.2 * num_tokens * HEADS * DIM
