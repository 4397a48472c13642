"""The live page of a real server, in a real browser; and gauges that follow the load down."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from playwright.sync_api import expect

from testing.client import Client
from testing.metrics import parse_metrics
from testing.recall import random_ids
from testing.server import Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

IDLE_LIMIT_S = 10.0
"""Far below the 30 s for which SGLang's own gauges keep the last step's values."""
ENDED = ("finished", "aborted")


def pinned(home: int, degree: int) -> dict[str, Any]:
    return {"ignore_eos": True, "custom_params": {"dyncp": {"degree": degree, "home": home}}}


@contextmanager
def paused_with_requests(client: Client) -> Iterator[None]:
    """A sharded request of either home and a local one are under way, and no step is made: figures stand still."""
    streams = [
        client.stream(random_ids(length, seed=length), max_new_tokens=400, sampling=pinned(home, degree), rid=rid)
        for rid, length, home, degree in (("<i>sharded</i>", 400, 0, 2), ("other-home", 300, 1, 2), ("local", 100, 1, 1))
    ]
    try:
        for stream in streams:
            next(iter(stream.events()))
        client.json("POST", "/pause_generation", {"mode": "in_place"})
        try:
            yield
        finally:
            client.json("POST", "/continue_generation", {})
    finally:
        for stream in streams:
            stream.close()


def rows(page: Page, table: str) -> list[list[str]]:
    cells = page.eval_on_selector_all(f"#{table} tr", "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))")
    return [[cell.replace(",", "") for cell in row] for row in cells]


def test_the_page_shows_what_the_report_says(contract_server: Server, browser: Browser) -> None:
    client = contract_server.client
    page = browser.new_page()
    with paused_with_requests(client):
        report = client.json("GET", "/dyncp/requests")
        page.goto(f"http://127.0.0.1:{contract_server.port}/dyncp/live")
        expect(page.locator("#status")).to_contain_text("live", timeout=30_000)
        instances = [
            [str(told["rank"]), str(told["kv_tokens"]), str(told["guest_tokens"]), str(told["home_requests"]), str(told["queued"])]
            for told in report["instances"]
        ]
        assert [[cells[i] for i in (0, 2, 4, 5, 6)] for cells in rows(page, "instances")] == instances
        assert all(told["guest_tokens"] > 0 for told in report["instances"])
        bars = page.eval_on_selector_all("#instances .bar", "bars => bars.map(bar => [...bar.children].map(part => +part.dataset.tokens))")
        assert [(own + guests + retained, guests) for own, guests, retained in bars] == [
            (told["kv_tokens"], told["guest_tokens"]) for told in report["instances"]
        ]
        live = [entry for entry in report["requests"] if entry["state"] not in ENDED]
        degrees = Counter(str(entry["degree_end"]) for entry in live)
        assert {cells[0]: int(cells[2]) for cells in rows(page, "degrees")} == degrees == {"1": 1, "2": 2}
        told = {
            entry["rid"]: (str(entry["home"]), str(entry["degree_end"]), [(shard["rank"], shard["tokens"]) for shard in entry["shards"]])
            for entry in live
        }
        shown = {cells[0]: (cells[4], cells[5], shards_of(cells[6])) for cells in rows(page, "longest")}
        assert shown == told
        assert list(shown) == ["<i>sharded</i>", "other-home", "local"], "the longest first"
    page.close()


def shards_of(text: str) -> list[tuple[int, int]]:
    """Of a cell with commas taken out of it: `0: 208 1: 200`."""
    words = text.replace(":", "").split()
    return [(int(rank), int(tokens)) for rank, tokens in zip(words[::2], words[1::2], strict=True)]


def test_gauges_are_idle_soon_after_the_last_request(contract_server: Server) -> None:
    client = contract_server.client
    with client.stream(random_ids(400, seed=31), max_new_tokens=800, sampling=pinned(0, 2)) as stream:
        next(iter(stream.events()))
        wait_for(client, lambda gauges: gauges["guest_tokens"] > 0 and gauges["home_requests"] > 0 and gauges["attention_rows"] > 0)
    wait_for(client, lambda gauges: not any(gauges.values()))


def wait_for(client: Client, holds: Any) -> None:
    """Until `holds` of the sums of our gauges over the instances; fails after IDLE_LIMIT_S."""
    names = ("kv_tokens", "guest_tokens", "home_requests", "attention_rows")
    deadline = time.monotonic() + IDLE_LIMIT_S
    while True:
        sums: Counter[str] = Counter(dict.fromkeys(names, 0))
        for sample in parse_metrics(client.metrics()):
            if (name := sample.name.removeprefix("sglang:dyncp_")) in names:
                sums[name] += int(sample.value)
        if holds(sums):
            return
        assert time.monotonic() < deadline, sums
        time.sleep(0.1)
