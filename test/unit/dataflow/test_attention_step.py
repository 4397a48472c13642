"""The per-layer path of N instances against attention over the whole sequence."""

import itertools

import pytest
import torch

from test.unit.dataflow.cluster import Cluster

GRID = list(itertools.product([2, 4], [4, 16], [False, True]))


def check(cluster: Cluster) -> None:
    for rank, output in enumerate(cluster.run()):
        assert not output.isnan().any()
        torch.testing.assert_close(output, cluster.expected(rank), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("num_instances", "page_size", "latent"), GRID)
def test_random_steps(num_instances, page_size, latent):
    """Random homes, lengths, page owners (any order, home or not), chunks beside decodes, pages ahead of the sequence."""
    for seed in range(15):
        cluster = Cluster(seed, num_instances, page_size, latent)
        cluster.add_random_rows(int(cluster.rng.integers(1, 6)))
        check(cluster)


@pytest.mark.parametrize("latent", [False, True])
def test_degree_one_on_a_foreign_shard(latent):
    cluster = Cluster(1, 2, 4, latent)
    cluster.add(home=0, prefix_len=9, num_new=1, owners=[1, 1, 1])
    check(cluster)


@pytest.mark.parametrize("latent", [False, True])
def test_first_token_and_chunk_that_crosses_two_shards(latent):
    cluster = Cluster(2, 4, 4, latent)
    cluster.add(home=0, prefix_len=0, num_new=1, owners=[3])
    cluster.add(home=0, prefix_len=6, num_new=9, owners=[2, 1, 3, 0])
    cluster.add(home=2, prefix_len=0, num_new=11, owners=[1, 0, 1])
    check(cluster)


def test_everything_local_sends_nothing():
    cluster = Cluster(3, 2, 4, False)
    cluster.add(home=0, prefix_len=5, num_new=3, owners=[0, 0])
    plan, _, _ = cluster.plan(0)
    assert not any(map(len, (*plan.send_queries, *plan.send_kv))) and plan.num_received == 0
    check(cluster)


def test_page_ahead_of_the_sequence_makes_no_row():
    """A reserved tail page that no token has reached takes no part on either side."""
    cluster = Cluster(4, 2, 4, False)
    cluster.add(home=0, prefix_len=2, num_new=1, owners=[0, 1])
    assert not any(map(len, cluster.plan(0)[0].send_queries))
    assert not cluster.plan(1)[0].pool_rows
    check(cluster)


def test_a_first_chunk_asks_nobody():
    """Its tokens see each other at home; only K/V travels, to the owners of their pages."""
    cluster = Cluster(6, 3, 4, False)
    cluster.add(home=0, prefix_len=0, num_new=11, owners=[1, 2, 0])
    plans = [cluster.plan(rank)[0] for rank in range(3)]
    assert not any(map(len, plans[0].send_queries)) and not any(plan.pool_rows for plan in plans)
    assert list(map(len, plans[0].send_kv)) == [0, 4, 4] and plans[1].receive_kv_slots[0].numel() == 4
    assert not any(plan.anybody_asks for plan in plans), "no instance calls for what is returned"
    check(cluster)


def test_a_later_chunk_asks_those_with_earlier_tokens():
    cluster = Cluster(7, 4, 4, False)
    cluster.add(home=0, prefix_len=8, num_new=6, owners=[1, 2, 3, 0])
    plan = cluster.plan(0)[0]
    assert list(map(len, plan.send_queries)) == [0, 6, 6, 0] and list(map(len, plan.send_kv)) == [0, 0, 0, 4]
    assert not cluster.plan(3)[0].pool_rows and not len(plan.pool_tokens)
    check(cluster)


def test_own_tokens_that_travel_are_written_to_the_padding_page():
    cluster = Cluster(8, 2, 4, False)
    request = cluster.add(home=0, prefix_len=0, num_new=8, owners=[1, 0])
    slots = cluster.plan(0)[0].write_slots.tolist()
    assert slots == [0] * 4 + [int(request.page_numbers[1]) * 4 + i for i in range(4)]
