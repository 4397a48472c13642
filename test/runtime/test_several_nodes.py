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
CONFIG = ServerConfig(
    "qwen3moe",
    NODES * PER_NODE,
    pool_tokens=POOL_TOKENS,
    chunk_tokens=256,
    dyncp=True,
    flags=("--enable-metrics",),
    environment=CHECK,
    nodes=NODES,
)
END_SECONDS = 15.0

pytestmark = pytest.mark.on_server(CONFIG)


def nodes_of(answer: Any) -> set[int]:
    return {shard["rank"] // PER_NODE for shard in answer.meta["dyncp"]["shards"]}


def test_answers_of_both_nodes_at_once_are_stock_s(serve: Serve, stock_answers: StockAnswers) -> None:
    """All that fit a node, of the prompts of the exactness tests: unsharded and over two instances, homes in both nodes."""
    chosen = [index for index, prompt in enumerate(PROMPTS) if prompt.degree <= PER_NODE]
    stock, client = stock_answers.of("qwen3moe").prompts, serve(CONFIG).client

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


def test_long_prompts_lie_in_one_node_each(serve: Serve) -> None:
    """Placed by the router, beyond one pool: two nodes, two prompts at once."""
    client = serve(CONFIG).client
    prompts = [recall_prompt(1700, 0.2 + index / 4, 40 + index) for index in range(3)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: client.generate(prompt.text), prompts))
    assert [answer.text for answer in answers] == [prompt.answer for prompt in prompts]
    assert all(len(nodes_of(answer)) == 1 and len(answer.meta["dyncp"]["shards"]) == PER_NODE for answer in answers)
    assert len(set.union(*map(nodes_of, answers))) == NODES


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_a_node_is_refused_with_its_size(serve: Serve, stream: bool) -> None:
    client, text = serve(CONFIG).client, recall_prompt(2100, 0.5, 3).text
    with pytest.raises(RequestFailed) as failure:
        list(client.stream(text).events()) if stream else client.generate(text)
    assert failure.value.status == 400
    assert re.search("2 KV pools of 1024 tokens of a node with 2 instances .*--dyncp-node-size", failure.value.message)


def instance(server: Server, rank: int) -> psutil.Process:
    tree = psutil.Process(server.followers[0].pid if rank >= PER_NODE else server.process.pid).children(recursive=True)
    (found,) = [process for process in tree if f"scheduler_DP{rank}" in " ".join(process.cmdline())]
    return found


def test_the_loss_of_an_instance_ends_both_trees(serve: Serve) -> None:
    """One of the second node: clients of both nodes get HTTP 503 in their streams, then no process of either tree is left."""
    server = serve(CONFIG)
    trees = [server.process, *server.followers]
    family = [child for tree in trees for child in psutil.Process(tree.pid).children(recursive=True)]
    pins = [{"custom_params": {"dyncp": {"degree": 2, "home": home}}} for home in (0, 3)]
    streams = [server.client.stream(recall_prompt(300, 0.5, 9).ids, max_new_tokens=1500, sampling=FOREVER | pin).events() for pin in pins]
    for events in streams:
        next(events)
    deadline = time.monotonic() + END_SECONDS
    instance(server, 2).send_signal(signal.SIGKILL)
    for events in streams:
        assert list(events)[-1]["meta_info"]["finish_reason"]["status_code"] == 503
    # The codes first: psutil would take them.
    codes = [tree.wait(timeout=max(0.1, deadline - time.monotonic())) for tree in trees]
    _, alive = psutil.wait_procs(family, timeout=max(0.1, deadline - time.monotonic()))
    assert not alive, [process.cmdline() for process in alive]
    assert codes[0] == 75 and codes[1] != 0, "whoever started a node is to start it again"
