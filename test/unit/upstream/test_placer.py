"""The router: a burst spreads over the homes whatever the clocks say, and a rank that a client named is the home."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.load_snapshot import LoadSnapshot

from sglang_dcp.config import DynCpConfig
from sglang_dcp.observe.placement_log import LOG_VARIABLE
from sglang_dcp.policy.cluster_view import HomeReport
from sglang_dcp.upstream.router.load_report import ReportedLoad
from sglang_dcp.upstream.router.placement_hint import PlacedHint, read_placement
from sglang_dcp.upstream.router.placer import Placer
from sglang_dcp.upstream.router.router import dispatch

PAGE, POOL = 16, 1024


def new_placer(policy: str = "dual-balance", clock: Any = None, degree: int | None = None) -> Placer:
    placer = Placer(DynCpConfig(policy=policy, degree=degree).resolve(4), 4, **({} if clock is None else {"clock": clock}))
    placer.configure(page_size=PAGE)
    return placer


def request(tokens: int, *, rank: int | None = None, pin: dict[str, int] | None = None, rid: str = "r") -> SimpleNamespace:
    sampling = SimpleNamespace(max_new_tokens=8, custom_params=None if pin is None else {"dyncp": pin})
    return SimpleNamespace(rid=rid, input_ids=[1] * tokens, sampling_params=sampling, routed_dp_rank=rank, kv_hints=None)


def idle(timestamp: float) -> list[ReportedLoad]:
    """Snapshots of instances in which nothing has arrived, however late they were written."""
    return [
        ReportedLoad(dp_rank=rank, timestamp=timestamp, max_total_num_tokens=POOL, dyncp=HomeReport(0, 0, {rank: 0})) for rank in range(4)
    ]


def test_a_burst_spreads_over_the_homes() -> None:
    """Snapshots that were written after a request was placed, and before it arrived, say nothing about it."""
    now = [100.0]
    placer, homes = new_placer(clock=lambda: now[0]), []
    for _ in range(8):
        now[0] += 0.001
        placer.update(idle(now[0] - 0.0002))
        homes.append(placer.place(request(64))[0].home)
    assert homes == [0, 1, 2, 3, 0, 1, 2, 3]
    assert [load.home_requests for load in placer.loads()] == [2, 2, 2, 2]


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
def test_the_clock_of_another_host_does_not_matter(skew: float) -> None:
    placer, homes = new_placer(clock=lambda: 100.0), []
    for _ in range(8):
        placer.update(idle(100.0 + skew))
        homes.append(placer.place(request(64))[0].home)
    assert homes == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_snapshot_without_a_report_has_taken_in_nothing() -> None:
    placer = new_placer()
    for _ in range(4):
        placer.update([LoadSnapshot(dp_rank=rank, max_total_num_tokens=POOL) for rank in range(4)])
        placer.place(request(64))
    assert [load.home_requests for load in placer.loads()] == [1, 1, 1, 1]


# ---- a rank that the client named


class Controller:
    """SGLang's data-parallel controller, as far as dispatch() asks it."""

    def __init__(self, placer: Placer) -> None:
        self.dyncp = placer
        self.sent: list[tuple[int, PlacedHint | None]] = []
        self.load_snapshot_reader = SimpleNamespace(read_all=lambda: idle(1.0))

    def maybe_external_dp_rank_routing(self, req: Any) -> bool:
        if req.routed_dp_rank is None:
            return False
        self.sent.append((req.routed_dp_rank, read_placement(req.kv_hints)))
        return True

    def total_tokens_scheduler(self, req: Any) -> None:
        if not self.maybe_external_dp_rank_routing(req):
            self.sent.append((-1, read_placement(req.kv_hints)))

    round_robin_scheduler = total_tokens_scheduler


@pytest.mark.parametrize("rank", range(4))
def test_a_named_rank_is_home_to_a_prompt_beyond_its_pool(rank: int) -> None:
    controller = Controller(new_placer())
    dispatch(controller, request(3500, rank=rank))
    (home, hint), *rest = controller.sent
    assert not rest and home == rank and hint is not None
    assert hint.placement.home == rank and hint.placement.degree == 4 and hint.flexible and hint.number == 1


def test_a_named_rank_keeps_short_requests_at_home_also_where_its_pool_is_full() -> None:
    controller = Controller(new_placer())
    for number in range(20):
        dispatch(controller, request(100, rank=2))
        home, hint = controller.sent[-1]
        assert home == 2 and hint is not None and hint.placement.is_local and hint.number == number + 1
    assert [load.home_requests for load in controller.dyncp.loads()] == [0, 0, 20, 0]


def test_others_are_placed_around_requests_with_a_named_rank() -> None:
    controller = Controller(new_placer())
    for _ in range(3):
        dispatch(controller, request(64, rank=0))
    for _ in range(3):
        dispatch(controller, request(64))
    assert [home for home, _ in controller.sent] == [0, 0, 0, 1, 2, 3]


@pytest.mark.parametrize(("policy", "degree"), [("fixed", 2), ("length-buckets", None)])
def test_a_named_rank_is_the_home_under_every_policy_that_places(policy: str, degree: int | None) -> None:
    controller = Controller(new_placer(policy, degree=degree))
    dispatch(controller, request(1500, rank=3))
    home, hint = controller.sent[0]
    assert home == 3 and hint is not None and hint.placement.home == 3 and hint.placement.degree > 1 and not hint.flexible


def test_a_pin_is_not_flexible() -> None:
    controller = Controller(new_placer())
    dispatch(controller, request(1500, pin={"home": 1, "degree": 3}))
    hint = controller.sent[0][1]
    assert hint is not None and not hint.flexible and (hint.placement.home, hint.placement.degree) == (1, 3)


def test_what_cannot_be_placed_goes_on_without_a_placement(caplog: pytest.LogCaptureFixture) -> None:
    """To the named rank where there is one; its scheduler refuses what its pool cannot hold."""
    controller = Controller(new_placer())
    with caplog.at_level(logging.ERROR):
        dispatch(controller, request(100_000, rank=1, rid="too long"))
        dispatch(controller, request(100_000))
    assert controller.sent == [(1, None), (-1, None)] and "too long" in caplog.text
    assert [load.home_requests for load in controller.dyncp.loads()] == [0, 0, 0, 0]


def test_a_log_that_cannot_be_written_costs_no_placement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "placements"
    monkeypatch.setenv(LOG_VARIABLE, str(path))
    controller = Controller(new_placer())
    path.unlink()
    path.mkdir()
    with caplog.at_level(logging.ERROR):
        for _ in range(2):
            dispatch(controller, request(1500))
    assert [hint.placement.degree > 1 for _, hint in controller.sent if hint is not None] == [True, True]
    assert caplog.text.count("the placement log ends here") == 1


def turn(ids: list[int], extra_key: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(**vars(request(0)) | {"input_ids": ids}, extra_key=extra_key, cache_salt=None)


def arrived(placer: Placer, kv_tokens: tuple[int, ...] = (0, 0, 0, 0)) -> None:
    """Everything that was placed has arrived, and is over."""
    reports = [HomeReport(placer.num_placed(rank), 0, {rank: tokens}) for rank, tokens in enumerate(kv_tokens)]
    placer.update([ReportedLoad(dp_rank=r, max_total_num_tokens=100 * POOL, dyncp=report) for r, report in enumerate(reports)])


def retaining_placer() -> Placer:
    placer = Placer(DynCpConfig(cache_fraction=0.8, cache_min_tokens=64).resolve(4), 4)
    placer.configure(page_size=PAGE)
    return placer


def test_later_turns_come_home_and_other_namespaces_do_not() -> None:
    placer = retaining_placer()
    arrived(placer)
    talks = [[100 + i] * 300 for i in range(4)]
    homes = [placer.place(turn(ids))[0].home for ids in talks]
    assert sorted(homes) == [0, 1, 2, 3]
    arrived(placer)
    # Without a prefix the first would go to instance 0, the second to 1, ...
    for ids, home in reversed(list(zip(talks, homes, strict=True))):
        assert placer.place(turn([*ids, *[7] * 90]))[0].home == home
    arrived(placer)
    assert placer.place(turn(talks[3], "tenant"))[0].home == 0


def test_equal_prompts_at_once_spread() -> None:
    placer = retaining_placer()
    arrived(placer)
    assert sorted(placer.place(turn([5] * 300))[0].home for _ in range(4)) == [0, 1, 2, 3]


def test_a_full_home_is_left() -> None:
    placer = retaining_placer()
    arrived(placer)
    home = placer.place(turn([5] * 300))[0].home
    arrived(placer, tuple(100 * POOL if rank == home else 0 for rank in range(4)))
    assert placer.place(turn([5] * 300))[0].home != home
