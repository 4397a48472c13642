"""What users rely on: refusals, results, metrics and the report, on one server with two instances of 1,024 tokens.

Every refused request is sent beside others, whose answers must be what they are alone.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from testing.client import VOCABULARY_SIZE, Answer, Client, RequestFailed
from testing.metrics import parse_metrics
from testing.recall import random_ids, recall_prompt
from testing.server import Server

PAGE, INSTANCES = 16, 2
"""Of the contract server, see conftest."""
GAUGES = ("kv_tokens", "guest_tokens", "home_requests", "attention_rows")


@pytest.fixture(scope="module")
def server(contract_server: Server) -> Server:
    return contract_server


@pytest.fixture(scope="module")
def client(server: Server) -> Client:
    return server.client


@pytest.fixture(scope="module")
def undisturbed(client: Client) -> tuple[list[list[int]], list[tuple[int, ...]]]:
    """Prompts and their answers, one at a time, before anything else."""
    prompts = [recall_prompt(length, 0.3, seed=length).ids for length in (200, 500, 900)]
    return prompts, [client.generate(ids, max_new_tokens=6).ids for ids in prompts]


@pytest.fixture
def others(client: Client, undisturbed: tuple[list[list[int]], list[tuple[int, ...]]]) -> Iterator[None]:
    """Requests of other people run beside the test; afterwards the server lives, and their answers are the same."""
    prompts, expected = undisturbed
    with ThreadPoolExecutor(len(prompts)) as executor:
        running = [executor.submit(client.generate, ids, max_new_tokens=6) for ids in prompts]
        yield
        assert [task.result().ids for task in running] == expected


def pinned(**pin: Any) -> dict[str, Any]:
    return {"custom_params": {"dyncp": pin}}


def refused(call: Callable[[], Any]) -> str:
    """The message of an HTTP 400 that came before any output."""
    with pytest.raises(RequestFailed) as failure:
        call()
    assert failure.value.status == 400
    return failure.value.message


BAD_PINS = [{"degree": value} for value in (0, -1, 99, "two", 1.5, [2], True)] + [{"home": 9}, {"home": -1}, {"degre": 2}]


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("pin", BAD_PINS, ids=str)
def test_bad_pins(client: Client, pin: dict[str, Any]) -> None:
    name, value = next(iter(pin.items()))
    told = [
        refused(lambda: client.generate(random_ids(100, seed=1), sampling=pinned(**pin))),
        refused(lambda: client.stream(random_ids(100, seed=1), sampling=pinned(**pin))),
        refused(lambda: client.complete("hello", **pinned(**pin))),
        refused(lambda: client.complete_stream("hello", **pinned(**pin))),
        refused(lambda: client.chat("hello", **pinned(**pin))),
        refused(lambda: client.chat("hello", stream=True, **pinned(**pin))),
    ]
    for message in told:
        assert f"custom_params.dyncp.{name}" in message
        assert name == "degre" or str(value) in message


@pytest.mark.usefixtures("others")
def test_more_shards_than_pages(client: Client) -> None:
    assert "1 pages of 16" in refused(lambda: client.stream(random_ids(12, seed=1), sampling=pinned(degree=2)))


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize(("prompt", "new"), [(2040, 4), (3000, 4), (1500, 600), (3990, 4)])
def test_longer_than_the_cluster(client: Client, prompt: int, new: int) -> None:
    ids = random_ids(prompt, seed=2)
    for call in (client.generate, client.stream):
        message = refused(lambda call=call: call(ids, max_new_tokens=new))
        assert f"{prompt} tokens" in message
        assert "exceed 2031 tokens" in message
        assert "--max-total-tokens" in message


@pytest.mark.usefixtures("others")
def test_longer_than_the_cluster_on_the_openai_endpoints(client: Client) -> None:
    text = "a" * 2040
    for call in (client.complete, client.complete_stream):
        assert "--max-total-tokens" in refused(lambda call=call: call(text, max_tokens=4))


def test_longest_prompt_is_served_streaming_and_not(client: Client) -> None:
    ids = random_ids(2016, seed=3)
    answer = client.generate(ids, max_new_tokens=8, sampling={"ignore_eos": True})
    assert answer.meta["completion_tokens"] == 8
    assert answer.meta["dyncp"]["degree_end"] == 2
    with client.stream(ids, max_new_tokens=8, sampling={"ignore_eos": True}) as stream:
        last = list(stream.events())[-1]
    assert tuple(last["output_ids"]) == answer.ids


def test_prompt_near_the_limit_without_a_bound_on_the_output(client: Client) -> None:
    """The router assumes an output length; that must not make the request look too long."""
    status, text = client.request("POST", "/v1/completions", {"model": "default", "prompt": random_ids(1990, seed=4), "temperature": 0})
    assert status == 200, text
    body = {"model": "default", "messages": [{"role": "user", "content": "b" * 1900}], "temperature": 0}
    status, text = client.request("POST", "/v1/chat/completions", body)
    assert status == 200, text


@pytest.mark.usefixtures("others")
def test_client_hints_place_nothing(client: Client) -> None:
    placed = client.generate(random_ids(100, seed=5), max_new_tokens=2).meta["dyncp"]
    payloads = [{"home": 1 - placed["home"], "shards": [0, 1], "tokens": [16, 84], "flexible": False}, {}, {"home": "x"}]
    for payload in payloads:
        action = {"action_id": "a", "action_type": "dyncp.place", "action_version": "1", "payload": payload}
        hints = {"protocol_version": "1", "message_id": "m", "actions": [action]}
        dyncp = client.generate(random_ids(100, seed=5), max_new_tokens=2, kv_hints=hints).meta["dyncp"]
        assert dyncp["degree_start"] == dyncp["degree_end"] == 1
        assert dyncp["shards"] == [{"rank": dyncp["home"], "tokens": 101}]


OPTIONS: list[dict[str, Any]] = [
    {"session_params": {"id": "s"}},
    {"return_hidden_states": True},
    {"lora_path": "adapter"},
    {"image_data": "http://localhost/x.png"},
    {"sampling": {"beam_width": 2}},
]


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: next(iter(option)))
def test_options_that_are_not_served(client: Client, option: dict[str, Any]) -> None:
    name = next(iter(option.get("sampling", option)))
    for call in (client.generate, client.stream):
        assert f"{name} " in refused(lambda call=call: call(random_ids(20, seed=6), **option))


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"input_embeds": [[0.1] * 8], "sampling_params": {}}),
        ("/encode", {"text": "x"}),
        ("/v1/embeddings", {"model": "default", "input": "x"}),
        ("/pause_generation", {"mode": "retract"}),
        ("/release_memory_occupation", {}),
        ("/resume_memory_occupation", {}),
        ("/update_weights_from_disk", {"model_path": "x"}),
        ("/open_session", {"capacity_of_str_len": 10}),
        ("/load_lora_adapter", {"lora_name": "a", "lora_path": "b"}),
    ],
)
def test_endpoints_that_are_not_served(client: Client, path: str, body: dict[str, Any]) -> None:
    status, text = client.request("POST", path, body)
    assert (status, "not work with --enable-dyncp" in text) == (400, True), text


def test_priority_changes_nothing(client: Client) -> None:
    """SGLang ignores it without --enable-priority-scheduling."""
    ids = recall_prompt(700, 0.5, seed=16).ids
    expected = client.generate(ids, max_new_tokens=6, sampling=pinned(degree=2)).ids
    for priority in (-1, 5):
        assert client.generate(ids, max_new_tokens=6, sampling=pinned(degree=2), priority=priority).ids == expected


@pytest.mark.usefixtures("others")
def test_every_instance_freezes_its_garbage_collector(server: Server, client: Client) -> None:
    """One that did not would stop all others in each of its full collections. Its log says so at a level that SGLang changes meanwhile."""
    begin, frozen = len(server.log()), set()
    client.request("POST", "/configure_logging", {"log_level": "debug"})
    try:
        assert client.request("POST", "/freeze_gc")[0] == 200
        deadline = time.monotonic() + 30
        while len(frozen) < INSTANCES and time.monotonic() < deadline:
            frozen = set(re.findall(r"DP(\d+) [^]]*\] Freezing GC in Scheduler process", server.log()[begin:]))
            time.sleep(0.1)
    finally:
        client.request("POST", "/configure_logging", {"log_level": "info"})
    assert frozen == {str(rank) for rank in range(INSTANCES)}


def runs_now(client: Client) -> list[dict[str, Any]]:
    return [{name: entry[name] for name in ("rid", "state", "shards")} for entry in client.json("GET", "/dyncp/requests")["requests"]]


def test_a_pause_in_place_keeps_sharded_requests(client: Client) -> None:
    """Paused with a request spread over both instances and one beside it; a third comes while paused. All answers are those without."""
    sampling = {"ignore_eos": True} | pinned(degree=2, home=0)
    ids, beside = recall_prompt(700, 0.5, seed=17).ids, random_ids(100, seed=18)
    expected = client.generate(ids, max_new_tokens=200, sampling=sampling).ids
    expected_beside = client.generate(beside, max_new_tokens=6).ids
    with client.stream(ids, max_new_tokens=200, sampling=sampling, rid="paused") as stream, ThreadPoolExecutor(1) as executor:
        events = stream.events()
        next(events)
        try:
            client.json("POST", "/pause_generation", {"mode": "in_place"})
            waiting = executor.submit(client.generate, beside, max_new_tokens=6)
            first, second = ([entry for entry in runs_now(client) if entry["rid"] == "paused"] for _ in range(2))
            assert first == second, "control requests are answered, and nothing is computed"
        finally:
            client.json("POST", "/continue_generation", {})
        assert tuple(list(events)[-1]["output_ids"]) == expected
        assert waiting.result().ids == expected_beside


def test_a_pause_that_aborts_leaves_a_server(client: Client) -> None:
    ids = random_ids(700, seed=19)
    expected = client.generate(ids, max_new_tokens=6, sampling=pinned(degree=2)).ids
    with client.stream(ids, max_new_tokens=1000, sampling={"ignore_eos": True} | pinned(degree=2, home=1)) as stream:
        events = stream.events()
        next(events)
        try:
            client.json("POST", "/pause_generation", {"mode": "abort"})
            assert list(events)[-1]["meta_info"]["finish_reason"]["type"] == "abort"
        finally:
            client.json("POST", "/continue_generation", {})
    assert client.generate(ids, max_new_tokens=6, sampling=pinned(degree=2)).ids == expected


def test_a_bound_on_the_degree_fits_every_prompt(client: Client) -> None:
    pin = {"custom_params": {"dyncp": {"degree": 2, "at_most": True}}}
    placed = [client.generate(random_ids(length, seed=length), max_new_tokens=2, sampling=pin).meta["dyncp"] for length in (10, 400)]
    assert [where["degree_start"] for where in placed] == [1, 2]


FEW = list(range(5, 25))
OUT_OF_RANGE: list[tuple[dict[str, Any], str]] = [
    (
        {"input_ids": [5, VOCABULARY_SIZE]},
        f"input_ids[1] must be an integer in 0..{VOCABULARY_SIZE - 1} (vocabulary)",
    ),
    ({"input_ids": [FEW, [-1]]}, "input_ids[0] must be an integer"),
    ({"sampling_params": {"stop_token_ids": [VOCABULARY_SIZE]}}, "stop_token_ids[0] must be an integer"),
    ({"sampling_params": {"logit_bias": {"5": 1e31}}}, "logit_bias[5] must be a number in -1e+30..1e+30, got 1e+31"),
    ({"sampling_params": {"top_k": 0}}, "top_k must be an integer in 1..1073741824 or -1, got 0"),
    ({"sampling_params": {"n": 0}}, "n must be an integer in 1..4096, got 0"),
    ({"sampling_params": {"stop_regex": "("}}, "stop_regex must be a regular expression"),
    ({"top_logprobs_num": VOCABULARY_SIZE + 1, "return_logprob": True}, f"top_logprobs_num must be an integer in 0..{VOCABULARY_SIZE}"),
    ({"logprob_start_len": len(FEW) + 1, "return_logprob": True}, "logprob_start_len must be an integer in -1..20 (prompt), got 21"),
    ({"top_logprobs_num": [1], "return_logprob": True}, "top_logprobs_num must be one value for a single prompt"),
    ({"input_ids": [FEW, FEW], "sampling_params": [{}]}, "sampling_params has 1 entries for 2 prompts"),
    ({"custom_labels": {"tier": "gold"}}, "custom_labels must be labels of the metrics (none; "),
    ({"input_ids": [FEW, []]}, "the prompt is empty: give at least one token"),
]


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize(("fields", "message"), OUT_OF_RANGE, ids=[message[:30] for _, message in OUT_OF_RANGE])
def test_values_out_of_range(client: Client, fields: dict[str, Any], message: str) -> None:
    """Our own guard answers, before a scheduler sees any of it."""
    for stream in (False, True):
        status, text = client.request("POST", "/generate", {"input_ids": FEW, "stream": stream} | fields)
        assert (status, message in text) == (400, True), text


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": [5, VOCABULARY_SIZE]}, "input_ids[1] must be"),
        ({"logit_bias": {str(VOCABULARY_SIZE): 1}}, "(vocabulary)"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0] must be"),
        ({"n": 5000}, "n must be an integer in 1..4096, got 5000"),
    ],
)
def test_values_out_of_range_on_the_openai_endpoints(client: Client, fields: dict[str, Any], message: str) -> None:
    chat = {"messages": [{"role": "user", "content": "hello"}]} | {name: value for name, value in fields.items() if name != "prompt"}
    for stream in (False, True):
        status, text = client.request("POST", "/v1/completions", {"model": "default", "prompt": "hello", "stream": stream} | fields)
        assert (status, message in text) == (400, True), text
        if "prompt" not in fields:
            status, text = client.request("POST", "/v1/chat/completions", {"model": "default", "stream": stream} | chat)
            assert (status, message in text) == (400, True), text


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("action", ["start", "stop", "dump"])
def test_experts_are_recorded_by_a_recorder_alone(client: Client, action: str) -> None:
    status, text = client.request("GET", f"/{action}_expert_distribution_record")
    assert (status, "--expert-distribution-recorder-mode" in text) == (400, True), text


def runs_of(client: Client, prompt_tokens: int) -> int:
    """Requests of this length that reached a scheduler."""
    return sum(entry["prompt_tokens"] == prompt_tokens for entry in client.json("GET", "/dyncp/requests")["requests"])


@pytest.mark.parametrize(("pin", "runs"), [({}, None), ({"degree": 1}, 3), ({"degree": 2}, 2)], ids=str)
def test_two_samples_of_a_prompt(client: Client, pin: dict[str, Any], runs: int | None) -> None:
    """SGLang runs a prompt once more, to fill the prefix cache; a sharded one never enters it, and has no run beside its samples."""
    ids = recall_prompt(700, 0.5, seed=7).ids
    alone = client.generate(ids, max_new_tokens=6)
    before = runs_of(client, len(ids))
    body = {"input_ids": ids, "sampling_params": {"n": 2, "temperature": 0, "max_new_tokens": 6} | pinned(**pin)}
    answers = client.json("POST", "/generate", body)
    assert [tuple(answer["output_ids"]) for answer in answers] == [alone.ids] * 2
    for answer in answers:
        assert not pin or answer["meta_info"]["dyncp"]["degree_end"] == pin["degree"]
    assert runs is None or runs_of(client, len(ids)) == before + runs


def test_batch_of_prompts(client: Client) -> None:
    prompts = [recall_prompt(length, 0.5, seed=8).ids for length in (100, 300)]
    body = {"input_ids": prompts, "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
    answers = client.json("POST", "/generate", body)
    assert [tuple(answer["output_ids"]) for answer in answers] == [client.generate(ids, max_new_tokens=4).ids for ids in prompts]
    bad = body | {"sampling_params": [{"max_new_tokens": 4}, {"max_new_tokens": 4} | pinned(degree=7)]}
    assert "dyncp.degree" in refused(lambda: client.json("POST", "/generate", bad))


def tokens_of(answer: Answer) -> dict[int, int]:
    return {shard["rank"]: shard["tokens"] for shard in answer.meta["dyncp"]["shards"]}


@pytest.mark.parametrize("home", [0, 1])
@pytest.mark.parametrize("degree", [1, 2])
def test_meta_info_of_a_pinned_request(client: Client, home: int, degree: int) -> None:
    answer = client.generate(random_ids(640, seed=9), max_new_tokens=5, sampling={"ignore_eos": True} | pinned(degree=degree, home=home))
    dyncp = answer.meta["dyncp"]
    assert (dyncp["home"], dyncp["degree_start"], dyncp["degree_end"]) == (home, degree, degree)
    assert len(tokens_of(answer)) == degree
    assert sum(tokens_of(answer).values()) == 640 + 4, "the last token is never stored"


def test_meta_info_of_a_request_that_grows(client: Client) -> None:
    answer = client.generate(random_ids(900, seed=10), max_new_tokens=300, sampling={"ignore_eos": True} | pinned(degree=1, home=0))
    dyncp = answer.meta["dyncp"]
    assert (dyncp["degree_start"], dyncp["degree_end"]) == (1, 2)
    assert dyncp["shards"][-1]["rank"] == 1
    assert sum(tokens_of(answer).values()) == 900 + 299


def test_meta_info_of_streams_and_chats(client: Client) -> None:
    with client.stream(random_ids(100, seed=11), max_new_tokens=3, sampling={"ignore_eos": True}) as stream:
        events = list(stream.events())
    assert events[-1]["meta_info"]["dyncp"]["degree_end"] == 1
    assert all("dyncp" not in event["meta_info"] for event in events[:-1])
    choice = client.chat("hello", return_meta_info=True)["choices"][0]
    assert choice["meta_info"]["dyncp"]["degree_start"] == 1
    assert "meta_info" not in client.chat("hello")["choices"][0]


def test_chats_need_no_template_of_the_client(client: Client) -> None:
    """The model's tokenizer has one; a byte is a token."""
    prompt = "user: hello\nassistant: "
    reply = client.chat("hello", max_tokens=4, ignore_eos=True)
    assert reply["usage"]["prompt_tokens"] == len(prompt)
    assert reply["choices"][0]["message"]["content"] == client.complete(prompt, max_tokens=4, ignore_eos=True)["choices"][0]["text"]


def run_command(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sglang_dcp.cli.commands", *arguments, "--port", str(server.port)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def read_requests(server: Server, *arguments: str) -> list[dict[str, Any]]:
    result = run_command(server, "requests", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    return list(json.loads(result.stdout))


def test_report_of_an_openai_stream(server: Server) -> None:
    with server.client.complete_stream("c" * 500, max_tokens=4, ignore_eos=True, **pinned(degree=2, home=1)) as stream:
        request_id = next(iter(stream.events()))["id"]
        list(stream.events())
    (entry,) = read_requests(server, request_id)
    assert (entry["state"], entry["home"], entry["degree_start"], entry["degree_end"]) == ("finished", 1, 2, 2)
    assert sum(shard["tokens"] for shard in entry["shards"]) == entry["prompt_tokens"] + 3
    shown = run_command(server, "requests", request_id).stdout
    assert request_id in shown
    assert "finished" in shown


def test_report_of_running_and_aborted_requests(server: Server) -> None:
    client = server.client
    body = {"ignore_eos": True} | pinned(degree=2, home=0)
    with client.stream(random_ids(600, seed=12), max_new_tokens=1200, sampling=body, rid="runs") as stream:
        next(iter(stream.events()))
        (entry,) = read_requests(server, "runs")
        assert (entry["state"], entry["degree_end"]) in {("running", 2), ("sits out", 2)}
        top = run_command(server, "top", "--once").stdout
        assert "runs" in top
        assert "home requests" in top
        client.abort("runs")
        list(stream.events())
    (entry,) = read_requests(server, "runs")
    assert (entry["state"], entry["finish_reason"]) == ("aborted", "abort")


def test_report_without_health_probes_and_with_ids_cut(server: Server) -> None:
    assert server.client.is_healthy()
    server.client.generate([5], max_new_tokens=1, rid="z" * 3000)
    kept = [entry["rid"] for entry in server.client.json("GET", "/dyncp/requests")["requests"]]
    assert "z" * 128 in kept
    assert not any(rid.startswith("HEALTH_CHECK") for rid in kept)


def test_unknown_request(server: Server) -> None:
    result = run_command(server, "requests", "nobody")
    assert result.returncode == 1
    assert "'nobody' is not among the last 1000" in result.stderr


def dyncp_samples(client: Client, name: str) -> dict[int, float]:
    """Value per instance."""
    samples = [sample for sample in parse_metrics(client.metrics()) if sample.name == f"sglang:dyncp_{name}"]
    return {int(sample.labels["dp_rank"]): sample.value for sample in samples}


def test_metrics_have_the_labels_of_sglang(client: Client) -> None:
    samples = [sample for sample in parse_metrics(client.metrics()) if sample.name.startswith("sglang:")]
    own = {name: set(sample.labels) for sample in samples for name in [sample.name] if name.startswith("sglang:dyncp_")}
    stock = next(set(sample.labels) for sample in samples if sample.name == "sglang:num_running_reqs")
    names = [*GAUGES, "request_degree_count", "degree_growths_total", "reservation_wait_seconds_count", "retractions_total"]
    for name in [*names, "sat_out_steps_total", "exchange_seconds_count"]:
        assert own[f"sglang:dyncp_{name}"] == stock, name
        assert set(dyncp_samples(client, name)) == {0, 1}, name


def test_metrics_count_what_happened(client: Client) -> None:
    before = {name: dyncp_samples(client, name) for name in ("request_degree_count", "request_degree_sum", "degree_growths_total")}
    waits, exchanges = dyncp_samples(client, "reservation_wait_seconds_count"), dyncp_samples(client, "exchange_seconds_count")
    client.generate(random_ids(640, seed=13), max_new_tokens=5, sampling={"ignore_eos": True} | pinned(degree=2, home=1))
    client.generate(random_ids(900, seed=14), max_new_tokens=200, sampling={"ignore_eos": True} | pinned(degree=1, home=0))
    client.generate([5], max_new_tokens=1)
    after = {name: dyncp_samples(client, name) for name in before}
    grown = {name: sum(after[name].values()) - sum(before[name].values()) for name in before}
    assert grown["degree_growths_total"] == 1
    assert after["degree_growths_total"][0] == before["degree_growths_total"][0] + 1
    assert (grown["request_degree_count"], grown["request_degree_sum"]) == (3, 5)
    assert dyncp_samples(client, "reservation_wait_seconds_count")[1] == waits[1] + 1
    assert all(count > exchanges[rank] for rank, count in dyncp_samples(client, "exchange_seconds_count").items())


def test_gauges_show_guests(client: Client) -> None:
    body = {"ignore_eos": True} | pinned(degree=2, home=0)
    with client.stream(random_ids(960, seed=15), max_new_tokens=900, sampling=body, rid="guest") as stream:
        events = iter(stream.events())
        for _ in range(30):
            next(events)
        values = {name: dyncp_samples(client, name) for name in GAUGES}
        client.abort("guest")
        list(events)
    assert values["home_requests"] == {0: 1.0, 1: 0.0}
    assert values["guest_tokens"][0] == 0
    assert values["guest_tokens"][1] >= PAGE
    assert values["kv_tokens"][1] >= values["guest_tokens"][1]
    assert values["attention_rows"] == {0: 1.0, 1: 1.0}


# ---- a rank that the client names


@pytest.mark.parametrize("field", ["routed_dp_rank", "data_parallel_rank"])
def test_a_named_rank_is_home_to_a_prompt_beyond_its_pool(client: Client, field: str, others: None) -> None:
    prompt = recall_prompt(1500, 0.3, seed=77)
    for rank in range(INSTANCES):
        answer = client.generate(prompt.ids, max_new_tokens=12, **{field: rank})
        assert answer.meta["dyncp"]["home"] == rank and len(answer.meta["dyncp"]["shards"]) == INSTANCES


def test_a_batch_with_a_named_rank_is_answered_there(client: Client, others: None) -> None:
    ids = [random_ids(length, seed=length) for length in (1400, 40, 1300)]
    body = {"input_ids": ids, "routed_dp_rank": 1, "sampling_params": {"max_new_tokens": 4, "temperature": 0}}
    assert [answer["meta_info"]["dyncp"]["home"] for answer in client.json("POST", "/generate", body)] == [1, 1, 1]


def test_a_rank_outside_the_cluster_is_named(client: Client, others: None) -> None:
    message = refused(lambda: client.generate(random_ids(40, seed=1), routed_dp_rank=INSTANCES))
    assert f"routed_dp_rank={INSTANCES} out of range [0, {INSTANCES})" in message
