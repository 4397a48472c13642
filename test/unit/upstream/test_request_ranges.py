"""Every field of a request against its range: what is a step outside is refused by name, value and limit; what is inside passes."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dcp.upstream.front.field_kinds import MOST_NESTED, Elsewhere, Integer, RangeError, Sizes
from sglang_dcp.upstream.front.request_limits import REFUSED_OPTIONS
from sglang_dcp.upstream.front.request_ranges import (
    MOST_SAMPLES,
    NOT_NULL,
    REQUEST,
    SAMPLING,
    check_body,
    check_labels,
    check_prompt,
    check_sampling,
)

VOCABULARY, PROMPT = 512, [5, 6, 7, 8]
SIZES = Sizes(VOCABULARY, len(PROMPT))
NAN, INFINITY = math.nan, math.inf

OUT_OF_RANGE: list[tuple[str, Any, str]] = [
    ("max_new_tokens", -1, "0..2147483647"),
    ("max_new_tokens", True, "an integer"),
    ("max_new_tokens", 8.0, "an integer"),
    ("min_new_tokens", -1, "0..2147483647"),
    ("min_new_tokens", 1.5, "an integer"),
    ("n", 0, f"1..{MOST_SAMPLES}"),
    ("n", MOST_SAMPLES + 1, f"1..{MOST_SAMPLES}"),
    ("n", "2", "an integer"),
    ("n", None, "an integer"),
    ("temperature", -0.1, "a number in 0.."),
    ("temperature", NAN, "a number"),
    ("temperature", INFINITY, "a number"),
    ("temperature", "1", "a number"),
    ("temperature", True, "a number"),
    ("temperature", 10**400, "a number"),
    ("top_p", 0, "..1"),
    ("top_p", 1.01, "..1"),
    ("top_p", NAN, "..1"),
    ("top_k", 0, "1..1073741824 or -1"),
    ("top_k", -2, "or -1"),
    ("top_k", 2**30 + 1, "1..1073741824"),
    ("top_k", 40.0, "an integer"),
    ("min_p", 1.5, "0..1"),
    ("min_p", NAN, "0..1"),
    ("frequency_penalty", 2.1, "-2..2"),
    ("presence_penalty", -2.1, "-2..2"),
    ("repetition_penalty", 0, "1e-06..2"),
    ("repetition_penalty", 2.5, "1e-06..2"),
    ("stop", 5, "a list of strings"),
    ("stop", ["a", 5], "a list of strings"),
    ("stop", {"a": 1}, "a list of strings"),
    ("stop_regex", "(", "a regular expression"),
    ("stop_token_ids", [3, VOCABULARY], r"[1] must be an integer in 0..511 (vocabulary), got 512"),
    ("stop_token_ids", [-1], "0..511"),
    ("stop_token_ids", [1.5], "0..511"),
    ("stop_token_ids", "12", "a list of token ids"),
    ("stop_token_ids", 5, "a list of token ids"),
    ("logit_bias", {str(VOCABULARY): 1.0}, "0..511 (vocabulary)"),
    ("logit_bias", {"-1": 1.0}, "0..511"),
    ("logit_bias", {"x": 1.0}, "0..511"),
    ("logit_bias", {"9" * 5000: 1.0}, "0..511"),
    ("logit_bias", {5: 1.0}, "0..511"),
    ("logit_bias", {"5": NAN}, "logit_bias[5] must be a number in -1e+30..1e+30"),
    ("logit_bias", {"5": -INFINITY}, "a number"),
    ("logit_bias", {"5": None}, "a number"),
    ("logit_bias", {"5": True}, "a number"),
    ("logit_bias", [5], "an object"),
    ("json_schema", {"type": "object"}, "a string"),
    ("regex", 5, "a string"),
    ("ebnf", [], "a string"),
    ("structural_tag", {}, "a string"),
    ("ignore_eos", 1, "true or false"),
    ("skip_special_tokens", "no", "true or false"),
    ("no_stop_trim", 0, "true or false"),
    ("spaces_between_special_tokens", "x", "true or false"),
    ("stream_interval", 0.5, "an integer"),
    ("stream_interval", -1, "0..2147483647"),
    ("sampling_seed", 2**63, "9223372036854775807"),
    ("sampling_seed", True, "an integer"),
    ("beam_width", 1.0, "an integer"),
    ("custom_params", 5, "an object"),
    ("custom_params", {1: 2}, "a string"),
    ("custom_params", {"a": {"b": [1]}}, "custom_params.a.b"),
    ("custom_params", {"a": [[1]]}, "custom_params.a[0]"),
    ("custom_params", {"a": 2**70}, "an integer of 64 bits"),
    ("custom_params", {"a": NAN}, "a finite number"),
    ("is_normalized", True, "sampling_params has no 'is_normalized'"),
    ("stop_strs", ["a"], "sampling_params has no 'stop_strs'"),
    ("temperatur", 1, "sampling_params has no 'temperatur'"),
]


@pytest.mark.parametrize(("name", "value", "limit"), OUT_OF_RANGE, ids=[f"{name}-{str(value)[:20]}" for name, value, _ in OUT_OF_RANGE])
def test_sampling_parameters_out_of_range(name: str, value: Any, limit: str) -> None:
    with pytest.raises(RangeError) as refused:
        check_sampling({name: value}, SIZES)
    message = str(refused.value)
    assert name in message
    assert limit in message
    assert len(message) < 600, "a value of any size is cut"


INSIDE: dict[str, list[Any]] = {
    "max_new_tokens": [0, 1, 4096],
    "n": [1, MOST_SAMPLES],
    "temperature": [0, 0.0, 1e-9, 1, 2.5, 100],
    "top_p": [1, 1e-9, 0.5],
    "top_k": [-1, 1, 40, 1 << 30],
    "min_p": [0, 1],
    "frequency_penalty": [-2, 2.0],
    "repetition_penalty": [0.01, 2],
    "stop": ["", "a", ["a", "b"], []],
    "stop_regex": ["a|b", ["[0-9]+"]],
    "stop_token_ids": [[], [0, VOCABULARY - 1], [None, 3], {1, 2}],
    "logit_bias": [{}, {"0": -100, str(VOCABULARY - 1): 1e9, "007": 0.5}],
    "json_schema": ["{}", ""],
    "ignore_eos": [True, False],
    "sampling_seed": [-(2**63), 2**63 - 1],
    "stream_interval": [0, 1],
    "custom_params": [{}, {"dyncp": {"degree": 2, "home": None}, "list": [1, "a", None, 2.5, True], "flag": False}],
}


@pytest.mark.parametrize("name", INSIDE)
def test_sampling_parameters_in_range(name: str) -> None:
    for value in INSIDE[name]:
        check_sampling({name: value}, SIZES)


def test_greedy_requests_may_carry_a_top_k_that_is_not_read() -> None:
    """As stock serves them: clients send temperature 0 and top_k 0 together."""
    for temperature in (0, 0.0, 1e-9):
        check_sampling({"temperature": temperature, "top_k": 0}, SIZES)
        check_sampling({"top_k": -7, "temperature": temperature}, SIZES)
        with pytest.raises(RangeError, match="top_k must be an integer"):
            check_sampling({"temperature": temperature, "top_k": "0"}, SIZES)
    for temperature in (1e-6, 1, None):
        with pytest.raises(RangeError, match="top_k must be"):
            check_sampling({"temperature": temperature, "top_k": 0}, SIZES)
    with pytest.raises(RangeError, match="temperature"):
        check_sampling({"temperature": False, "top_k": 0}, SIZES)


def test_a_parameter_that_is_null_is_not_given() -> None:
    check_sampling(dict.fromkeys(set(SAMPLING) - set(NOT_NULL)), SIZES)


def test_parameters_of_a_processor_are_any_json_where_messages_are_pickled() -> None:
    """SGLang's default: its type of custom_params binds typed messages alone."""
    pickled = Sizes(VOCABULARY, typed=False)
    for value in ({"a": {"b": [{"c": [1, None]}]}}, {"a": 2**70}, {"dyncp": {"degree": 2}}):
        check_sampling({"custom_params": value}, pickled)
    deep: Any = 1
    for _ in range(MOST_NESTED):
        deep = {"a": deep}
    check_sampling({"custom_params": deep}, pickled)
    with pytest.raises(RangeError, match=f"custom_params must be nested at most {MOST_NESTED} levels deep"):
        check_sampling({"custom_params": {"a": deep}}, pickled)
    with pytest.raises(RangeError, match="an object"):
        check_sampling({"custom_params": [1]}, pickled)


def request(**fields: Any) -> Any:
    return SimpleNamespace(**({"return_logprob": True, "sampling_params": {}} | fields))


PROMPT_FIELDS: list[tuple[str, Any, str]] = [
    ("token_ids_logprob", [VOCABULARY], "token_ids_logprob[0] must be an integer in 0..511 (vocabulary), got 512"),
    ("token_ids_logprob", [-1], "0..511"),
    ("token_ids_logprob", [[1]], "0..511"),
    ("token_ids_logprob", [True], "0..511"),
    ("top_logprobs_num", -1, "0..512 (vocabulary)"),
    ("top_logprobs_num", VOCABULARY + 1, "0..512 (vocabulary), got 513"),
    ("top_logprobs_num", [2], "an integer"),
    ("logprob_start_len", len(PROMPT) + 1, "-1..4 (prompt), got 5"),
    ("logprob_start_len", -2, "-1..4 (prompt)"),
    ("logprob_start_len", 0.0, "an integer"),
    ("return_logprob", [True], "true or false"),
    ("token_indices_to_pool", [0, len(PROMPT)], "token_indices_to_pool[1] must be an integer in 0..3 (prompt)"),
    ("max_thinking_tokens", -1, "0..2147483647"),
    ("bootstrap_room", 2**63, "9223372036854775807"),
    ("bootstrap_port", 65536, "0..65535"),
    ("decode_tp_size", 0, "1..2147483647"),
    ("priority", 2**63, "9223372036854775807"),
    ("extra_key", 5, "a string"),
    ("rid", ["a"], "a string"),
    ("custom_labels", {"tier": 5}, "an object of strings"),
    ("custom_labels", ["tier"], "an object of strings"),
    ("external_trace_header", {"traceparent": ["00"]}, "an object of strings"),
    ("received_time", NAN, "a number in 0..1e+12"),
    ("received_time", -1.0, "a number in 0..1e+12"),
]


@pytest.mark.parametrize(("name", "value", "limit"), PROMPT_FIELDS)
def test_fields_of_a_prompt_out_of_range(name: str, value: Any, limit: str) -> None:
    with pytest.raises(RangeError) as refused:
        check_prompt(request(**{name: value}), PROMPT, VOCABULARY)
    assert name in str(refused.value)
    assert limit in str(refused.value)


@pytest.mark.parametrize("wrong", [VOCABULARY, -1, 5.0, True, None, "5", [5]])
@pytest.mark.parametrize("place", [0, 2, 3])
def test_a_token_outside_the_vocabulary_is_named_by_its_place(wrong: Any, place: int) -> None:
    ids: list[Any] = list(PROMPT)
    ids[place] = wrong
    with pytest.raises(RangeError, match=rf"input_ids\[{place}\] must be an integer in 0\.\.511 \(vocabulary\)"):
        check_prompt(request(), ids, VOCABULARY)


def test_tokens_at_both_ends_of_the_vocabulary_pass() -> None:
    check_prompt(request(), [0, VOCABULARY - 1], VOCABULARY)
    ends = {"token_ids_logprob": [0, VOCABULARY - 1], "top_logprobs_num": VOCABULARY, "token_indices_to_pool": [0, 1]}
    for start in (-1, 0, 2):
        check_prompt(request(**ends, logprob_start_len=start), [0, VOCABULARY - 1], VOCABULARY)


@pytest.mark.parametrize("ids", [[], None])
def test_an_empty_prompt_gets_a_sentence(ids: Any) -> None:
    with pytest.raises(RangeError, match="the prompt is empty: give at least one token"):
        check_prompt(request(), ids, VOCABULARY)


def test_positions_that_nothing_reads_are_not_compared_with_the_prompt() -> None:
    """As SGLang: without return_logprob it ignores where log-probabilities would start."""
    check_prompt(request(return_logprob=False, logprob_start_len=900), PROMPT, VOCABULARY)
    with pytest.raises(RangeError, match="logprob_start_len"):
        check_prompt(request(return_logprob=False, logprob_start_len="900"), PROMPT, VOCABULARY)
    with pytest.raises(RangeError, match=r"routed_experts_start_len must be an integer in 0\.\.4 \(prompt\)"):
        check_prompt(request(return_routed_experts=True, routed_experts_start_len=5), PROMPT, VOCABULARY)


def test_labels_that_the_metrics_do_not_have() -> None:
    """SGLang's counters raise on them, outside any request: one request would end the server."""
    check_labels({"tier": "gold"}, ["tier", "team"])
    check_labels(None, [])
    with pytest.raises(RangeError, match=r"custom_labels must be labels of the metrics \(tier, team; .*\), got 'model_name'"):
        check_labels({"tier": "gold", "model_name": "x"}, ["tier", "team"])
    with pytest.raises(RangeError, match=r"\(none; --tokenizer-metrics-allowed-custom-labels\), got 'a'"):
        check_labels({"a": "b"}, [])


SHAPES: list[tuple[dict[str, Any], str]] = [
    ({"input_ids": PROMPT, "top_logprobs_num": [2]}, "top_logprobs_num must be one value for a single prompt"),
    ({"text": "a", "sampling_params": [{}]}, "sampling_params must be one value for a single prompt"),
    ({"text": "a", "rid": ["a", "b"]}, "rid must be one value"),
    ({"input_ids": PROMPT, "token_ids_logprob": [[1]]}, "token_ids_logprob must be one value"),
    ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params has 1 entries for 2 prompts"),
    ({"text": ["a", "b"], "sampling_params": []}, "sampling_params has 0 entries for 2 prompts"),
    ({"input_ids": [PROMPT, PROMPT], "logprob_start_len": [0, 0, 0]}, "logprob_start_len has 3 entries for 2 prompts"),
    ({"input_ids": [PROMPT, PROMPT], "token_ids_logprob": [[1]]}, "token_ids_logprob has 1 entries for 2 prompts"),
    ({"input_ids": [PROMPT, 5]}, r"input_ids\[1\] must be a list of token ids, got 5"),
    ({"text": ["a", 5]}, "text must be a string or a list of strings"),
    ({"text": "a", "sampling_params": 5}, "sampling_params must be an object, got 5"),
    ({"text": "a", "lora_path": [None]}, "lora_path must be one value for a single prompt"),
    ({"text": ["a", "b"], "lora_id": "xy"}, r"lora_id must be a list with an entry per prompt"),
    ({"text": ["a", "b"], "token_indices_to_pool": [[0]]}, "token_indices_to_pool has 1 entries for 2 prompts"),
    ({"text": "a", "token_indices_to_pool": [[0]], "sampling_params": {"n": 2}}, r"an entry per prompt \(n 1\)"),
    ({"text": ["a", "b"], "audio_data": []}, "audio_data has 0 entries for 2 prompts"),
    ({"text": ["a"], "input_ids": PROMPT}, "text and input_ids say different prompts"),
    ({"text": ["a", "b"], "input_ids": [PROMPT]}, "text and input_ids say different prompts"),
    ({"text": "a", "input_ids": PROMPT, "sampling_params": {"n": 2}}, "text and input_ids say different prompts"),
    ({"text": ["a", "b"], "sampling_params": [{}, {"top_k": 0}]}, "top_k must be"),
]


@pytest.mark.parametrize(("body", "message"), SHAPES)
def test_shapes_of_lists(body: dict[str, Any], message: str) -> None:
    with pytest.raises(RangeError, match=message):
        check_body(SimpleNamespace(**body), SIZES)


@pytest.mark.parametrize(
    "body",
    [
        {"text": "a"},
        {"text": "a", "sampling_params": None},
        {"text": "a", "input_ids": PROMPT},
        {"text": ["a", "b"], "input_ids": [PROMPT, PROMPT]},
        {"text": "a", "rid": ["a"], "sampling_params": [{"n": 2}]},
        {"text": ["a", "b"], "sampling_params": {"n": 2}, "top_logprobs_num": 3, "token_ids_logprob": [1, 2]},
        {"input_ids": [PROMPT, PROMPT], "sampling_params": [{}, {}], "rid": ["a", "b"], "token_ids_logprob": [[1], [2]]},
        {"input_ids": []},
    ],
)
def test_shapes_that_sglang_takes(body: dict[str, Any]) -> None:
    check_body(SimpleNamespace(**body), SIZES)


def fields_of(module: str, name: str) -> list[str]:
    """Annotated fields of a class, from its source: the module itself needs a GPU's libraries."""
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text())
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return [node.target.id for node in found.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]


def test_every_field_of_a_request_has_a_range_or_a_reason() -> None:
    """A new field of SGLang's must be thought about."""
    fields = set(fields_of("sglang.srt.managers.io_struct", "GenerateReqInput"))
    assert fields == set(REQUEST) | set(REFUSED_OPTIONS)


def test_every_sampling_parameter_has_a_range() -> None:
    set_by_sglang = {"stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized"}
    assert set(fields_of("sglang.srt.sampling.sampling_params", "SamplingParams")) - set_by_sglang == set(SAMPLING)


def test_tables_are_made_of_kinds_with_limits() -> None:
    for name, kind in {**SAMPLING, **REQUEST}.items():
        assert dataclasses.is_dataclass(kind), name
        assert list(inspect.signature(kind.check).parameters) == ["name", "value", "sizes"]
        assert not isinstance(kind, Elsewhere) or len(kind.reason) > 20
        assert not isinstance(kind, Integer) or isinstance(kind.high, str) or kind.low < kind.high
