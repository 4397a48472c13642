"""What docs/monitoring ships, as tests read it: the queries of the dashboard, the rules, and a Prometheus that scrapes one server."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from testing.debian import Program
from testing.processes import end_process_tree

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "monitoring"
DASHBOARD = FOLDER / "grafana" / "dashboards" / "sglang_dcp.json"
RULES = FOLDER / "alerts.yml"
RATE_WINDOW = "10s"
"""In place of Grafana's $__rate_interval: four scrapes of SCRAPE_INTERVAL and more."""
SCRAPE_INTERVAL = "1s"


def panel_queries() -> list[tuple[str, str]]:
    """(panel's title, query) of the dashboard, its variables filled in."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    fill = {"$server": ".*", "$__rate_interval": RATE_WINDOW}
    queries = [(panel["title"], target["expr"]) for panel in panels for target in panel.get("targets", ())]
    for name, value in fill.items():
        queries = [(title, query.replace(name, value)) for title, query in queries]
    return queries


@dataclass(frozen=True)
class Prometheus:
    """A running one, that scrapes `target`."""

    port: int

    def get(self, path: str, **query: str) -> Any:
        """`data` of an answer of its API."""
        address = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        with urllib.request.urlopen(address, timeout=10) as response:
            answer = json.load(response)
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Series of an instant query."""
        return list(self.get("query", query=expression)["result"])


@contextmanager
def running_prometheus(program: Program, folder: Path, port: int, target: str) -> Iterator[Prometheus]:
    """Our configuration, with another target and a shorter interval. Ready when it yields."""
    settings = yaml.safe_load((FOLDER / "prometheus.yml").read_text())
    settings["global"] = {"scrape_interval": SCRAPE_INTERVAL, "evaluation_interval": SCRAPE_INTERVAL}
    settings["rule_files"] = [str(FOLDER / name) for name in settings["rule_files"]]
    settings["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(settings))
    command = [str(program.path), f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT, env=program.environment
        )
    try:
        _wait_ready(process, port, folder / "prometheus.log")
        yield Prometheus(port)
    finally:
        end_process_tree(process.pid)
        process.wait(timeout=10)


def _wait_ready(process: subprocess.Popen[bytes], port: int, log: Path, limit_s: float = 60.0) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=5) as response:
                if response.status == 200:
                    return
        except OSError:
            pass
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.1)
