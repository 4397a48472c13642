"""The one live server of a test run, and programs of Debian. Tests that ask for the same server share it, so they are run next to each
other."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from testing.browser import CHROMIUM, running_browser
from testing.debian import Program, Unavailable, find_program
from testing.server import Server, ServerConfig, ServerPool, server_pool

if TYPE_CHECKING:
    from playwright.sync_api import Browser

# Tests make many small objects and little garbage that reference counts leave; looking for it took a tenth of the time of all of them.
gc.set_threshold(50_000, 20, 20)

LOG_FOLDER = Path(__file__).resolve().parent.parent / "logs"


@pytest.fixture(scope="session")
def pool() -> Iterator[ServerPool]:
    """The one live server of this machine, under the machine lock."""
    with server_pool(LOG_FOLDER) as servers:
        yield servers


@pytest.fixture(scope="session")
def serve(pool: ServerPool) -> Callable[[ServerConfig], Server]:
    """serve(config) -> running server, its processes preloaded. A server of another configuration is stopped first. `pool.get` starts one
    as users do."""
    return lambda config: pool.get(dataclasses.replace(config, preloaded=True))


@pytest.fixture(scope="session")
def debian_program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Program]:
    """debian_program(package, executable). Skips the test, with the reason, where it cannot be had."""
    folder = tmp_path_factory.mktemp("debian")

    def find(package: str, name: str) -> Program:
        try:
            return find_program(package, name, folder)
        except Unavailable as reason:
            pytest.skip(str(reason))

    return find


@pytest.fixture(scope="module")
def browser(debian_program: Callable[[str, str], Program]) -> Iterator[Browser]:
    """A headless browser. Of one module: while it runs, asyncio.run does not work in this thread."""
    with running_browser(debian_program(*CHROMIUM)) as running:
        yield running


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[pytest.TestReport]:
    """A failure on a server that died, or is about to, shows why it died: no test that uses it can know."""
    report: pytest.TestReport = yield
    servers = getattr(item, "funcargs", {}).get("pool")
    if report.failed and isinstance(servers, ServerPool) and (dead := servers.failed_server()) is not None:
        report.sections.append(("the server died", dead.last_words()))
    return report
