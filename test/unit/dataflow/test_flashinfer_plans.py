"""A captured decode is planned in full once, then by FlashInfer's short way, with the same arguments by the real signatures."""

from __future__ import annotations

import inspect
from typing import Any

import flashinfer
import flashinfer.decode
import numpy as np
import pytest
import torch

from sglang_dcp.dataflow.attention.flashinfer_graph import FlashInferDecode

ROWS = 3
real_plan = flashinfer.BatchDecodeWithPagedKVCacheWrapper._plan_impl
real_fast_plan = flashinfer.decode.fast_decode_plan


class FakeWrapper:
    """Notes what it is planned with."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def plan(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append(("full", inspect.signature(real_plan).bind(self, *args, **kwargs).arguments))

    def fast(self, *args: Any, **kwargs: Any) -> None:
        self.calls.append(("fast", inspect.signature(real_fast_plan).bind(self, *args, **kwargs).arguments))


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch) -> FlashInferDecode:
    monkeypatch.setattr(flashinfer, "BatchDecodeWithPagedKVCacheWrapper", FakeWrapper)
    monkeypatch.setattr(flashinfer.decode, "fast_decode_plan", FakeWrapper.fast)
    buffers = (torch.zeros(size, dtype=torch.int32) for size in (ROWS + 1, 100, ROWS))
    return FlashInferDecode(32, 4, 128, 64, 0.5, *buffers, own_split=False, kv_dtype=torch.float8_e4m3fn)


def test_the_first_plan_is_whole_and_the_others_copy_nothing(decode: FlashInferDecode) -> None:
    lengths = [[0, 2, 3, 3], [0, 5, 6, 9], [0, 1, 2, 3]]
    for indptr in lengths:
        decode.plan(torch.tensor(indptr, dtype=torch.int32), torch.ones(ROWS, dtype=torch.int32))
    kinds, calls = zip(*decode._wrapper.calls, strict=True)
    assert kinds == ("full", "fast", "fast")
    for indptr, call in zip(lengths, calls, strict=True):
        assert call["indptr"].tolist() == indptr and len(call["indices"]) == indptr[-1] and len(call["last_page_len"]) == ROWS
        assert (call["num_qo_heads"], call["num_kv_heads"], call["head_dim"], call["page_size"]) == (32, 4, 128, 64)
        assert (call["sm_scale"], call["q_data_type"], call["kv_data_type"]) == (0.5, torch.bfloat16, torch.float8_e4m3fn)
    assert [np.array(call["global_override_indptr_cpu"]).tolist() for call in calls[1:]] == lengths[1:], "no read from the device"
