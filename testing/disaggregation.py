"""A prefill server and a decode server on this machine, with Mooncake over TCP between them."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from typing import Any

from testing.client import Answer, Client, RequestFailed
from testing.ports import find_free_ports
from testing.server import Server, ServerConfig, ServerPool, ServerStartError

HOST = "127.0.0.1"
LOOPBACK = (("SGLANG_HOST_IP", HOST), ("MC_TCP_BIND_ADDRESS", HOST))
"""Otherwise Mooncake takes the address of the machine's network card."""
BACKEND = ("--disaggregation-transfer-backend", "mooncake_tcp")
PREFILL_WAITS_S = 60
"""Longest wait of a prefill server for the pages of a request, which its decode server may be short of, or have dropped."""
DECODE_WAITS_S = 30
"""Longest wait of a decode server for the K/V of pages it has told of: a prefill server that drops a request by itself does not say so. The
pages of the tests are written within two seconds on idle cores."""


def prefill_server(model: str) -> ServerConfig:
    """Stock SGLang, with this package's part of a prefill server."""
    # Both servers have one page size, whatever ServerConfig gives a stock server of the model.
    # Idle it would keep a core busy, which the decode server's start and steps need.
    flags = (*BACKEND, "--disaggregation-mode", "prefill", "--page-size", str(ServerConfig.page_size), "--sleep-on-idle")
    environment = (*LOOPBACK, ("SGLANG_DISAGGREGATION_BOOTSTRAP_TIMEOUT", str(PREFILL_WAITS_S)))
    return ServerConfig(model, pool_tokens=8192, chunk_tokens=256, flags=flags, environment=environment, preloaded=True)


def decode_server(model: str, instances: int, pool_tokens: int, *flags: str) -> ServerConfig:
    flags = (*BACKEND, "--disaggregation-mode", "decode", *flags)
    limits = (
        ("SGLANG_DISAGGREGATION_WAITING_TIMEOUT", str(DECODE_WAITS_S)),
        ("SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL", "2"),
        ("SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT", "5"),  # a killed prefill server cannot say that it writes no more
    )
    environment = (*LOOPBACK, ("SGLANG_DYNCP_CHECK_EVERY_STEP", "1"), *limits)
    return ServerConfig(model, instances, pool_tokens=pool_tokens, dyncp=True, flags=flags, environment=environment, preloaded=True)


@dataclass
class Pair:
    """bootstrap_port: where the decode server finds the prefill server."""

    prefill: Server
    decode: Server
    bootstrap_port: int
    _rooms: Iterator[int] = field(init=False)

    def __post_init__(self) -> None:
        self._rooms = itertools.count(1000 * self.bootstrap_port)

    def address(self) -> dict[str, Any]:
        """What a router adds to a request: a room of its own at the prefill server."""
        return {"bootstrap_host": HOST, "bootstrap_port": self.bootstrap_port, "bootstrap_room": next(self._rooms)}

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
def running_router(pair: Pair, limit_s: float = 300.0) -> Iterator[Client]:
    """SGLang's own router in front of the pair, once it can answer: its /health is green before."""
    port, metrics = find_free_ports(2)
    addresses = ("--host", HOST, "--port", str(port), "--prometheus-host", HOST, "--prometheus-port", str(metrics))
    servers = ("--prefill", f"http://{HOST}:{pair.prefill.port}", str(pair.bootstrap_port), "--decode", f"http://{HOST}:{pair.decode.port}")
    command = [sys.executable, "-m", "sglang_router.launch_router", "--pd-disaggregation", *servers, "--policy", "round_robin", *addresses]
    log_path, client = pair.decode.log_path.with_name(f"router_{port}.log"), Client(port)
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + limit_s
        while not _is_ready(client):
            if process.poll() is not None or time.monotonic() > deadline:
                raise ServerStartError(f"the router is not ready: {log_path.read_text(errors='replace')[-4000:]}")
            time.sleep(0.2)
        yield client
    finally:
        process.kill()
        process.wait(timeout=10)


def _is_ready(router: Client) -> bool:
    try:
        return router.request("GET", "/readiness")[0] == 200
    except (OSError, HTTPException):
        return False


@contextmanager
def running_pair(pool: ServerPool, prefill: ServerConfig, decode: ServerConfig) -> Iterator[Pair]:
    with running_pairs(pool, [prefill], decode) as (pair,):
        yield pair


@contextmanager
def running_pairs(pool: ServerPool, prefills: Sequence[ServerConfig], decode: ServerConfig) -> Iterator[list[Pair]]:
    """One pair per prefill server, all with the same decode server. All start at once, and are stopped in the end.

    pool: holds the machine's lock.
    """
    pool.stop(at_once=True)
    own, *others = find_free_ports(1 + 2 * len(prefills))
    configs, ports, bootstraps = [decode], [own, *others[: len(prefills)]], others[len(prefills) :]
    for prefill, bootstrap in zip(prefills, bootstraps, strict=True):
        configs.append(replace(prefill, flags=(*prefill.flags, "--disaggregation-bootstrap-port", str(bootstrap))))
    with ThreadPoolExecutor(len(configs)) as starts:
        started = [starts.submit(pool.start, config, port=port) for config, port in zip(configs, ports, strict=True)]
    servers = [future.result() for future in started if future.exception() is None]
    try:
        for future in started:
            future.result()
        yield [Pair(prefill, servers[0], bootstrap) for prefill, bootstrap in zip(servers[1:], bootstraps, strict=True)]
    finally:
        for server in servers:
            server.kill()
