"""The load as `sglang-dcp top` draws it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from sglang_dcp.observe.dashboard import BAR_WIDTH, KEPT_READINGS, Dashboard, bar, sparkline


def instance(rank: int, kv: int, guests: int = 0, homes: int = 1, **more: Any) -> dict[str, Any]:
    return {"rank": rank, "pool_tokens": 1024, "kv_tokens": kv, "guest_tokens": guests, "home_requests": homes, "queued": 0} | more


def request(rid: str, tokens: int) -> dict[str, Any]:
    shards = [{"rank": 0, "tokens": tokens}, {"rank": 1, "tokens": 7}]
    where = {"home": 0, "shards": shards, "degree_start": 1, "degree_end": 2}
    return {"rid": rid, "state": "running", "prompt_tokens": tokens, "output_tokens": 8, **where}


def drawn(dashboard: Dashboard, load: dict[str, Any], most: int = 20) -> str:
    console = Console(file=io.StringIO(), width=140, force_terminal=True, color_system=None)
    console.print(dashboard.draw(load, most))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_load() -> None:
    load = {
        "instances": [instance(0, 768, 256, homes=3), instance(1, 256, retained_tokens=128)],
        "degrees": {"1": 3, "4": 1},
        "longest": [request("a", 1000), request("b", 500)],
    }
    text = drawn(Dashboard(), load, most=1)
    first, second = (line for line in text.splitlines() if "░" in line and "%" in line)
    assert (first.count("█"), second.count("█")) == (24, 8)
    assert "75 %" in first
    assert "KV tokens  1.50" in text
    assert "1: 3  4: 1" in text
    assert "0:1000 1:7" in text
    assert "0:500" not in text


def test_an_idle_cluster() -> None:
    text = drawn(Dashboard(), {"instances": [instance(0, 0, homes=0), instance(1, 0, homes=0)], "degrees": {}, "longest": []})
    assert "KV tokens  -" in text


def test_request_ids_are_neither_markup_nor_escape_sequences() -> None:
    load = {"instances": [instance(0, 16)], "degrees": {}, "longest": [request("[red]x[/red]\x1b[2J[/]", 16)]}
    assert "[red]x[/red]?[2J[/]" in drawn(Dashboard(), load)


def test_the_balance_is_remembered_and_bounded() -> None:
    dashboard = Dashboard()
    for number in range(KEPT_READINGS + 20):
        text = drawn(dashboard, {"instances": [instance(0, 16 * number), instance(1, 16)], "degrees": {}, "longest": []})
    (line,) = (line for line in text.splitlines() if "KV tokens  " in line)
    assert sum(line.count(tick) for tick in "▁▂▃▄▅▆▇█") == KEPT_READINGS


@pytest.mark.parametrize(
    ("values", "expected"), [([], ""), ([None, 1.0, 2.0], " ▁█"), ([1.0, 1.1], "▁▂"), ([1.0, 2.5, 4.0], "▁▅█"), ([None], " ")]
)
def test_sparkline(values: list[float | None], expected: str) -> None:
    assert sparkline(values) == expected


@pytest.mark.parametrize(
    ("parts", "total", "expected"),
    [
        ([(0, "a"), (0, "b")], 1024, 0),
        ([(1, "a"), (1, "b")], 100_000, 2),
        ([(512, "a"), (512, "b")], 1024, BAR_WIDTH),
        ([(1024, "a"), (1, "b")], 1024, BAR_WIDTH),
        ([(5, "a")], 0, 1),
    ],
)
def test_bar(parts: list[tuple[int, str]], total: int, expected: int) -> None:
    text = bar(parts, total)
    assert (len(text.plain), text.plain.count("█")) == (BAR_WIDTH, expected)
