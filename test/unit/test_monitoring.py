"""docs/monitoring without a server: the alert rules fire when they shall, the dashboard asks for metrics that exist, compose mounts what is
there."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from testing.debian import Program
from testing.monitoring import DASHBOARD, FOLDER, RULES, panel_queries, running_prometheus
from testing.ports import find_free_port

REPOSITORY = FOLDER.parents[1]
RULE_TESTS = REPOSITORY / "test" / "data" / "alerts_test.yml"
METRIC = re.compile(r"sglang:dyncp_(\w+)")


@pytest.fixture(scope="module")
def promtool(debian_program: Callable[[str, str], Program]) -> Callable[..., subprocess.CompletedProcess[str]]:
    program = debian_program("prometheus", "promtool")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program.path, *arguments], capture_output=True, text=True, env=program.environment, timeout=120, check=False)

    return run


def test_rules_fire_and_do_not_fire(promtool: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = promtool("test", "rules", str(RULE_TESTS))
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_rule_tests_can_fail(promtool: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    rules = RULES.read_text()
    assert rules.count("> 1.5") == 1
    (tmp_path / "alerts.yml").write_text(rules.replace("> 1.5", "> 15"))
    tests = yaml.safe_load(RULE_TESTS.read_text()) | {"rule_files": ["alerts.yml"]}
    (tmp_path / "tests.yml").write_text(yaml.safe_dump(tests))
    assert promtool("test", "rules", str(tmp_path / "tests.yml")).returncode != 0


def test_every_alert_has_a_case_that_fires() -> None:
    """Cases list all alerts that fire then: a series beside them that fires too fails the case."""
    alerts = {rule["alert"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]}
    cases = [case for test in yaml.safe_load(RULE_TESTS.read_text())["tests"] for case in test["alert_rule_test"]]
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == alerts


def test_the_configuration_is_one_that_prometheus_takes(promtool: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = promtool("check", "config", str(FOLDER / "prometheus.yml"))
    assert result.returncode == 0, result.stdout + result.stderr


def declared_metrics() -> set[str]:
    """Names in metrics.py, and the series that Prometheus makes of a histogram."""
    source = (REPOSITORY / "python/sglang_dcp/upstream/observe/metrics.py").read_text()
    declared = set(re.findall(r'(?:gauge|counter)\("(\w+)"', source))
    return declared | {f"{name}_{end}" for name in re.findall(r'histogram\("(\w+)"', source) for end in ("bucket", "sum", "count")}


def test_dashboard_and_rules_ask_for_metrics_that_exist() -> None:
    asked = {name for text in (*(query for _, query in panel_queries()), RULES.read_text()) for name in METRIC.findall(text)}
    assert len(asked) > 8
    assert asked <= declared_metrics()


def test_names_are_kept_as_the_server_writes_them(debian_program: Callable[[str, str], Program], tmp_path: Path) -> None:
    """A server of prometheus_client's, asked in OpenMetrics: the colon is lost on the way."""
    registry = CollectorRegistry()
    Gauge("sglang:dyncp_kv_tokens", "tokens", registry=registry).set(3)
    Counter("sglang:dyncp_retractions_total", "retractions", registry=registry).inc()
    server, thread = start_http_server(0, addr="127.0.0.1", registry=registry)
    queries, deadline = ("sglang:dyncp_kv_tokens", "sglang:dyncp_retractions_total"), time.monotonic() + 30
    try:
        program = debian_program("prometheus", "prometheus")
        with running_prometheus(program, tmp_path, find_free_port(), f"127.0.0.1:{server.server_port}") as prometheus:
            while not all(prometheus.query(query) for query in queries):
                assert time.monotonic() < deadline, prometheus.query('{__name__=~"sglang.*"}')
                time.sleep(0.2)
            assert [prometheus.query(query)[0]["value"][1] for query in queries] == ["3", "1"]
    finally:
        server.shutdown()
        thread.join()


def test_every_panel_says_what_it_shows() -> None:
    panels = [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["description"] and panel["targets"] for panel in panels)
    (source,) = yaml.safe_load((FOLDER / "grafana/datasources/prometheus.yml").read_text())["datasources"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}


def test_compose_mounts_what_is_there() -> None:
    services = yaml.safe_load((FOLDER / "docker-compose.yml").read_text())["services"]
    mounts = [mount.split(":")[:2] for service in services.values() for mount in service["volumes"]]
    assert all((FOLDER / source).exists() for source, _ in mounts)
    (provider,) = yaml.safe_load((FOLDER / "grafana/dashboards/provider.yml").read_text())["providers"]
    assert provider["options"]["path"] in [target for _, target in mounts]


def test_compose_reaches_a_server_with_defaults_and_is_open_to_this_machine_alone() -> None:
    """SGLang listens on 127.0.0.1 unless told otherwise: a container finds nobody there but in the host's own network."""
    services = yaml.safe_load((FOLDER / "docker-compose.yml").read_text())["services"]
    assert {name: service["network_mode"] for name, service in services.items()} == {"prometheus": "host", "grafana": "host"}
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"].split()
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"
    (scrape,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    (source,) = yaml.safe_load((FOLDER / "grafana/datasources/prometheus.yml").read_text())["datasources"]
    assert scrape["static_configs"] == [{"targets": ["127.0.0.1:30000"]}]
    assert source["url"] == "http://127.0.0.1:9090"
