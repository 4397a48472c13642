"""Hit shares of conversations: small ones against a count by hand, and random ones against what must hold."""

import itertools
import json
import random

import numpy as np
import pytest

from benchmark.simulate.conversations.documents import DOCUMENT_TOKENS, questions
from benchmark.simulate.conversations.run import main, simulate
from benchmark.simulate.conversations.turns import arrivals, read_conversations
from sglang_dcp.conversations.replay import COLUMNS, WARM_UP_SHARE, make_cache, replay
from sglang_dcp.conversations.sequences import RetainedSequences
from sglang_dcp.conversations.tree import PrefixTree
from sglang_dcp.conversations.turns import BLOCK_TOKENS, Turn, common_blocks
from sglang_dcp.policy.cost_model import load_cost_model
from sglang_dcp.policy.split_limits import Layout, SplitRule
from sglang_dcp.policy.types import Placement

COST = load_cost_model("deepseek-v3.h200", 2)


def turn(arrival, conversation, num_blocks, first=0, service=1.0):
    return Turn(arrival, conversation, num_blocks * 64 + 10, 20, service, np.arange(first, first + num_blocks))


def cached(column, turns, pool_tokens=64 * 400, num_instances=2):
    return [tokens for _, tokens, _ in replay(make_cache(column, COST, num_instances, pool_tokens, 1), turns)]


@pytest.mark.parametrize("column", ["sticky", "ours", "pooled"])
def test_a_later_turn_finds_the_earlier_one(column):
    turns = [turn(0, 1, 64), turn(10, 1, 80), turn(20, 2, 80), turn(30, 1, 100)]
    assert cached(column, turns) == [0, 64 * 64, 0, 80 * 64]


def test_what_one_pool_cannot_keep_all_pools_can():
    """Two conversations of 250 pages each, pools of 400: with a tree per instance each fills more than half of one."""
    turns = [turn(10 * i, i % 2, 200 + 10 * i) for i in range(10)]
    assert sum(cached("pooled", turns)) == sum(64 * (200 + 10 * (i - 2)) for i in range(2, 10))
    assert sum(cached("ours", turns)) <= sum(cached("pooled", turns))


@pytest.mark.parametrize("column", ["sticky", "ours", "pooled"])
def test_a_turn_that_finds_the_earlier_one_running_reads_what_that_has(column):
    turns = [turn(0, 1, 64, service=50), turn(10, 1, 80, service=50), turn(20, 1, 80), turn(70, 1, 100)]
    assert cached(column, turns) == [0, 64 * 64, 80 * 64, 80 * 64]


class AtHome:
    """A router that sends turns to these homes, whole."""

    def __init__(self, *homes):
        self.homes = iter(homes)

    def place(self, turn):
        home = next(self.homes)
        return Placement(home, (home,), (turn.prompt_tokens,))

    def finish(self, turn):
        pass


def test_what_more_of_the_design_would_find_is_counted():
    """A prefix that a whole turn left to a split one; one that lies at another home; of one that somebody reads, nothing."""
    cache = make_cache("ours", COST, 2, 64 * 400, 1)
    longer = turn(10, 1, 500)
    assert [tokens for _, tokens, _ in replay(cache, [turn(0, 1, 64), longer, turn(20, 1, 510)])] == [0, 64 * 64, 64 * 500]
    assert dict(cache.tokens) == {"promoted": 64 * 64, "elsewhere": 0, "in_use": 0}, "the third follows a split turn"
    limits = SplitRule(2).limits(400, Layout(2, 2))
    cache = RetainedSequences(AtHome(0, 1, 0), limits)
    replay(cache, [turn(0, 1, 64), turn(10, 1, 80), turn(20, 1, 70)])
    assert dict(cache.tokens) == {"elsewhere": 64 * 64 + 64 * 6, "in_use": 0}
    cache = RetainedSequences(AtHome(0, 0), limits)
    replay(cache, [turn(0, 1, 64, service=50), turn(10, 1, 80)])
    assert dict(cache.tokens) == {"elsewhere": 0, "in_use": 0}, "what runs is shared"


def test_questions_to_documents_share_them_and_nothing_else():
    asked = questions(3, 40, rate=1.0, seed=2)
    assert [each.arrival_s for each in asked] == sorted(each.arrival_s for each in asked)
    whole = DOCUMENT_TOKENS // BLOCK_TOKENS
    assert all(common_blocks(one.blocks, other.blocks) == whole for one, other in itertools.pairwise(asked))


@pytest.mark.parametrize("column", [*COLUMNS, "shared"])
def test_everybody_gets_room_and_a_hit_is_no_more_than_what_was_sent(column):
    choose = random.Random(3)
    turns = [
        turn(choose.random() * 500, choose.randrange(30), choose.randrange(1, 300), service=1 + 40 * choose.random()) for _ in range(600)
    ]
    turns.sort(key=lambda each: each.arrival_s)
    longest = {}
    for each, tokens, wait in replay(make_cache(column, COST, 2, 64 * 400, 1), turns):
        assert 0 <= tokens <= min(longest.get(each.conversation, 0) * 64, each.prompt_tokens - 1) and wait >= 0
        longest[each.conversation] = max(longest.get(each.conversation, 0), len(each.blocks))


def test_more_room_is_no_worse_and_the_pool_of_all_is_the_bound():
    choose = random.Random(4)
    turns = [turn(i, i % 12, 100 + 4 * (i // 12), service=0.5) for i in range(400) if choose.random() < 0.9]
    rows = simulate(turns, COST, 2, [64 * 400, 64 * 1600], COLUMNS, 1, 1)
    share = {(row["pool_tokens"], row["column"]): row["hit_share"] for row in rows}
    assert all(share[64 * 1600, column] >= share[64 * 400, column] for column in COLUMNS)
    assert share[64 * 1600, "pooled"] >= share[64 * 1600, "sticky"] - 0.01 > share[64 * 1600, "stock"] - 0.01
    assert rows == simulate(turns, COST, 2, [64 * 400, 64 * 1600], COLUMNS, 1, 1), "deterministic"


def test_a_tree_loses_its_leaves_first_and_never_what_is_in_use():
    tree = PrefixTree(10)
    assert tree.start([1, 2, 3, 4], 0) == 0
    tree.finish([1, 2, 3, 4], 0)
    assert tree.start([11, 12, 13, 14, 15, 16, 17], 1) == 0
    assert tree.start([1, 2, 3], 0) is None, "two chunks are not in use"
    tree.finish([11, 12, 13, 14, 15, 16, 17], 1)
    assert tree.start([1, 2, 3, 4], 0) == 2


def test_the_trace_is_read_and_stretched(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = {
        "session": [1, 1, 2],
        "t_session_s": [0.0, 5000.0, 3.0],
        "input_length": [300, 500, 640],
        "output_length": [5, 6, 7],
        "api_time_s": [1.0, None, 2.0],
        "run_start": [[1], [1, 9], [1]],
        "run_len": [[4], [4, 3], [10]],
    }
    parquet.write_table(pyarrow.table(rows), tmp_path / "trace.parquet")
    first, second = read_conversations(tmp_path / "trace.parquet")
    assert [each.arrival_s for each in first] == [0.0, 900.0], "a night is cut"
    assert first[1].blocks.tolist() == [1, 2, 3, 4, 9, 10, 11] and first[1].service_s > 0
    assert common_blocks(first[0].blocks, first[1].blocks) == 4
    halved = read_conversations(tmp_path / "trace.parquet", divide=2)[1][0]
    assert (halved.prompt_tokens, len(halved.blocks)) == (320, 5)
    turns = arrivals([first, second], rate=2.0, hours=1.0, seed=1)
    assert 0.8 < len(turns) / 7200 < 1.2 and len({each.conversation for each in turns}) > 3000
    out = tmp_path / "out.json"
    wanted = ["--instances", "2", "--hours", "0.1", "--column", "pooled", "--out", str(out)]
    assert main([str(tmp_path / "trace.parquet"), *wanted]) == 0
    assert 0 < WARM_UP_SHARE < 1 and json.loads(out.read_text())["rows"][0]["column"] == "pooled"
    assert main([str(tmp_path / "trace.parquet"), *wanted, "--pool-tokens", "64"]) == 2
    parquet.write_table(pyarrow.table({"session": [1]}), tmp_path / "no.parquet")
    with pytest.raises(ValueError, match="no column 't_session_s'"):
        read_conversations(tmp_path / "no.parquet")
