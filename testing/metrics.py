"""Reads the gauges of each instance from SGLang's metrics endpoint (contract: sglang:dyncp_* with the label dp_rank)."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass

from testing.client import Client, RequestFailed

PREFIX = "sglang:dyncp_"
_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)$")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True)
class Sample:
    """One line of the exposition format."""

    name: str
    labels: dict[str, str]
    value: float


@dataclass(frozen=True)
class InstanceGauges:
    """Load of one instance as it reports it."""

    rank: int
    kv_tokens: int
    guest_tokens: int
    home_requests: int


def parse_metrics(text: str) -> list[Sample]:
    samples = []
    for line in text.splitlines():
        if (match := _SAMPLE.match(line)) and not line.startswith("#"):
            samples.append(Sample(match["name"], dict(_LABEL.findall(match["labels"] or "")), float(match["value"])))
    return samples


def read_gauges(client: Client) -> list[InstanceGauges]:
    """One entry per instance in rank order; empty before the first report."""
    values: dict[int, dict[str, int]] = {}
    for sample in parse_metrics(client.metrics()):
        if sample.name.startswith(PREFIX) and "dp_rank" in sample.labels:
            values.setdefault(int(sample.labels["dp_rank"]), {})[sample.name.removeprefix(PREFIX)] = int(sample.value)
    names = ("kv_tokens", "guest_tokens", "home_requests")
    return [InstanceGauges(rank, *(values[rank].get(name, 0) for name in names)) for rank in sorted(values)]


class LoadSampler:
    """Reads the gauges again and again in the background, and keeps the reading with the most guest tokens, then KV tokens, in all."""

    def __init__(self, client: Client, interval_s: float = 0.1) -> None:
        self._client = client
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._fullest: list[InstanceGauges] = []

    def fullest(self) -> list[InstanceGauges]:
        return self._fullest

    def __enter__(self) -> LoadSampler:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                loads = read_gauges(self._client)
            except (OSError, RequestFailed):
                continue
            if _total(loads) > _total(self._fullest):
                self._fullest = loads


def _total(loads: list[InstanceGauges]) -> tuple[int, int]:
    return sum(load.guest_tokens for load in loads), sum(load.kv_tokens for load in loads)


def format_loads(loads: list[InstanceGauges], pool_tokens: int) -> str:
    """A table, one line per instance."""
    if not loads:
        return "  (no metrics yet)"
    lines = ["  instance  KV tokens (of the pool)  guest tokens  home requests"]
    for load in loads:
        share = f"{100 * load.kv_tokens / pool_tokens:.0f} %"
        lines.append(f"  {load.rank:>8}  {load.kv_tokens:>9,} {'(' + share + ')':>14}  {load.guest_tokens:>12,}  {load.home_requests:>13}")
    return "\n".join(lines)
