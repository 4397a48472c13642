"""Two process trees, as on two hosts, with two instances each: answers, limits of a node, the end of both when one instance is killed."""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest

from testing.client import RequestFailed
from testing.comparison import compare
from testing.dyncp_grid import CHECK, POOL_TOKENS, PROMPTS
from testing.recall import recall_prompt
from testing.server import Server, ServerConfig
from testing.stock_answers import FOREVER, StockAnswers

Serve = Callable[[ServerConfig], Server]

NODES, PER_NODE = 2, 2
WIDE_EP = ("--moe-dense-tp-size", "1", "--enable-dp-lm-head")
"""Dense layers and the head of each instance by itself, as where experts span hosts."""
EPLB = ("--enable-eplb", "--ep-num-redundant-experts=4", "--eplb-rebalance-num-iterations=10", "--eplb-rebalance-layers-per-chunk=1")
"""Experts move between instances every 10 forward passes, over a pass per layer. (All layers at once is timed with CUDA by SGLang.)"""


def two_trees(model: str, *flags: str) -> ServerConfig:
    return ServerConfig(
        model,
        NODES * PER_NODE,
        pool_tokens=POOL_TOKENS,
        chunk_tokens=256,
        dyncp=True,
        flags=("--enable-metrics", *flags),
        environment=CHECK,
        nodes=NODES,
    )


GQA, MLA = two_trees("qwen3moe"), two_trees("deepseek_v2", *WIDE_EP, *EPLB)
"""The first layer of the second is dense."""
END_SECONDS = 15.0


def on_server(config: ServerConfig, *values: Any) -> Any:
    return pytest.param(config, *values, marks=pytest.mark.on_server(config), id=config.model)


on_both = pytest.mark.parametrize("config", [on_server(GQA), on_server(MLA)])


def nodes_of(answer: Any) -> set[int]:
    return {shard["rank"] // PER_NODE for shard in answer.meta["dyncp"]["shards"]}


@on_both
def test_answers_of_both_nodes_at_once_are_stock_s(serve: Serve, stock_answers: StockAnswers, config: ServerConfig) -> None:
    """All that fit a node, of the prompts of the exactness tests: unsharded and over two instances, homes in both nodes."""
    chosen = [index for index, prompt in enumerate(PROMPTS) if prompt.degree <= PER_NODE]
    stock, client = stock_answers.of(config.model).prompts, serve(config).client

    def ask(index: int) -> Any:
        prompt = PROMPTS[index]
        pin = {"custom_params": {"dyncp": {"degree": prompt.degree, "home": prompt.home}}}
        return client.generate(prompt.text, max_new_tokens=prompt.max_new_tokens, logprobs=True, sampling=pin)

    with ThreadPoolExecutor(8) as pool:
        answers = dict(zip(chosen, pool.map(ask, chosen), strict=True))
    for index, answer in answers.items():
        assert compare(stock[index], answer).worst < 1e-4, PROMPTS[index]
        assert nodes_of(answer) == {PROMPTS[index].home // PER_NODE}
    assert {PROMPTS[index].home for index in chosen if PROMPTS[index].degree > 1} == set(range(NODES * PER_NODE))
    assert ("[EPLBManager] rebalance end" in serve(config).log()) == ("--enable-eplb" in config.flags)


@on_both
def test_long_prompts_lie_in_one_node_each(serve: Serve, config: ServerConfig) -> None:
    """Placed by the router, beyond one pool: two nodes, two prompts at once."""
    client = serve(config).client
    prompts = [recall_prompt(1700, 0.2 + index / 4, 40 + index) for index in range(3)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: client.generate(prompt.text), prompts))
    assert [answer.text for answer in answers] == [prompt.answer for prompt in prompts]
    assert all(len(nodes_of(answer)) == 1 and len(answer.meta["dyncp"]["shards"]) == PER_NODE for answer in answers)
    assert len(set.union(*map(nodes_of, answers))) == NODES


@on_both
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_a_node_is_refused_with_its_size(serve: Serve, config: ServerConfig, stream: bool) -> None:
    client, text = serve(config).client, recall_prompt(2100, 0.5, 3).text
    with pytest.raises(RequestFailed) as failure:
        list(client.stream(text).events()) if stream else client.generate(text)
    assert failure.value.status == 400
    assert re.search("2 KV pools of 1024 tokens of a node with 2 instances .*--dyncp-node-size", failure.value.message)


def instance(server: Server, rank: int) -> psutil.Process:
    tree = psutil.Process(server.followers[0].pid if rank >= PER_NODE else server.process.pid).children(recursive=True)
    (found,) = [process for process in tree if f"scheduler_DP{rank}" in " ".join(process.cmdline())]
    return found


@pytest.mark.parametrize(("config", "killed"), [on_server(GQA, 2), on_server(MLA, 1)])
def test_the_loss_of_an_instance_ends_both_trees(serve: Serve, config: ServerConfig, killed: int) -> None:
    """Of the second node, and of the first, which is the main process's own: clients of both nodes get HTTP 503 in their streams, then no
    process of either tree is left."""
    server = serve(config)
    trees = [server.process, *server.followers]
    family = [child for tree in trees for child in psutil.Process(tree.pid).children(recursive=True)]
    pins = [{"custom_params": {"dyncp": {"degree": 2, "home": home}}} for home in (0, 3)]
    streams = [server.client.stream(recall_prompt(300, 0.5, 9).ids, max_new_tokens=1500, sampling=FOREVER | pin).events() for pin in pins]
    for events in streams:
        next(events)
    deadline = time.monotonic() + END_SECONDS
    instance(server, killed).send_signal(signal.SIGKILL)
    for events in streams:
        assert list(events)[-1]["meta_info"]["finish_reason"]["status_code"] == 503
    # The codes first: psutil would take them.
    codes = [tree.wait(timeout=max(0.1, deadline - time.monotonic())) for tree in trees]
    _, alive = psutil.wait_procs(family, timeout=max(0.1, deadline - time.monotonic()))
    assert not alive, [process.cmdline() for process in alive]
    assert codes[0] == 75 and codes[1] != 0, "whoever started a node is to start it again"
