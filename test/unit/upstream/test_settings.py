"""Settings that dynamic context parallelism refuses or completes, each by its flag's name."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

from sglang_dcp.cli.serve import plan_launch
from sglang_dcp.upstream.attach.settings import (
    REFUSALS,
    SettingError,
    complete_page_size,
    complete_parallelism,
    find_front_refusal,
    find_refusal,
)
from support.recall import model_path

WORKING: dict[str, Any] = {
    "device": "cpu",
    "pp_size": 1,
    "disaggregation_mode": "null",
    "tokenizer_worker_num": 1,
    "dwdp_size": 1,
    "page_size": 16,
    "kv_cache_dtype": "auto",
    "dcp_size": 1,
    "attn_cp_size": 1,
    "dp_size": 1,
}
BREAKING: dict[str, Any] = {
    "device": "xpu",
    "pp_size": 2,
    "disaggregation_mode": "prefill",
    "tokenizer_worker_num": 2,
    "dwdp_size": 2,
    "page_size": 1,
    "kv_cache_dtype": "fp8_e4m3",
    "dcp_size": 2,
    "attn_cp_size": 2,
    "dp_size": 2,
    "speculative_algorithm": "EAGLE",
    "lora_paths": ["a=b"],
    "dllm_algorithm": "LowConfidence",
    "elastic_ep_backend": "mooncake",
}


def test_a_plain_server_is_served() -> None:
    assert find_refusal(WORKING.get) is None


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.field)
def test_every_refusal_names_flag_value_and_reason(refusal: Any) -> None:
    value = BREAKING.get(refusal.field, True)
    message = find_refusal((WORKING | {refusal.field: value}).get)
    assert message is not None
    assert message.startswith(f"{refusal.flag} {value} does not work with --enable-dyncp: ")
    assert refusal.reason in message


def test_a_front_that_checks_no_requests_is_refused() -> None:
    """Both others of SGLang's servers go past the tokenizer manager, where requests are checked."""
    assert find_front_refusal(False) is None
    assert "SGLANG_RUST_SERVER=1 does not work with --enable-dyncp: its requests reach the schedulers" in str(find_front_refusal(True))
    assert "--smg-grpc-mode True does not work" in str(find_refusal((WORKING | {"smg_grpc_mode": True}).get))


TURN_IT_ON = [({"dwdp_size": 2}, "--dwdp-size 2"), ({"elastic_ep_backend": "nixl"}, "--elastic-ep-backend nixl")]


@pytest.mark.parametrize(("given", "flag"), TURN_IT_ON)
def test_what_turns_the_local_control_broadcast_on_is_named_instead_of_it(given: dict[str, Any], flag: str) -> None:
    values = WORKING | {"enable_dp_attention_local_control_broadcast": True}
    assert str(find_refusal((values | given).get)).startswith(f"{flag} does not work")
    assert "would leave them waiting in the step's exchange" in str(find_refusal(values.get))


def test_tp_implies_the_other_widths() -> None:
    for given in ((4, 1, 1), (4, 4, 1), (4, 1, 4), (4, 4, 4)):
        assert complete_parallelism(*given) == {"attn_dp_size": 4, "ep_size": 4}


@pytest.mark.parametrize(("sizes", "flag"), [((1, 1, 1), "--tp 1"), ((4, 2, 4), "--attn-dp-size 2"), ((4, 4, 2), "--ep-size 2")])
def test_other_widths_are_refused(sizes: tuple[int, int, int], flag: str) -> None:
    with pytest.raises(SettingError, match=flag):
        complete_parallelism(*sizes)


@pytest.mark.parametrize(
    ("device", "given", "completed"),
    [("cpu", None, {"page_size": 16}), ("cuda", None, {"page_size": 64}), ("cuda", 64, {}), ("cpu", 1, {}), ("xpu", None, {})],
)
def test_page_size_is_completed_only_where_nobody_named_one(device: str, given: int | None, completed: dict[str, int]) -> None:
    """An explicit 1 is left alone, and refused by name."""
    assert complete_page_size({"device": device, "page_size": given}.get) == completed


RESOLVE = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.server_args import prepare_server_args
args = prepare_server_args(sys.argv[1:])
args.resolve_once()
print("RESOLVED", resolving_view(args).page_size)
"""


def test_serve_line_of_the_readme_resolves_to_whole_pages() -> None:
    """SGLang's whole resolution with our hooks, in a process of its own: without the completion it ends at page size 1."""
    flags = ["--model-path", model_path("qwen3moe"), "--tp", "2", "--enable-dyncp"]
    launch = plan_launch(flags, os.environ, cuda_devices=None)
    command = [sys.executable, "-c", RESOLVE, *launch.flags]
    result = subprocess.run(command, env={**os.environ, **launch.additions}, capture_output=True, text=True, check=False, timeout=300)
    assert "RESOLVED 16" in result.stdout, result.stderr[-2000:]
