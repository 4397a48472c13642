"""A replay of the policy's own choices finds no difference, and a tampered placement is found where it is.

The recorded file is written by the very router code that serves, on made-up snapshots.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmark.simulate.cluster import Cluster, SimulatedRequest
from benchmark.simulate.replay import ObservedRequest, main, read_record, replay, replay_on_recorded_loads
from sglang_dcp.config import DynCpConfig
from sglang_dcp.observe.placement_log import LOG_VARIABLE, PlacementLog
from sglang_dcp.policy.cluster_view import HomeReport
from sglang_dcp.policy.cost_model import load_cost_model
from sglang_dcp.policy.placement import make_policy
from sglang_dcp.policy.split_limits import Layout, SplitLimits
from sglang_dcp.policy.types import Placement, PlacementRequest
from sglang_dcp.upstream.router.placer import Placer

SHAPE = {"num_instances": 4, "instances_per_node": 8, "pool_tokens": 1024, "page_size": 16}


def new_policy():
    cost = load_cost_model("cpu", 4)
    return make_policy("dual-balance", num_instances=4, page_size=16, cost_model=cost, degree=None, max_degree=4, max_guest_fraction=1.0)


def served() -> list[ObservedRequest]:
    """What a router with this policy does for a fixed list of requests, each leaving after five more have come."""
    policy, cluster, observed, present = new_policy(), Cluster(SplitLimits(64, 4, 64, Layout(4, 4)), 16), [], []
    for index in range(60):
        prompt = 500 + 13 * index if index % 9 == 4 else 20 + index
        if len(present) == 5:
            cluster.withdraw(present.pop(0))
        placement = policy.place(PlacementRequest(prompt, 16, 16), cluster.loads, 16)
        request = SimulatedRequest(index, float(index), prompt, 16)
        cluster.promise(request, placement)
        present.append(request)
        observed.append(ObservedRequest(float(index), prompt, 16, placement, finish=float(index + 5)))
    return observed


def test_equal_arrivals_give_equal_placements():
    result = replay(served(), new_policy(), **SHAPE)
    assert result.num_requests == 60 and result.differences == () and result.share_equal == 1.0
    assert any(item.placement.degree > 1 for item in served())


def test_a_tampered_placement_is_found():
    observed = served()
    wrong = Placement((observed[7].placement.home + 1) % 4, ((observed[7].placement.home + 1) % 4,), (observed[7].prompt_tokens,))
    observed[7] = replace(observed[7], placement=wrong)
    assert replay(observed, new_policy(), **SHAPE).differences[0][0] == 7
    with pytest.raises(ValueError, match="order"):
        replay(observed[::-1], new_policy(), **SHAPE)


def record(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty-four requests through the router's placer, whose reports lag one placement behind; one is pinned, most finish."""
    monkeypatch.setenv(LOG_VARIABLE, str(path))
    ticks = iter(range(10_000))
    placer = Placer(DynCpConfig().resolve(4), 4, clock=lambda: float(next(ticks)))
    placer.configure(page_size=16)
    log = PlacementLog(path)
    arrived = [0, 0, 0, 0]
    for index in range(24):
        reports = [HomeReport(arrived[rank], rank % 2, {rank: 100 * rank + 7 * index}) for rank in range(4)]
        placer.update([SimpleNamespace(dp_rank=rank, max_total_num_tokens=1024, dyncp=report) for rank, report in enumerate(reports)])
        arrived = [placer.num_placed(rank) for rank in range(4)]
        pin = {"dyncp": {"home": 1, "degree": 2}} if index == 9 else None
        prompt = 1500 if index % 8 == 5 else 30 + index
        sampling = SimpleNamespace(max_new_tokens=8, custom_params=pin)
        placer.place(SimpleNamespace(rid=f"load-{index % 20}", input_ids=[0] * prompt, sampling_params=sampling, routed_dp_rank=None))
        if index % 5:
            log.add_finish(float(next(ticks)), f"load-{index % 20}")
    log.add_finish(1e6, "never placed")


def test_a_recorded_run_is_what_the_policy_alone_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    path = tmp_path / "placements.jsonl"
    record(path, monkeypatch)
    run = read_record(path)
    assert len(run.requests) == 24 and run.requests[9].home == 1 and run.requests[9].degree == 2
    assert any(item.placement.degree > 2 for item in run.requests)
    assert [item.finish is None for item in run.requests[:6]] == [True, False, False, False, False, True]
    assert main([str(path), "--out", str(tmp_path / "out.json")]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "out.json").read_text())
    assert report["equal_on_recorded_loads"] == 1.0 and report["requests"] == 24
    assert 0.0 <= report["equal_on_simulated_loads"] <= report["equal_degree_on_simulated_loads"] <= 1.0


def test_a_recorded_placement_that_the_policy_would_not_make_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "placements.jsonl"
    record(path, monkeypatch)
    lines = path.read_text().splitlines()
    places = [number for number, line in enumerate(lines) if "placement" in line]
    entry = json.loads(lines[places[7]])
    home = (entry["placement"][0] + 1) % 4
    entry["placement"] = [home, [home], [entry["request"][0]]]
    path.write_text("\n".join([*lines[: places[7]], json.dumps(entry), *lines[places[7] + 1 :]]))
    assert [index for index, _, _ in replay_on_recorded_loads(read_record(path)).differences] == [7]
    assert main([str(path)]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no placements"), ('{"cluster": {}}', "no placements"), ('{"cluster": {}}\n{"time": 1}', "line 2"), ("{", "line 1")],
)
def test_a_file_that_is_no_record_is_refused_by_line(tmp_path: Path, text: str, message: str, capsys: pytest.CaptureFixture):
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_record(path)
    assert main([str(path)]) == 2 and "bad.jsonl" in capsys.readouterr().err


def test_without_the_variable_nothing_is_written():
    assert PlacementLog.from_environment({}) is None
    assert PlacementLog.from_environment({LOG_VARIABLE: "x"}) == PlacementLog(Path("x"))
