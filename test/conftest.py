"""The one live server of a test run. Tests that ask for the same configuration share it, so they are run next to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from testing.server import Server, ServerConfig, ServerPool, server_pool

LOG_FOLDER = Path(__file__).resolve().parent.parent / "logs"


@pytest.fixture(scope="session")
def pool() -> Iterator[ServerPool]:
    """The one live server of this machine, under the machine lock."""
    with server_pool(LOG_FOLDER) as servers:
        yield servers


@pytest.fixture(scope="session")
def serve(pool: ServerPool) -> Callable[[ServerConfig], Server]:
    """serve(config) -> running server. A server of another configuration is stopped first."""
    return pool.get


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    """A failure on a server that died shows why it died: no test that uses it can know."""
    report: pytest.TestReport = yield
    servers = getattr(item, "funcargs", {}).get("pool")
    if report.failed and isinstance(servers, ServerPool) and (dead := servers.dead_server()) is not None:
        report.sections.append(("the server died", dead.last_words()))
    return report
