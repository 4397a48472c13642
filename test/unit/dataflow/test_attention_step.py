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
    assert plan.send_queries.numel() == plan.send_kv.numel() == plan.num_received == 0
    check(cluster)


def test_page_ahead_of_the_sequence_makes_no_row():
    """A reserved tail page that no token has reached takes no part on either side."""
    cluster = Cluster(4, 2, 4, False)
    cluster.add(home=0, prefix_len=2, num_new=1, owners=[0, 1])
    assert cluster.plan(0)[0].send_query_splits == (0, 0)
    assert cluster.plan(1)[0].num_guest_rows == 0
    check(cluster)
