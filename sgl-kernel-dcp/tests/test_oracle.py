"""The oracle against attention over all keys at once."""

from __future__ import annotations

import random

import pytest
import torch
from sgl_kernel_dcp import StepMessage, TableShape

from sglang_dcp.dataflow.merge import merge_partial_states
from sglang_dcp.dataflow.reference import route_tables, sharded_attention
from testing.kernels.random_steps import PATTERNS, random_routes, without_lone_rows


def brute_force(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """float64, head by head. query [heads, dim], keys [n, kv_heads, dim]."""
    heads, kv_heads = query.shape[0], keys.shape[1]
    outputs, lses = [], []
    for head in range(heads):
        logits = keys[:, head * kv_heads // heads].double() @ query[head].double() * scale
        outputs.append(torch.softmax(logits, 0) @ values[:, head * kv_heads // heads].double())
        lses.append(torch.logsumexp(logits, 0))
    return torch.stack(outputs), torch.stack(lses)


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("cuts", [[0], [5], [0, 0, 7], [1, 1, 1], [3, 0, 50, 1], [1] * 16])
def test_sharded_attention_equals_attention_over_all_keys(cuts: list[int], kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(len(cuts) * 10 + kv_heads)
    total = max(sum(cuts), 0)
    query = torch.randn(1, 8, 16, generator=generator) * 3
    keys = torch.randn(total, kv_heads, 16, generator=generator)
    values = torch.randn(total, kv_heads, 12, generator=generator)
    parts = list(zip(keys.split(cuts), values.split(cuts), strict=True))
    state = sharded_attention(query, [parts], scale=0.25)
    if total == 0:
        assert torch.equal(state.output, torch.zeros_like(state.output)) and bool((state.lse == float("-inf")).all())
        return
    output, lse = brute_force(query[0], keys, values, 0.25)
    torch.testing.assert_close(state.output[0].double(), output, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(state.lse[0].double(), lse, atol=2e-6, rtol=2e-6)


def test_merge_ignores_what_a_neutral_partial_holds() -> None:
    outputs = torch.randn(3, 2, 4, 8)
    lses = torch.randn(3, 2, 4)
    expected = merge_partial_states(outputs[1:], lses[1:])
    outputs[0], lses[0] = float("nan"), float("-inf")
    merged = merge_partial_states(outputs, lses)
    torch.testing.assert_close(merged.output, expected.output)
    torch.testing.assert_close(merged.lse, expected.lse)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("num_instances", [1, 2, 5, 16])
def test_both_ends_of_every_route_agree(pattern: str, num_instances: int) -> None:
    shape = TableShape(num_instances, 9, 40, 20, 1, 1, 1)
    routes, tails = random_routes(random.Random(num_instances), shape, pattern)
    tables = [route_tables(routes, tails, rank) for rank in range(num_instances)]
    for home, own in enumerate(tables):
        for row, (sends, merges) in enumerate(zip(own.send, own.merge, strict=True)):
            assert [shard for shard, _ in sends] == [shard for shard, _ in merges] == sorted(routes[home][row])
            for (shard, slot), (_, source) in zip(sends, merges, strict=True):
                assert tables[shard].attention[slot] == (home, row)
                assert tables[shard].give_back[slot] == (None if shard == home else (home, source))
        for row, target in enumerate(own.kv_send):
            assert target is None or tables[target[0]].kv_receive[target[1]] == (home, row)
        returned = [source for merges in own.merge for shard, source in merges if shard != home]
        assert sorted(returned) == list(range(len(returned)))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("num_instances", [2, 5, 16])
def test_rows_that_others_attend_alone_change_nothing_here(pattern: str, num_instances: int) -> None:
    """So they need not be told: an instance's tables stay when such rows come and go elsewhere."""
    shape = TableShape(num_instances, 9, 40, 20, 1, 1, 1)
    routes, tails = random_routes(random.Random(num_instances), shape, pattern)
    for rank in range(num_instances):
        fewer = without_lone_rows(StepMessage(routes, tails, []), rank)
        old, new = route_tables(routes, tails, rank), route_tables(fewer.routes, fewer.tails, rank)
        assert (new.send, new.merge, new.kv_send, new.give_back) == (old.send, old.merge, old.kv_send, old.give_back)
        assert [home for home, _ in new.attention] == [home for home, _ in old.attention]
        assert [home for home, _ in new.kv_receive] == [home for home, _ in old.kv_receive]
