"""Servers for the runtime tests. Tests that ask for the same configuration share one server, so they are run next to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.server import Server, ServerConfig, ServerPool, server_pool

LOG_FOLDER = Path(__file__).resolve().parent.parent.parent / "logs"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test in this folder needs a server; starting one takes up to a minute, loaded machines longer."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.server)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(900))


@pytest.fixture(scope="session")
def pool() -> Iterator[ServerPool]:
    """The one live server of this machine, under the machine lock."""
    with server_pool(LOG_FOLDER) as servers:
        yield servers


@pytest.fixture(scope="session")
def serve(pool: ServerPool) -> Callable[[ServerConfig], Server]:
    """serve(config) -> running server. A server of another configuration is stopped first."""
    return pool.get
