"""What of an answer is compared: status, the shape of its JSON, and the values that do not change from run to run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SAID = {
    "text", "output_ids", "finish_reason", "content", "reasoning_content", "role", "tokens", "count", "prompt_tokens", "completion_tokens",
    "total_tokens", "input_tokens", "output_tokens", "stop_reason", "response", "done", "done_reason", "eval_count", "prompt_eval_count",
    "scores", "input_token_logprobs", "output_token_logprobs", "output_top_logprobs", "input_top_logprobs", "output_token_ids_logprobs",
    "token_logprobs", "logprob", "output_text", "matched_stop", "index", "normal_text", "calls", "reasoning_text", "answers", "prediction",
    "type", "code", "prompt_token_ids", "token_ids", "max_model_len",
}  # fmt: skip
"""Keys whose values are compared; of all others the kind is."""
TEXTS = {"text", "output_ids", "content", "response", "output_text", "output_token_logprobs", "output_top_logprobs", "token_logprobs",
         "logprob", "token_ids", "output_token_ids_logprobs", "tokens"}  # fmt: skip
"""Those that differ between two runs where the answer is sampled."""
FOUND_IN_CACHE = "cache_read_input_tokens"
"""Anthropic's word for it, said where something was: that depends on the instance, which stock chooses in turns."""
OURS = "dyncp"
"""Keys and metrics with it in their name are what we add."""
TOLERANCE = 1e-3
"""Of log-probabilities: the order in which a batch is computed may differ."""


@dataclass(frozen=True)
class Outcome:
    """status: HTTP, 0 where there was none. shape: kinds of values by key. said: values by key. text: the beginning of the body."""

    status: int
    shape: Any
    said: Any
    text: str = ""


def read_outcome(status: int, text: str, *, sampled: bool = False) -> Outcome:
    """A body is JSON, server-sent events, metrics or text."""
    ignored = TEXTS if sampled else set()
    if (events := _events(text)) is not None:
        shapes = sorted({json.dumps(shape_of(event), sort_keys=True) for event in events})
        return Outcome(status, ["events", shapes, _ended(text, events)], None if sampled else _joined(events), text[:300])
    try:
        value = json.loads(text)
    except ValueError:
        return Outcome(status, _names_of_metrics(text) if "# TYPE" in text else "text", None, text[:300])
    return Outcome(status, shape_of(value), said_in(value, ignored), text[:300])


def _events(text: str) -> list[Any] | None:
    """The JSON objects of a stream, server-sent (OpenAI's, Anthropic's, SGLang's) or one per line (Ollama's); None for anything else."""
    lines = text.splitlines()
    if text.startswith(("data:", "event:")):
        return [json.loads(line[5:]) for line in lines if line.startswith("data: {")]
    if len(lines) > 1 and all(line.startswith("{") and line.endswith("}") for line in lines):
        return [json.loads(line) for line in lines]
    return None


def _ended(text: str, events: list[Any]) -> Any:
    """How a stream says that it is over: a last word, the kind of its last event, or a mark there."""
    last = events[-1] if events else {}
    return [text.rstrip().endswith("[DONE]"), last.get("type"), last.get("done")]


def shape_of(value: Any) -> Any:
    """Kinds of values. A list is the set of its elements' shapes; null and a value are both allowed where only their presence varies."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if OURS not in key and key != FOUND_IN_CACHE}
        return {key: "any" if key.startswith("cached_tokens") else shape_of(item) for key, item in kept.items()}
    if isinstance(value, list):
        shapes = {json.dumps(shape_of(item), sort_keys=True): shape_of(item) for item in value}
        return [shapes[key] for key in sorted(shapes)]
    if isinstance(value, bool):
        return "bool"
    return "number" if isinstance(value, int | float) else type(value).__name__


def said_in(value: Any, ignored: set[str]) -> Any:
    """The parts of a JSON value under keys of SAID, None where there is nothing."""
    if isinstance(value, dict):
        if FOUND_IN_CACHE in value:  # Anthropic's input tokens are those that were not found
            value = value | {"input_tokens": value["input_tokens"] + value[FOUND_IN_CACHE]}
        chosen = {key: item if key in SAID and not isinstance(item, dict) else said_in(item, ignored) for key, item in value.items()}
        kept = {key: item for key, item in chosen.items() if key not in ignored and OURS not in key}
        return {key: item for key, item in kept.items() if item is not None and (key in SAID or item != {})} or None
    if isinstance(value, list):
        items = [said_in(item, ignored) if isinstance(item, dict | list) else None for item in value]
        return items if any(item is not None for item in items) else None
    return None


def _joined(events: list[Any]) -> Any:
    """What a stream says in all, by choice or prompt, which may come in any order: pieces of text put together, the longest text and its
    ids where every event repeats what came before. How it is cut into pieces is not compared."""
    said: dict[str, Any] = {}
    for event in events:
        for key, piece in _pieces(event):
            said[key] = said.get(key, "") + piece
        if "text" in event and "type" not in event:
            key, whole = f"prompt {event.get('index', 0)}", [event["text"], event.get("output_ids"), said_in(event.get("meta_info"), set())]
            if len(whole[1] or whole[0]) >= len(said.get(key, whole)[1] or said.get(key, whole)[0]):
                said[key] = whole
    return said


def _pieces(event: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What one event adds to which text."""
    for choice in event.get("choices", []):
        delta = choice.get("delta") or {}
        yield f"choice {choice.get('index')}", choice.get("text") or delta.get("content") or ""
        yield f"thoughts {choice.get('index')}", delta.get("reasoning_content") or ""
        yield f"finish {choice.get('index')}", str(choice.get("finish_reason") or "")
        for call in delta.get("tool_calls") or []:
            function = call.get("function") or {}
            yield f"call {choice.get('index')}.{call.get('index')}", f"{function.get('name') or ''}{function.get('arguments') or ''}"
    delta = event.get("delta")
    if isinstance(delta, str):  # /v1/responses
        yield f"{event.get('type')} {event.get('output_index')}.{event.get('content_index')}", delta
    elif isinstance(delta, dict):  # /v1/messages
        yield f"block {event.get('index')}", str(delta.get("text") or delta.get("partial_json") or delta.get("thinking") or "")
        yield "stop", str(delta.get("stop_reason") or "")
    if "done" in event:  # Ollama
        yield "response", event.get("response") or (event.get("message") or {}).get("content") or ""
        yield "reason", str(event.get("done_reason") or "")


def _names_of_metrics(text: str) -> list[str]:
    names = {line.split("{")[0].split(" ")[0] for line in text.splitlines() if line and not line.startswith("#")}
    return sorted(name for name in names if OURS not in name)


def difference(stock: Outcome, ours: Outcome) -> str | None:
    """The first thing that differs, or None."""
    if stock.status != ours.status:
        return f"status {stock.status} -> {ours.status}: {ours.text}"
    return _differ(stock.shape, ours.shape, "shape") or _differ(stock.said, ours.said, "said")


def _differ(stock: Any, ours: Any, where: str) -> str | None:
    if isinstance(stock, dict) and isinstance(ours, dict):
        for key in sorted(set(stock) | set(ours)):
            if key not in stock or key not in ours:
                return f"{where}.{key} is only {'ours' if key in ours else 'in stock'}"
            if found := _differ(stock[key], ours[key], f"{where}.{key}"):
                return found
        return None
    if isinstance(stock, list) and isinstance(ours, list) and len(stock) == len(ours):
        pairs = enumerate(zip(stock, ours, strict=True))
        return next((text for place, (one, other) in pairs if (text := _differ(one, other, f"{where}[{place}]"))), None)
    if type(stock) is type(ours) is float and math.isclose(stock, ours, abs_tol=TOLERANCE):
        return None
    return None if stock == ours else f"{where}: {json.dumps(stock)[:160]} -> {json.dumps(ours)[:160]}"
