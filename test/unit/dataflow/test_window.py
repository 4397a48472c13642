"""Window layers and attention sinks on the per-layer path, against attention over the whole sequence."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_dcp.dataflow.contracts import PartialState
from sglang_dcp.dataflow.graph.table_rows import ListedRow, PooledRow
from sglang_dcp.dataflow.graph.window_tables import WindowCaps
from sglang_dcp.dataflow.merge import add_sinks
from sglang_dcp.dataflow.reference import partial_attention
from sglang_dcp.dataflow.window import pool_rows, queries_that_see
from test.unit.dataflow.cluster import Cluster
from test.unit.dataflow.test_attention_step import check

GRID = list(itertools.product([2, 4], [1, 4, 16], [0, 1, 5, 31]))


@pytest.mark.parametrize(("num_instances", "page_size", "window"), GRID)
def test_random_steps(num_instances, page_size, window):
    """Random homes, lengths, page owners, chunks beside decodes; the window is shorter and longer than a page, a chunk and a prefix."""
    for seed in range(12):
        cluster = Cluster(seed, num_instances, page_size, latent=False, num_pages=200)
        cluster.window = window
        cluster.add_random_rows(int(cluster.rng.integers(1, 6)))
        check(cluster)


@pytest.mark.parametrize("window", [None, 0, 5])
def test_a_sink_counts_once_however_many_shards_there_are(window):
    for seed in range(12):
        cluster = Cluster(seed, 4, 4, latent=False)
        cluster.window, cluster.sinks = window, torch.tensor([0.5, -3.0, 4.0, 0.0])
        cluster.add_random_rows(4)
        check(cluster)


def test_sinks_are_those_of_gpt_oss():
    """Against transformers, which has a column for them in the softmax."""
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    queries, keys, values, sinks = torch.randn(1, 8, 3, 16), torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16), torch.randn(8) * 3
    module = SimpleNamespace(num_key_value_groups=4, sinks=sinks, training=False)
    mask = torch.full((3, 3), float("-inf")).triu(1)[None, None]
    expected, _ = eager_attention_forward(module, queries, keys, values, mask, scaling=0.25)
    at, per_token = torch.arange(3), (part[0].transpose(0, 1) for part in (queries, keys, values))
    state = partial_attention(*per_token, scale=0.25, query_positions=at, key_positions=at)
    add_sinks(state, sinks)
    torch.testing.assert_close(state.output, expected[0])


def test_only_who_holds_the_last_tokens_is_asked():
    cluster = Cluster(1, 3, 4, latent=False)
    cluster.window = 5
    cluster.add(home=0, prefix_len=13, num_new=1, owners=[1, 1, 2, 2])  # sees positions 8 to 13
    cluster.add(home=0, prefix_len=8, num_new=9, owners=[1, 2, 0, 0, 0])  # its queries 0 to 4 see 3 to 7, of which 1 holds 3 alone
    plans = [cluster.plan(rank)[0] for rank in range(3)]
    assert list(map(len, plans[0].send_queries)) == [0, 1, 6]
    assert plans[1].receive_query_splits == (1, 0, 0) and plans[2].receive_query_splits == (6, 0, 0)
    assert [row.num_keys for row in plans[2].pool_rows] == [6, 4, 4, 3, 2, 1]
    check(cluster)


@given(st.data())
def test_both_sides_count_alike(data):
    """What the home expects back from a shard is what the shard attends, and every query has the keys that it sees and no others."""
    page_size, window = data.draw(st.integers(1, 5)), data.draw(st.one_of(st.none(), st.integers(0, 12)))
    num_new, prefix_len = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 20))
    pages = np.array(sorted(data.draw(st.sets(st.integers(0, 7)))), dtype=np.int64)
    numbers = pages + 100
    rows = pool_rows(num_new, prefix_len, pages, numbers, page_size, window)
    assert sum(row.num_queries for row in rows) == queries_that_see(pages, num_new, prefix_len, page_size, window)
    held = [(int(page) * page_size + i, int(page + 100) * page_size + i) for page in pages for i in range(page_size)]
    end = prefix_len + 1 if num_new == 1 else prefix_len
    seen = []
    for row in rows:
        seen += [row.kv_slots.tolist()] * row.num_queries
    seen += [[]] * (num_new - len(seen))
    for place, slots in enumerate(seen):
        first = 0 if window is None else prefix_len + place - window
        assert slots == [slot for position, slot in held if first <= position < end]


@given(st.data())
def test_caps_of_a_graph_are_the_keys_that_are_seen(data):
    """From step to step: rows that grow here or elsewhere, over pages that come when they are begun."""
    page_size, window = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 9))
    caps, rows, owners = WindowCaps(window, page_size, 3), [], []
    for key in range(data.draw(st.integers(1, 2))):
        length = data.draw(st.integers(1, 24))
        tail = -(-length // page_size) - 1
        here = data.draw(st.lists(st.booleans(), min_size=tail + 1, max_size=tail + 1))
        rows.append(ListedRow(key, length, [(page, page + 50) for page in range(tail + 1) if here[page]], grows=here[-1], arrives=False))
        owners.append(here)
    rows.append(PooledRow(9, 0, 5))
    caps.fill(rows)
    for age in range(data.draw(st.integers(0, 14))):
        if age:
            for row, here in zip(rows, owners, strict=False):
                if (row.length + age - 1) % page_size == 0:
                    here.append(row.grows)  # a steady step's tail stays on its instance
                    if row.grows:
                        row.held.append((len(here) - 1, len(here) + 49))
            before = caps.caps.copy()
            assert caps.advance() or (caps.caps == before).all()
        for index, (row, here) in enumerate(zip(rows, owners, strict=False)):
            last = row.length + age - 1
            assert caps.caps[index] == sum(here[position // page_size] for position in range(max(0, last - window), last + 1))
        assert caps.caps[len(rows) - 1] == window + 1


def test_settled_rows_send_nothing():
    caps = WindowCaps(3, 4, 2)
    caps.fill(
        [ListedRow(0, 20, [(2, 1), (3, 2), (4, 3)], grows=True, arrives=False), ListedRow(1, 20, [(0, 9)], grows=False, arrives=False)]
    )
    assert caps.caps.tolist() == [4, 0] and not caps.advance()


def test_a_query_without_keys_stays_zero():
    state = PartialState.neutral(2, 3, v_head_dim=4, dtype=torch.bfloat16, device="cpu")
    add_sinks(state, torch.tensor([1.0, -80.0, 0.0], dtype=torch.bfloat16))
    assert not state.output.any() and torch.isneginf(state.lse).all()
