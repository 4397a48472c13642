"""One function per entry of behaviour.yaml. Each asks a running server and returns what a run with the plugin off may be compared with.

Prompts have at least 48 tokens, so that with pages of 16 they can be sharded. An AssertionError or RequestFailed means: does not hold.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from testing.client import Client, RequestFailed
from testing.metrics import parse_metrics
from testing.recall import EOS, model_path, random_ids, recall_prompt

PROMPT = recall_prompt(96, 0.3, seed=5).text
OTHER = recall_prompt(128, 0.6, seed=6).text
ENDLESS = {"ignore_eos": True}


def health(client: Client) -> None:
    assert client.request("GET", "/health")[0] == 200
    assert client.request("GET", "/health_generate")[0] == 200


def model_list(client: Client) -> Any:
    models = client.json("GET", "/v1/models")["data"]
    return [(model["id"], model["max_model_len"]) for model in models]


def flush_when_idle(client: Client) -> None:
    deadline = time.monotonic() + 20
    while not client.flush_cache():
        assert time.monotonic() < deadline, "not idle after 20 s"
        time.sleep(0.2)


def loads(client: Client) -> Any:
    reply = client.json("GET", "/v1/loads?include=all")
    assert [load["dp_rank"] for load in reply["loads"]] == [0, 1]
    return sorted(reply), [sorted(load) for load in reply["loads"]]


def server_info_fields(client: Client) -> Any:
    """Whatever we add is named after us."""
    info = client.server_info()
    return sorted(name for name in info if "dyncp" not in name), len(info["internal_states"])


def priority(client: Client) -> Any:
    return [client.generate(PROMPT, max_new_tokens=4, sampling=ENDLESS, priority=value).ids for value in (-5, 0, 7, 2**40)]


def pause_in_place(client: Client) -> Any:
    with client.stream(PROMPT, max_new_tokens=24, sampling=ENDLESS) as stream:
        events = stream.events()
        next(events)
        client.json("POST", "/pause_generation", {"mode": "in_place"})
        client.json("POST", "/continue_generation", {})
        return list(events)[-1]["output_ids"]


def pause_abort(client: Client) -> None:
    with client.stream(PROMPT, max_new_tokens=2000, sampling=ENDLESS) as stream:
        events = stream.events()
        next(events)
        client.json("POST", "/pause_generation", {"mode": "abort"})
        try:
            assert list(events)[-1]["meta_info"]["finish_reason"]["type"] == "abort"
        finally:
            client.json("POST", "/continue_generation", {})
    # Behind the abort on every instance: a request that overtakes it would be aborted too, in stock as well.
    flush_when_idle(client)
    assert client.generate(PROMPT, max_new_tokens=2).ids


def completion(client: Client) -> Any:
    reply = client.complete(PROMPT, max_tokens=8)
    choice, usage = reply["choices"][0], reply["usage"]
    assert usage["prompt_tokens"] == len(PROMPT)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    return choice["text"], choice["finish_reason"], usage["completion_tokens"]


def completion_batch(client: Client) -> Any:
    body = {"model": "default", "prompt": [PROMPT, OTHER], "max_tokens": 6, "temperature": 0}
    choices = client.json("POST", "/v1/completions", body)["choices"]
    assert [choice["index"] for choice in choices] == [0, 1]
    return [choice["text"] for choice in choices]


def chat(client: Client) -> Any:
    reply = client.chat(PROMPT, max_tokens=8)
    choice = reply["choices"][0]
    assert choice["message"]["role"] == "assistant"
    return choice["message"]["content"], choice["finish_reason"], reply["usage"]["prompt_tokens"]


def completion_logprobs(client: Client) -> None:
    reply = client.complete(PROMPT, max_tokens=5, logprobs=2, ignore_eos=True)
    scores = reply["choices"][0]["logprobs"]
    assert len(scores["token_logprobs"]) == len(scores["tokens"]) == 5
    assert all(score <= 0 for score in scores["token_logprobs"])


def openai_client(client: Client) -> None:
    import openai

    with openai.OpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="none", timeout=120) as official:
        whole = official.completions.create(model="default", prompt=PROMPT, max_tokens=6, temperature=0)
        pieces = official.completions.create(model="default", prompt=PROMPT, max_tokens=6, temperature=0, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == whole.choices[0].text


def greedy(client: Client) -> Any:
    return [client.generate(prompt, max_new_tokens=12, sampling=ENDLESS).ids for prompt in (PROMPT, OTHER)]


def batch(client: Client) -> Any:
    body = {"text": [PROMPT, OTHER, PROMPT], "sampling_params": {"temperature": 0, "max_new_tokens": 6}}
    texts = [reply["text"] for reply in client.json("POST", "/generate", body)]
    assert texts[0] == texts[2]
    return texts


def rid(client: Client) -> None:
    assert client.generate(PROMPT, max_new_tokens=2, rid="behaviour-1").meta["id"] == "behaviour-1"


def max_new_tokens(client: Client) -> None:
    answer = client.generate(PROMPT, max_new_tokens=7, sampling=ENDLESS)
    assert (len(answer.ids), answer.finish_reason) == (7, "length")


def min_new_tokens(client: Client) -> None:
    answer = client.generate(PROMPT, max_new_tokens=20, sampling={"min_new_tokens": 15})
    assert len(answer.ids) >= 15
    assert EOS not in answer.ids[:14]


def stop_string(client: Client) -> Any:
    text = client.generate(PROMPT, max_new_tokens=8, sampling=ENDLESS).text
    answer = client.generate(PROMPT, max_new_tokens=8, sampling={**ENDLESS, "stop": text[2:4]})
    assert answer.finish_reason == "stop"
    assert text[2:4] not in answer.text
    return answer.text


def stop_token(client: Client) -> Any:
    ids = client.generate(PROMPT, max_new_tokens=8, sampling=ENDLESS).ids
    answer = client.generate(PROMPT, max_new_tokens=8, sampling={"stop_token_ids": [ids[2]]})
    assert answer.finish_reason == "stop"
    return answer.ids


def top_k_one(client: Client) -> None:
    warm = client.generate(PROMPT, max_new_tokens=8, sampling={"temperature": 1.0, "top_k": 1})
    assert warm.ids == client.generate(PROMPT, max_new_tokens=8).ids


def several_choices(client: Client) -> None:
    reply = client.complete(PROMPT, max_tokens=4, n=3, temperature=1.0)
    assert sorted(choice["index"] for choice in reply["choices"]) == [0, 1, 2]


def logit_bias(client: Client) -> None:
    token = random_ids(1, seed=1)[0]
    answer = client.generate(PROMPT, max_new_tokens=3, sampling={**ENDLESS, "logit_bias": {str(token): 1000.0}})
    assert answer.ids == (token, token, token)


def frequency_penalty(client: Client) -> Any:
    plain = client.generate(PROMPT, max_new_tokens=24, sampling=ENDLESS).ids
    penalised = client.generate(PROMPT, max_new_tokens=24, sampling={**ENDLESS, "frequency_penalty": 2.0}).ids
    assert penalised != plain
    assert len(set(penalised)) >= len(set(plain))
    return penalised


def stream_equals_text(client: Client) -> None:
    text = client.complete(PROMPT, max_tokens=12)["choices"][0]["text"]
    with client.complete_stream(PROMPT, max_tokens=12) as stream:
        pieces = [event["choices"][0]["text"] for event in stream.events() if event["choices"]]
    assert "".join(pieces) == text


def stream_usage(client: Client) -> None:
    with client.complete_stream(PROMPT, max_tokens=5, ignore_eos=True, stream_options={"include_usage": True}) as stream:
        events = list(stream.events())
    assert events[-1]["usage"]["prompt_tokens"] == len(PROMPT)
    assert events[-1]["usage"]["completion_tokens"] == 5


def abort_by_id(client: Client) -> None:
    with client.stream(PROMPT, max_new_tokens=2000, sampling=ENDLESS, rid="behaviour-abort") as stream:
        events = stream.events()
        next(events)
        client.abort("behaviour-abort")
        rest: list[Any] = []
        with contextlib.suppress(RequestFailed):
            rest += events
    assert not rest or rest[-1]["meta_info"]["finish_reason"]["type"] == "abort"
    flush_when_idle(client)


def client_disconnect(client: Client) -> None:
    with client.stream(PROMPT, max_new_tokens=2000, sampling=ENDLESS) as stream:
        next(stream.events())
    flush_when_idle(client)
    assert client.generate(PROMPT, max_new_tokens=2).ids


def prompt_logprobs(client: Client) -> Any:
    answer = client.generate(random_ids(80, seed=9), max_new_tokens=4, logprobs=True, sampling=ENDLESS)
    assert len(answer.prompt_tokens) == 79
    return [round(token.logprob, 4) for token in (*answer.prompt_tokens, *answer.output_tokens)]


def top_logprobs(client: Client) -> None:
    body = {
        "text": PROMPT,
        "sampling_params": {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True},
        "return_logprob": True,
        "top_logprobs_num": 3,
    }
    meta = client.json("POST", "/generate", body)["meta_info"]
    chosen, best = meta["output_token_logprobs"], meta["output_top_logprobs"]
    assert all(len(entries) == 3 and entries[0][1] == token[1] for token, entries in zip(chosen, best, strict=True))


def regex(client: Client) -> None:
    answer = client.generate(PROMPT, max_new_tokens=8, sampling={"regex": "[0-9]{4}"})
    assert re.fullmatch("[0-9]{4}", answer.text)


def json_schema(client: Client) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"], "additionalProperties": False}
    answer = client.generate(PROMPT, max_new_tokens=48, sampling={"json_schema": json.dumps(schema)})
    assert isinstance(json.loads(answer.text)["ok"], bool)


def cached_tokens(client: Client) -> None:
    prompt = random_ids(96, seed=11)
    # Any of them may be served on the other instance, the last one too: each of the two is met without its cache once, at most.
    counts = [client.generate(prompt, max_new_tokens=2).meta["cached_tokens"] for _ in range(4)]
    assert sum(count >= 64 for count in counts) >= 2, counts


def too_long(client: Client) -> None:
    body = {"input_ids": random_ids(5000, seed=2), "sampling_params": {"max_new_tokens": 2}}
    status, _ = client.request("POST", "/generate", body)
    assert status == 400, status


def bad_sampling(client: Client) -> None:
    status, text = client.request("POST", "/generate", {"text": PROMPT, "sampling_params": {"top_p": 7}})
    assert status == 400, status
    assert "top_p" in text


def metrics(client: Client) -> None:
    before = _prompt_tokens(client)
    client.generate(random_ids(64, seed=int(before) % 1000 + 100), max_new_tokens=2)
    deadline = time.monotonic() + 10
    while _prompt_tokens(client) < before + 64:
        assert time.monotonic() < deadline, "not counted after 10 s"
        time.sleep(0.2)


def _prompt_tokens(client: Client) -> float:
    return sum(sample.value for sample in parse_metrics(client.metrics()) if sample.name == "sglang:prompt_tokens_total")


def bench_serving(client: Client) -> None:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "bench.jsonl"
        command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--host", "127.0.0.1", "--port", str(client.port)]
        command += ["--model", model_path("qwen3moe"), "--dataset-name", "random-ids"]
        command += ["--random-input-len", "64", "--random-output-len", "8"]
        command += ["--random-range-ratio", "1.0", "--num-prompts", "8", "--warmup-requests", "1"]
        command += ["--output-file", str(output)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
        assert result.returncode == 0, result.stderr[-800:]
        assert json.loads(output.read_text().splitlines()[-1])["completed"] == 8


CHECKS = {
    check.__name__: check
    for check in (
        health, model_list, flush_when_idle, loads, server_info_fields, priority, pause_in_place, pause_abort,
        completion, completion_batch, chat, completion_logprobs, openai_client, greedy, batch, rid,
        max_new_tokens, min_new_tokens, stop_string, stop_token, top_k_one, several_choices, logit_bias, frequency_penalty,
        stream_equals_text, stream_usage, abort_by_id, client_disconnect, prompt_logprobs, top_logprobs, regex, json_schema,
        cached_tokens, too_long, bad_sampling, metrics, bench_serving,
    )
}  # fmt: skip
