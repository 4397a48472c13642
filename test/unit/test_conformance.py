"""What the comparison with stock SGLang sees and what it overlooks."""

from __future__ import annotations

import json
from typing import Any

import pytest

from benchmark.serving.conformance.__main__ import all_cases, judge
from benchmark.serving.conformance.case import Case
from benchmark.serving.conformance.outcome import difference, read_outcome

ANSWER = {"text": "ab", "output_ids": [5, 6], "meta_info": {"prompt_tokens": 3, "finish_reason": {"type": "length"}, "e2e_latency": 0.5}}


def differ(stock: Any, ours: Any, *, status: int = 200, sampled: bool = False) -> str | None:
    texts = [value if isinstance(value, str) else json.dumps(value) for value in (stock, ours)]
    return difference(read_outcome(200, texts[0], sampled=sampled), read_outcome(status, texts[1], sampled=sampled))


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"text": "ac"}, "said.text"),
        ({"output_ids": [5, 7]}, "said.output_ids"),
        ({"output_ids": [5]}, "said.output_ids"),
        ({"extra": 1}, "shape.extra is only ours"),
        ({"meta_info": {}}, "is only in stock"),
        ({"meta_info": ANSWER["meta_info"] | {"prompt_tokens": 4}}, "said.meta_info.prompt_tokens"),  # type: ignore[operator]
        ({"meta_info": ANSWER["meta_info"] | {"finish_reason": {"type": "stop"}}}, "said.meta_info.finish_reason"),  # type: ignore[operator]
    ],
)
def test_what_is_seen(change: dict[str, Any], seen: str) -> None:
    assert seen in (differ(ANSWER, ANSWER | change) or "")


def test_what_is_overlooked() -> None:
    """Times, what we add, and the text of a drawn answer."""
    ours = ANSWER | {"meta_info": {**ANSWER["meta_info"], "e2e_latency": 9, "dyncp": {"home": 0}}}  # type: ignore[dict-item]
    assert differ(ANSWER, ours) is None
    assert differ(ANSWER, ANSWER | {"text": "xyz", "output_ids": [1]}, sampled=True) is None
    assert "status 200 -> 400" in (differ(ANSWER, ANSWER, status=400) or "")


def test_where_a_beginning_was_found_is_overlooked_and_how_much_was_asked_is_not() -> None:
    """As Anthropic's door counts: which instance had answered the same before is chance."""
    usage = ({"input_tokens": 19}, {"input_tokens": 3, "cache_read_input_tokens": 16}, {"input_tokens": 4, "cache_read_input_tokens": 16})
    computed, found, more = (json.dumps({"usage": {"output_tokens": 8} | one}) for one in usage)
    assert difference(read_outcome(200, computed), read_outcome(200, found)) is None
    assert difference(read_outcome(200, computed), read_outcome(200, more)) == "said.usage.input_tokens: 19 -> 20"


def test_scores_are_compared_within_a_tolerance() -> None:
    scores = {"meta_info": {"output_token_logprobs": [[-0.5, 7, None]]}}
    assert differ(scores, {"meta_info": {"output_token_logprobs": [[-0.5001, 7, None]]}}) is None
    for wrong in ([[-0.6, 7, None]], [[-0.5, 8, None]], [[-0.5, 7, None]] * 2):
        assert "output_token_logprobs" in (differ(scores, {"meta_info": {"output_token_logprobs": wrong}}) or "")


def test_how_a_stream_is_cut_is_overlooked_and_what_it_says_is_seen() -> None:
    def stream(*pieces: str) -> str:
        events = [json.dumps({"choices": [{"index": 0, "text": piece, "finish_reason": None}]}) for piece in pieces]
        return "".join(f"data: {event}\n\n" for event in events) + "data: [DONE]\n\n"

    assert differ(stream("a", "bc"), stream("ab", "c")) is None
    assert differ(stream("a", "bc"), stream("ab", "d")) is not None
    assert differ(stream("a"), stream("a").replace("data: [DONE]\n\n", "")) is not None


def test_prompts_of_a_batch_may_be_streamed_in_any_order() -> None:
    def stream(*events: tuple[int, str, list[int]]) -> str:
        return "".join(f"data: {json.dumps({'index': index, 'text': text, 'output_ids': ids})}\n\n" for index, text, ids in events)

    stock = stream((0, "a", [1]), (1, "b", [2]), (0, "aa", [1, 1]), (1, "bb", [2, 2]))
    assert differ(stock, stream((1, "b", [2]), (1, "bb", [2, 2]), (0, "a", [1]), (0, "aa", [1, 1]))) is None
    assert "prompt 1" in (differ(stock, stream((0, "aa", [1, 1]), (1, "bc", [2, 3]))) or "")


@pytest.mark.parametrize(
    "events",
    [
        [{"type": "response.output_text.delta", "output_index": 0, "delta": "ab"}, {"type": "response.completed"}],
        [{"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "ab"}}, {"type": "message_stop"}],
        [{"response": "ab", "done": False}, {"response": "", "done": True, "done_reason": "stop"}],
    ],
    ids=["responses", "anthropic", "ollama"],
)
def test_what_streams_of_other_doors_say_is_seen(events: list[dict[str, Any]]) -> None:
    lines = [json.dumps(event) for event in events]
    stock = "\n".join(lines) if "done" in events[0] else "".join(f"event: x\ndata: {line}\n\n" for line in lines)
    assert differ(stock, stock.replace('"ab"', '"ac"')) is not None
    assert differ(stock, stock.replace(lines[-1], lines[0])) is not None, "it has no end"
    assert differ(stock, stock) is None


def test_metrics_are_compared_by_name() -> None:
    text = '# TYPE a gauge\na{x="1"} 5\n'
    assert differ(text, text.replace("5", "6") + "sglang:dyncp_b 1\n") is None
    assert differ(text, text + "b 1\n") is not None


def test_a_documented_difference_is_no_fault() -> None:
    cases = [Case("same"), Case("known", documented="why"), Case("fault")]
    stock = {case.name: read_outcome(200, json.dumps(ANSWER)) for case in cases}
    ours = stock | {name: read_outcome(400, "{}") for name in ("known", "fault")}
    report = judge(cases, stock, ours)
    assert (report["asked"], report["alike"], report["documented"]) == (3, 1, {"known": "why"})
    assert list(report["faults"]) == ["fault"]


def test_names_of_cases_are_their_own() -> None:
    names = [case.name for case in all_cases()]
    assert len(names) == len(set(names)) > 600


def test_a_question_names_a_model_where_all_answers_without_one_are_alike() -> None:
    """SGLang answers every /v1/responses without one with the same HTTP 400."""
    without = [case.name for case in all_cases() if case.path == "/v1/responses" and "model" not in case.body]
    assert without == ["responses: no model"]
