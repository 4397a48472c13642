"""Our Prometheus configuration against a real server: every panel of the dashboard has something to show, every rule can be computed."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from testing.client import Client
from testing.debian import Program
from testing.monitoring import Prometheus, panel_queries, running_prometheus
from testing.recall import random_ids
from testing.server import Server, find_free_port

LIMIT_S = 90.0


@contextmanager
def load(client: Client) -> Iterator[None]:
    """Sharded and local requests, one after the other, while it is open."""
    over = threading.Event()

    def user(degree: int) -> None:
        sampling = {"ignore_eos": True, "custom_params": {"dyncp": {"degree": degree}}}
        while not over.is_set():
            client.generate(random_ids(200, seed=degree), max_new_tokens=16, sampling=sampling)

    with ThreadPoolExecutor(2) as executor:
        users = [executor.submit(user, degree) for degree in (1, 2)]
        try:
            yield
        finally:
            over.set()
    for task in users:
        task.result()


def has_figures(prometheus: Prometheus, query: str) -> bool:
    return any(math.isfinite(float(series["value"][1])) for series in prometheus.query(query))


def test_every_panel_and_every_rule(contract_server: Server, debian_program: Callable[[str, str], Program], tmp_path: Path) -> None:
    program = debian_program("prometheus", "prometheus")
    port = find_free_port()
    with load(contract_server.client), running_prometheus(program, tmp_path, port, f"127.0.0.1:{contract_server.port}") as prometheus:
        without = panel_queries()
        deadline = time.monotonic() + LIMIT_S
        while without := [(title, query) for title, query in without if not has_figures(prometheus, query)]:
            assert time.monotonic() < deadline, f"panels without figures: {without}"
            time.sleep(1.0)
        rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        assert [rule["name"] for rule in rules if rule["health"] != "ok"] == []
        assert [rule["name"] for rule in rules if rule["state"] == "firing"] == []
        assert len(rules) == 5
        (target,) = prometheus.get("targets")["activeTargets"]
        assert target["health"] == "up", target["lastError"]
