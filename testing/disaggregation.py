"""A prefill server and a decode server on this machine, with Mooncake over TCP between them."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from testing.client import Answer, RequestFailed
from testing.ports import find_free_port
from testing.server import Server, ServerConfig, ServerPool, start_server

LOOPBACK = (("SGLANG_HOST_IP", "127.0.0.1"), ("MC_TCP_BIND_ADDRESS", "127.0.0.1"))
"""Otherwise Mooncake takes the address of the machine's network card."""
BACKEND = ("--disaggregation-transfer-backend", "mooncake_tcp")
PREFILL_WAITS_S = 60
"""Longest wait of a prefill server for the pages of a request, which its decode server may be short of, or have dropped."""
DECODE_WAITS_S = 30
"""Longest wait of a decode server for the K/V of pages it has told of: a prefill server that drops a request by itself does not say so. The
pages of the tests are written within two seconds on idle cores."""


def prefill_server(model: str) -> ServerConfig:
    """Stock SGLang, with this package's part of a prefill server."""
    flags = (*BACKEND, "--disaggregation-mode", "prefill")
    environment = (*LOOPBACK, ("SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT", str(PREFILL_WAITS_S)))
    return ServerConfig(model, pool_tokens=8192, chunk_tokens=256, flags=flags, environment=environment)


def decode_server(model: str, instances: int, pool_tokens: int, *flags: str) -> ServerConfig:
    flags = (*BACKEND, "--disaggregation-mode", "decode", *flags)
    limits = (("SGLANG_DISAGGREGATION_WAITING_TIMEOUT", str(DECODE_WAITS_S)), ("SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL", "2"))
    environment = (*LOOPBACK, ("SGLANG_DYNCP_CHECK_EVERY_STEP", "1"), *limits)
    return ServerConfig(model, instances, pool_tokens=pool_tokens, dyncp=True, flags=flags, environment=environment)


@dataclass
class Pair:
    """bootstrap_port: where the decode server finds the prefill server."""

    prefill: Server
    decode: Server
    bootstrap_port: int
    _rooms: Iterator[int] = field(default_factory=lambda: itertools.count(1000))

    def address(self) -> dict[str, Any]:
        """What a router adds to a request: a room of its own at the prefill server."""
        return {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.bootstrap_port, "bootstrap_room": next(self._rooms)}

    def generate(self, prompt: str | Sequence[int], **fields: Any) -> Answer:
        """The decode server's answer. Both get the request at once, as from a router; what the prefill server says of it is left out."""
        fields |= self.address()
        with ThreadPoolExecutor(1) as pool:
            prefill = pool.submit(self.prefill.client.generate, prompt, **fields)
            answer = self.decode.client.generate(prompt, **fields)
            prefill.exception(timeout=60)
        return answer

    def abort(self, rid: str) -> None:
        for server in (self.decode, self.prefill):
            server.client.abort(rid)

    def drop_at_prefill(self, prompt: Sequence[int], rid: str, limit_s: float = 60.0) -> dict[str, Any]:
        """Sends a request to the prefill server alone, which has no other, and aborts it there once it waits for its pages. Returns the
        address, at which nobody will write to them."""
        address, deadline = self.address(), time.monotonic() + limit_s
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(self.prefill.client.generate, prompt, rid=rid, **address)
            while not self.num_waiting_at_prefill():
                assert time.monotonic() < deadline and not asked.done(), "the prefill server never had the request"
                time.sleep(0.1)
            self.prefill.client.abort(rid)
            error = asked.exception()
        assert isinstance(error, RequestFailed), error
        return address

    def num_waiting_at_prefill(self) -> int:
        """Requests whose pages the prefill server does not know yet."""
        (load,) = self.prefill.client.json("GET", "/v1/loads?include=disagg")["loads"]
        return int(load["disaggregation"]["prefill_bootstrap_queue_reqs"])


@contextmanager
def running_pair(pool: ServerPool, prefill: ServerConfig, decode: ServerConfig) -> Iterator[Pair]:
    """Both servers, started at once; stopped in the end. pool: holds the machine's lock."""
    pool.stop(at_once=True)
    bootstrap, ports = find_free_port(19_000, 21_000), (find_free_port(15_000, 17_000), find_free_port(17_000, 19_000))
    prefill = replace(prefill, flags=(*prefill.flags, "--disaggregation-bootstrap-port", str(bootstrap + 100)))
    with ThreadPoolExecutor(2) as starts:
        started = [
            starts.submit(start_server, config, log_folder=pool.log_folder, port=port)
            for config, port in zip((prefill, decode), ports, strict=True)
        ]
    servers = [future.result() for future in started if future.exception() is None]
    try:
        for future in started:
            future.result()
        yield Pair(*servers, bootstrap_port=bootstrap + 100)
    finally:
        for server in servers:
            server.kill()
