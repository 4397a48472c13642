"""Attention tensor parallelism: two instances of two slices each, pools of 512 tokens. Answers are stock's, whoever holds which heads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmark.serving.kill import EXIT_SECONDS, wait_until_gone
from benchmark.serving.leftovers import Possessions
from testing.client import RequestFailed
from testing.comparison import assert_same_until_tie, compare
from testing.drained import assert_drained
from testing.dyncp_grid import CHECK, GROWING, PROMPTS
from testing.hook_report import going_apart_by, tell
from testing.recall import MODEL_NAMES, recall_prompt
from testing.server import Server, ServerConfig
from testing.stock_answers import FOREVER, StockAnswers

Serve = Callable[[ServerConfig], Server]

INSTANCES, SLICES, POOL = 2, 2, 512
APART = Path(tempfile.gettempdir()) / f"dyncp_apart_{os.getpid()}"


def sliced(model: str) -> ServerConfig:
    """MLA's latent is in every slice whole, GQA's K/V heads are spread."""
    flags = ("--enable-metrics",)
    config = ServerConfig(model, INSTANCES, pool_tokens=POOL, chunk_tokens=64, dyncp=True, flags=flags, environment=CHECK, slices=SLICES)
    return going_apart_by(config, APART)


CONFIGS = {model: sliced(model) for model in MODEL_NAMES}
EACH = pytest.mark.parametrize(
    "config", [pytest.param(config, id=model, marks=pytest.mark.on_server(config)) for model, config in CONFIGS.items()]
)
GQA = CONFIGS["qwen3moe"]
CHOSEN = [i for i, p in enumerate(PROMPTS) if p.degree <= INSTANCES and len(p.text) + p.max_new_tokens < p.degree * (POOL - 32)]
"""Of the prompts of the exactness tests, what these pools hold at the degree that is asked for."""


@EACH
def test_answers_are_those_of_one_large_pool(serve: Serve, stock_answers: StockAnswers, config: ServerConfig) -> None:
    stock, client = stock_answers.of(config.model).prompts, serve(config).client

    def ask(index: int) -> Any:
        prompt = PROMPTS[index]
        pin = {"custom_params": {"dyncp": {"degree": prompt.degree, "home": prompt.home % INSTANCES}}}
        return client.generate(prompt.text, max_new_tokens=prompt.max_new_tokens, logprobs=True, sampling=pin)

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, CHOSEN))
    for index, answer in zip(CHOSEN, answers, strict=True):
        assert compare(stock[index], answer).worst < 1e-4, PROMPTS[index]
        assert answer.meta["dyncp"]["degree_start"] == PROMPTS[index].degree, "it may have grown since"
    assert {(PROMPTS[index].degree, PROMPTS[index].home % INSTANCES) for index in CHOSEN} == {(1, 0), (1, 1), (2, 0), (2, 1)}


@pytest.mark.on_server(GQA)
def test_requests_that_outgrow_their_pools_together(serve: Serve, stock_answers: StockAnswers) -> None:
    """They need more than both pools hold: whoever must sits out or starts over, in both slices alike."""
    stock, client = stock_answers.of(GQA.model).growing, serve(GQA).client

    def ask(item: Any) -> Any:
        return client.generate(item[0].text, max_new_tokens=item[1], logprobs=True, sampling=FOREVER)

    with ThreadPoolExecutor(len(GROWING)) as pool:
        answers = list(pool.map(ask, GROWING))
    for expected, answer, (_, count) in zip(stock, answers, GROWING, strict=True):
        assert len(answer.ids) == count
        assert_same_until_tie(expected, answer)
    assert answers[0].meta["dyncp"]["degree_end"] == INSTANCES, "700 tokens in pools of 512"


@EACH
def test_an_aborted_request_gives_the_pages_of_every_slice_back(serve: Serve, config: ServerConfig) -> None:
    server = serve(config)
    pin = {"custom_params": {"dyncp": {"degree": INSTANCES}}}
    stream = server.client.stream(recall_prompt(300, 0.5, 9).ids, max_new_tokens=600, sampling=FOREVER | pin)
    next(stream.events())
    stream.close()
    assert_drained(server)


@pytest.mark.on_server(GQA)
def test_a_slice_whose_books_go_apart_ends_the_server_by_name(serve: Serve) -> None:
    """The last test on this server: the client is told which slice of which instance, in what step, and what differs."""
    server = serve(GQA)
    possessions = Possessions.of(server.process.pid, server.port)
    tell(APART, "1.1")
    told = r"instance 1, slice 1 raised in step (\d+): ProtocolError: instance 1, slice 1, step \1: went apart from slice 0 in decisions"
    try:
        with pytest.raises(RequestFailed, match=told) as failed:
            server.client.generate(recall_prompt(300, 0.5, 9).ids, max_new_tokens=600, sampling=FOREVER)
        assert failed.value.status == 503
        assert server.process.wait(EXIT_SECONDS) == 75, server.last_words()
        assert wait_until_gone(possessions) == []
    finally:
        APART.unlink()
