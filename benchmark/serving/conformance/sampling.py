"""/generate: sampling parameters, by themselves and together.

A seed counts with --enable-deterministic-inference alone, which takes no attention backend of a CPU: of drawn answers the shape is
compared, and all of them where one token can be drawn.
"""

from __future__ import annotations

import json
from typing import Any

from benchmark.serving.conformance.case import Case, variants
from benchmark.serving.conformance.native import ONE, SAMPLING, SCHEMA

TAG = {"type": "structural_tag", "structures": [{"begin": "<a>", "schema": SCHEMA, "end": "</a>"}], "triggers": ["<a>"]}
PARAMETERS: dict[str, list[Any]] = {
    "top_k": [5, 1, 0, -1],
    "top_p": [0.5, 1, 0, 1.5, -1, "a"],
    "min_p": [0.1, 0, 2, -0.1],
    "temperature": [-1, "a"],
    "frequency_penalty": [1, 2, -2, 3, -3],
    "presence_penalty": [1, -2, 3],
    "repetition_penalty": [1.1, 0.5, 2, 0, 3, -1],
    "max_new_tokens": [0, 1, 30, -1],
    "min_new_tokens": [0, 2, 6, 7, -1],
    "stop": [" ", ["a", "e"], [], "", None, ["x"] * 33],
    "stop_token_ids": [[5, 13], [], None, [None, 257]],
    "stop_regex": ["[a-z]", ["[0-9]", "z"], ["a"] * 33, "a" * 300],
    "logit_bias": [{"70": 1000}, {"70": -100, "71": 5}, {}, {"-1": 1}, {"99999": 1}, {"a": 1}],
    "regex": ["[0-9]{3}", "(", ""],
    "json_schema": [json.dumps(SCHEMA), "x", ""],
    "ebnf": ['root ::= "ab" "c"', "x", ""],
    "structural_tag": [json.dumps(TAG), "x", ""],
    "skip_special_tokens": [False],
    "spaces_between_special_tokens": [False],
    "no_stop_trim": [True],
    "ignore_eos": [False, None],
    "stream_interval": [1, 4, None],
    "sampling_seed": [7, -1, 2**64, "a"],
    "custom_params": [{"a": 1}, {"a": [1, "b"]}, {"a": {"b": {"c": [1]}}}, {}, None],
    "beam_width": [1, None, 0],
    "n": [1],
    "watermark": [None, {}, "x"],
    "foo": [1],
}
TOGETHER: dict[str, dict[str, Any]] = {
    "no limit": {"max_new_tokens": None, "ignore_eos": False, "stop": [" ", "e", "a"]},
    "regex and schema": {"regex": "a", "json_schema": "{}"},
    "stop, untrimmed": {"stop": [" ", "e"], "no_stop_trim": True, "max_new_tokens": 40},
    "min and eos": {"min_new_tokens": 8, "max_new_tokens": 20, "ignore_eos": False},
    "all penalties": {"frequency_penalty": 1, "presence_penalty": 0.5, "repetition_penalty": 1.2, "max_new_tokens": 30},
    "stop regex, long": {"stop_regex": "[aeiou]", "max_new_tokens": 40},
    "schema, long": {"json_schema": json.dumps(SCHEMA), "max_new_tokens": 48, "ignore_eos": False},
    "drawn from one": {"temperature": 0.8, "top_k": 1},
    "drawn from one by a regex": {"temperature": 0.8, "regex": "a{40}"},
    "regex, n": {"regex": "[0-9]{4}", "n": 2},
    "bias, penalties": {"logit_bias": {"70": 1000}, "frequency_penalty": 2, "max_new_tokens": 12},
}
DRAWN: dict[str, dict[str, Any]] = {
    "plain": {},
    "hot": {"temperature": 100},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.2},
    "seed": {"sampling_seed": 5},
    "n": {"n": 3},
    "all": {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "frequency_penalty": 0.5, "sampling_seed": 3},
    "top_k 0": {"top_k": 0},
    "top_k -2": {"top_k": -2},
    "regex": {"regex": "[0-9]{6}"},
}
OUTSIDE: dict[str, list[Any]] = {"n": [0, -1], "stream_interval": [-1], "custom_params": [[1], "x"]}
RANGE = "a range of front/request_ranges.py"


def sampling_cases() -> list[Case]:
    together: dict[str, dict[str, Any]] = {name: {"sampling_params": SAMPLING | change} for name, change in TOGETHER.items()}
    streams: dict[str, dict[str, Any]] = {f"{name}, stream": body | {"stream": True} for name, body in together.items()}
    drawn = {name: {"sampling_params": SAMPLING | {"temperature": 0.8} | change} for name, change in DRAWN.items()}
    scored = ONE | {"return_logprob": True}
    return [
        *variants("sampling", "/generate", ONE, _one_by_one(PARAMETERS)),
        *variants("together", "/generate", ONE, together | streams),
        *variants("drawn", "/generate", ONE, drawn, sampled=True),
        *variants("range", "/generate", ONE, _one_by_one(OUTSIDE), documented=RANGE),
        *variants("range", "/generate", scored, {"top_logprobs_num -1": {"top_logprobs_num": -1}}, documented=RANGE),
    ]


def _one_by_one(changes: dict[str, list[Any]]) -> dict[str, dict[str, Any]]:
    return {
        f"{key} {json.dumps(value)[:60]}": {"sampling_params": SAMPLING | {key: value}}
        for key, values in changes.items()
        for value in values
    }
