"""Where the benchmark variable is taken, and where it is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_dcp.upstream.layers.synthetic_prefill import BenchmarkModeError, check_use, fill_pool, is_enabled


def test_values() -> None:
    assert not is_enabled({}) and not is_enabled({"SGLANG_DYNCP_BENCHMARK": "0"})
    assert is_enabled({"SGLANG_DYNCP_BENCHMARK": "1"})


def test_another_value_is_refused() -> None:
    with pytest.raises(BenchmarkModeError, match="SGLANG_DYNCP_BENCHMARK='yes'"):
        is_enabled({"SGLANG_DYNCP_BENCHMARK": "yes"})


def test_a_stock_server_refuses_it() -> None:
    check_use(True, {"SGLANG_DYNCP_BENCHMARK": "1"})
    with pytest.raises(BenchmarkModeError, match="without --enable-dyncp"):
        check_use(False, {"SGLANG_DYNCP_BENCHMARK": "1"})


def test_noise_is_the_same_for_the_same_rank() -> None:
    pools = [SimpleNamespace(k_buffer=[torch.zeros(64, 2)], v_buffer=[torch.zeros(64, 2)]) for _ in range(3)]
    for pool, rank in zip(pools, (0, 0, 1), strict=True):
        fill_pool(pool, rank)
    assert torch.equal(pools[0].k_buffer[0], pools[1].k_buffer[0]) and not torch.equal(pools[0].k_buffer[0], pools[2].k_buffer[0])
    assert 0.5 < float(pools[0].v_buffer[0].std()) < 1.5


def test_an_unknown_pool_is_refused() -> None:
    with pytest.raises(BenchmarkModeError, match="KV pool"):
        fill_pool(SimpleNamespace(), 0)
