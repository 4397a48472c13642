"""The runtime tests need servers: marked so, given time to start one, and put in an order in which few servers are started."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from upstream.checkpoints import find_case, write_checkpoint

from testing.recall import MODEL_NAMES
from testing.server import Server, ServerConfig
from testing.stock_answers import StockAnswers

CONTRACT = ServerConfig(
    "qwen3moe",
    instances=2,
    pool_tokens=1024,
    page_size=16,
    chunk_tokens=256,
    dyncp=True,
    flags=("--enable-metrics",),
    environment=(("SGLANG_DYNCP_CHECK_EVERY_STEP", "1"),),
)


@pytest.fixture(scope="module")
def contract_server(serve: Callable[[ServerConfig], Server]) -> Server:
    """Two instances with metrics: the test_contract modules share it."""
    return serve(CONTRACT)


@pytest.fixture(scope="session")
def stock_answers(serve: Callable[[ServerConfig], Server]) -> StockAnswers:
    return StockAnswers(serve)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoint(architecture) -> folder of a tiny checkpoint of test/upstream/model_cases.py, written once."""

    @cache
    def write(architecture: str) -> Path:
        return write_checkpoint(find_case(architecture), tmp_path_factory.mktemp(architecture))

    return write


HERE = Path(__file__).parent


def pytest_itemcollected(item: pytest.Item) -> None:
    """Every test in this folder needs a server. Marked before `-m` selects."""
    if HERE in item.path.parents:
        item.add_marker(pytest.mark.server)
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(900))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that name their server (`on_server`) follow each other by server, stock before ours: starting one takes a minute, and
    stock's answers are asked for while a stock server is up."""
    places = [index for index, item in enumerate(items) if HERE in item.path.parents]
    ours = sorted((items[index] for index in places), key=server_order)
    for index, item in zip(places, ours, strict=True):
        items[index] = item


def server_order(item: pytest.Item) -> tuple[Any, ...]:
    marker = item.get_closest_marker("on_server")
    if marker is None:
        return (-1,)
    config: ServerConfig = marker.args[0]
    return (
        MODEL_NAMES.index(config.model),
        config.dyncp,
        config.nodes,
        config.instances,
        config.slices,
        config.pool_tokens,
        -config.page_size,
        config.chunk_tokens,
        config.flags,
    )
