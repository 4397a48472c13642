"""Log-probabilities of all prompt and output tokens against stock SGLang with one large pool, over the whole grid."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from testing.client import Answer
from testing.comparison import compare
from testing.dyncp_grid import GRID, PROMPTS, grid_server
from testing.recall import MODEL_NAMES, encode
from testing.transformers_reference import load_reference, score

NUM_AT_ONCE = 8
MOST_SKIPPED = 0.01
"""Share of output tokens that may lie behind a near tie of stock's."""


def ask_all(client) -> list[Answer]:
    """Two per home at a time: steps mix prefills of one home with decodes and idleness of others."""

    def ask(p):
        pin = {"custom_params": {"dyncp": {"degree": p.degree, "home": p.home}}}
        return client.generate(p.text, max_new_tokens=p.max_new_tokens, logprobs=True, sampling=pin)

    with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
        return list(pool.map(ask, PROMPTS))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("model", "page_size", "chunk_tokens"), [pytest.param(*point, marks=pytest.mark.on_server(grid_server(*point))) for point in GRID]
)
def test_equal_to_one_large_pool(serve, stock_answers, model, page_size, chunk_tokens):
    stock = stock_answers.of(model).prompts
    ours = ask_all(serve(grid_server(model, page_size, chunk_tokens)).client)
    results = [compare(a, b) for a, b in zip(stock, ours, strict=True)]
    worst = max(range(len(PROMPTS)), key=lambda i: results[i].worst)
    assert results[worst].worst < 1e-4, f"prompt {worst}: {PROMPTS[worst]}"
    num_outputs = sum(len(answer.output_tokens) for answer in stock)
    assert sum(r.num_skipped for r in results) <= MOST_SKIPPED * num_outputs


@pytest.mark.parametrize("model", [pytest.param(m, marks=pytest.mark.on_server(grid_server(m, 64, 256))) for m in MODEL_NAMES])
def test_close_to_transformers(serve, model):
    client = serve(grid_server(model, 64, 256)).client
    oracle = load_reference(model)
    for p in PROMPTS[1:4]:
        pin = {"custom_params": {"dyncp": {"degree": p.degree, "home": p.home}}}
        answer = client.generate(p.text, max_new_tokens=1, logprobs=True, sampling=pin)
        expected = score(oracle, encode(p.text))
        assert max(abs(a.logprob - b) for a, b in zip(answer.prompt_tokens, expected, strict=True)) < 1e-3
