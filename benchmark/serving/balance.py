"""Balance of a served cluster over time, from its metrics endpoint."""

from __future__ import annotations

import re
import threading
import time
import urllib.request
from dataclasses import dataclass, field

GAUGE = re.compile(r'^sglang:dyncp_(kv_tokens|guest_tokens|home_requests)\{[^}]*dp_rank="(\d+)"[^}]*\} ([0-9.e+]+)$', re.M)


@dataclass(frozen=True)
class Sample:
    """One reading: per instance KV tokens, guest tokens and home requests."""

    kv_tokens: tuple[float, ...]
    guest_tokens: tuple[float, ...]
    home_requests: tuple[float, ...]


def read_sample(port: int, num_instances: int) -> Sample:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as response:
        text = response.read().decode()
    values = {name: [0.0] * num_instances for name in ("kv_tokens", "guest_tokens", "home_requests")}
    for name, rank, value in GAUGE.findall(text):
        values[name][int(rank)] = float(value)
    return Sample(tuple(values["kv_tokens"]), tuple(values["guest_tokens"]), tuple(values["home_requests"]))


@dataclass
class Sampler:
    """Reads the gauges every `interval_s` while it is entered."""

    port: int
    num_instances: int
    interval_s: float = 0.25
    samples: list[Sample] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Sampler:
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._stop.set()
        self._thread.join(timeout=60)

    def _run(self) -> None:
        while not self._stop.is_set():
            self.samples.append(read_sample(self.port, self.num_instances))
            time.sleep(self.interval_s)

    def summary(self, pool_tokens: int, least_use: float = 0.5) -> dict[str, float]:
        """Time-weighted means of max/mean over samples whose cluster use is at least `least_use` (samples are evenly spaced)."""
        full = self.num_instances * pool_tokens
        busy = [s for s in self.samples if sum(s.kv_tokens) >= least_use * full]
        with_requests = [s for s in busy if sum(s.home_requests) > 0]
        return {
            "samples": len(self.samples),
            "samples_in_use": len(busy),
            "kv_balance": _mean([_ratio(s.kv_tokens) for s in busy]),
            "home_request_balance": _mean([_ratio(s.home_requests) for s in with_requests]),
        }


def _ratio(values: tuple[float, ...]) -> float:
    return max(values) / (sum(values) / len(values))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
