"""Sessions in a closed loop, against a client that stands for a server with a perfect cache, or with none."""

import threading
import time
from types import SimpleNamespace

import pytest

from benchmark.serving.conversations.closed_loop import as_recorded, converse, hit_share, ttft_median_s
from benchmark.serving.conversations.misses import missed_shares
from benchmark.serving.conversations.on_ledger import LedgerReplay
from benchmark.serving.conversations.repeated import StickyHomes, converse_again, mean_lateness_s
from benchmark.serving.conversations.run import bars, read_counters, recorded_times, simulate
from benchmark.serving.conversations.sessions import PAGE_TOKENS, choose_sessions, prompt_ids, served_tokens
from sglang_dcp.conversations.turns import common_blocks

POOL_TOKENS = 4096
DIVIDE = 16


class PerfectCache:
    """Finds every whole page of every prompt that it was sent before; keeps nothing where `keeps` is False."""

    def __init__(self, keeps=True):
        self.keeps, self.seen, self.lock = keeps, set(), threading.Lock()
        self.most_at_once = self.at_once = 0
        self.named = []

    def generate(self, ids, *, max_new_tokens, sampling, **fields):
        pages = [tuple(ids[:end]) for end in range(PAGE_TOKENS, len(ids), PAGE_TOKENS)]
        with self.lock:
            self.at_once += 1
            self.named.append(fields.get("routed_dp_rank"))
            self.most_at_once = max(self.most_at_once, self.at_once)
            found = sum(page in self.seen for page in pages)
            if self.keeps:
                self.seen.update(pages)
        time.sleep(0.001)
        with self.lock:
            self.at_once -= 1
        home = fields.get("routed_dp_rank", 0)
        where = {"home": home, "shards": [{"rank": home, "tokens": len(ids)}]}
        told = {"first_token_latency": 0.25} if self.keeps else {}
        return SimpleNamespace(meta={"prompt_tokens": len(ids), "cached_tokens": found * PAGE_TOKENS, "dyncp": where} | told)


@pytest.fixture(scope="module")
def sessions(tmp_path_factory):
    """Three conversations of six turns, each 2,048 tokens of the trace longer than the last."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [(talk, turn) for talk in range(3) for turn in range(6)]
    blocks = [200 + 32 * turn for _, turn in rows]
    table = {
        "session": [talk for talk, _ in rows],
        "t_session_s": [0.01 * turn for _, turn in rows],
        "input_length": [64 * count + 20 for count in blocks],
        "output_length": [40] * len(rows),
        "api_time_s": [0.001] * len(rows),
        "run_start": [[1]] * len(rows),
        "run_len": [[count] for count in blocks],
    }
    path = tmp_path_factory.mktemp("trace") / "trace.parquet"
    parquet.write_table(pyarrow.table(table), path)
    return choose_sessions(path, divide=DIVIDE, pool_tokens=POOL_TOKENS, count=3, num_turns=5, hurry=1.0, seed=1)


def test_prompts_share_as_many_pages_as_the_trace_says(sessions):
    for session in sessions:
        for index, (turn, later) in enumerate(zip(session.turns, session.turns[1:], strict=False)):
            ids, more = prompt_ids(session, index), prompt_ids(session, index + 1)
            assert len(ids) == served_tokens(turn) == pytest.approx((64 * len(turn.blocks) + 5) / 4, abs=PAGE_TOKENS)
            same = common_blocks(turn.blocks, later.blocks) * PAGE_TOKENS
            assert same == len(ids) // PAGE_TOKENS * PAGE_TOKENS and ids[:same] == more[:same] and ids[same:] != more[same : len(ids)]
    assert prompt_ids(sessions[0], 0)[:PAGE_TOKENS] != prompt_ids(sessions[1], 0)[:PAGE_TOKENS]


def test_a_perfect_cache_reaches_the_bound_and_none_misses_everything(sessions):
    client = PerfectCache()
    served = converse(client, sessions, at_once=2)
    assert len(served) == 15 and client.most_at_once <= 2
    turns = as_recorded(sessions, served)
    assert [turn.arrival_s for turn in turns] == sorted(turn.arrival_s for turn in turns)
    found, missed = hit_share(served), missed_shares(sessions, served)
    assert found + sum(missed.values()) == pytest.approx(1, abs=1e-3) and missed["first"] > 0 < missed["new"]
    assert missed["gone"] == missed["elsewhere"] == missed["part"] == 0
    simulated = simulate(sessions, served, POOL_TOKENS, DIVIDE)
    assert simulated["pooled"] == pytest.approx(found, abs=0.02)
    cold = converse(PerfectCache(keeps=False), sessions, at_once=3)
    assert hit_share(cold) == 0 and (ttft_median_s(served), ttft_median_s(cold)) == (0.25, None)
    assert missed_shares(sessions, cold)["gone"] == pytest.approx(found, abs=1e-3)
    result = {"servers": {"on": {"hit_share": 0.9}, "sticky": {"hit_share": 0.6}}, "simulated": {"pooled": 1.0}}
    assert bars(result) == {"hit_share_of_bound": 0.9, "hit_share_over_sticky": 1.5}


def test_the_same_turns_again_come_at_their_times_and_never_before_the_last_answer(sessions):
    """Times in the past: every turn at once, but those of a session one behind the other."""
    lines = [f"{session.number} {index} {-float(index)} 0.0" for session in sessions for index in range(5)]
    times = recorded_times({"recorded": lines}, POOL_TOKENS)
    client = PerfectCache()
    served = converse_again(client, sessions, times)
    assert len(served) == 15 and client.most_at_once <= 3 and set(client.named) == {None}
    for session in sessions:
        turns = [turn for turn in served if turn.session == session.number]
        assert [turn.index for turn in turns] == list(range(5))
        assert all(before.ended_s <= turn.sent_s for before, turn in zip(turns, turns[1:], strict=False))
    assert mean_lateness_s(served, times) >= 2.0
    later = dict.fromkeys(times, 0.05)
    assert all(turn.sent_s >= 0.05 for turn in converse_again(client, sessions, later))
    with pytest.raises(ValueError, match="--server on"):
        recorded_times({"servers": {}}, POOL_TOKENS)


def test_a_sticky_client_names_one_instance_for_a_session(sessions):
    client = PerfectCache()
    served = converse_again(client, sessions, dict.fromkeys(((s.number, i) for s in sessions for i in range(5)), 0.0), StickyHomes(2))
    assert len({(turn.session, turn.home) for turn in served}) == len(sessions)
    assert sorted(client.named) in ([0] * 5 + [1] * 10, [0] * 10 + [1] * 5)
    homes = StickyHomes(3)
    assert [homes.begin() for _ in range(4)] == [0, 1, 2, 0]
    homes.end(1)
    assert homes.begin() == 1


def test_the_ledger_alone_finds_what_one_pool_would_where_there_is_room(sessions):
    replay = LedgerReplay(POOL_TOKENS, DIVIDE, step_s=0.1)
    served = replay.converse(sessions, at_once=2)
    assert len(served) == 15 and all(len(turn.shards) > 1 for turn in served), "whole turns find nothing"
    assert hit_share(served) == pytest.approx(simulate(sessions, served, POOL_TOKENS, DIVIDE)["pooled"], abs=0.02)
    assert not sum(replay.evictions().values())


def test_counters_are_summed_over_instances():
    lines = [f'sglang:dyncp_evictions_total{{dp_rank="{rank}",reason="growth"}} {rank}.0' for rank in range(3)]
    assert read_counters("\n".join([*lines, 'sglang:dyncp_prefix_hits_total{dp_rank="0"} 7.0'])) == {
        "evictions_growth": 3,
        "prefix_hits": 7,
    }


def test_a_trace_with_too_few_sessions_is_refused(sessions, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    names = ("session", "t_session_s", "input_length", "output_length", "api_time_s")
    parquet.write_table(pyarrow.table({**{name: [1] for name in names}, "run_start": [[1]], "run_len": [[1]]}), tmp_path / "t.parquet")
    wanted = {"pool_tokens": POOL_TOKENS, "count": 1, "num_turns": 2, "hurry": 1.0, "seed": 1}
    with pytest.raises(ValueError, match="0 of 1 sessions have 2 turns"):
        choose_sessions(tmp_path / "t.parquet", divide=DIVIDE, **wanted)
    with pytest.raises(ValueError, match="--divide 6 must be a multiple of 4"):
        choose_sessions(tmp_path / "t.parquet", divide=6, **wanted)
