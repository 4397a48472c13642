"""Settings that dynamic context parallelism refuses or completes, each by its flag's name."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dcp.cli.serve import plan_launch, split_restart
from sglang_dcp.config import DynCpConfig
from sglang_dcp.upstream.attach.disaggregation_settings import complete_decode, find_decode_refusal, find_window_refusal
from sglang_dcp.upstream.attach.page_sizes import complete_chunk_size, complete_page_size, find_chunk_refusal
from sglang_dcp.upstream.attach.refusals import REFUSALS, find_refusal
from sglang_dcp.upstream.attach.settings import find_cache_refusal, find_cpu_backend_refusal, find_front_refusal
from sglang_dcp.upstream.attach.widths import GIVEN, SettingError, complete_widths, find_slices_refusal, note_given_widths
from testing.documentation import manifest_line, serve_lines
from testing.recall import model_path

WORKING: dict[str, Any] = {
    "device": "cpu",
    "pp_size": 1,
    "disaggregation_mode": "null",
    "dwdp_size": 1,
    "page_size": 16,
    "kv_cache_dtype": "auto",
    "dcp_size": 1,
    "moe_dp_size": 1,
    "attn_cp_size": 1,
}
BREAKING: dict[str, Any] = {
    "device": "xpu",
    "pp_size": 2,
    "disaggregation_mode": "prefill",
    "dwdp_size": 2,
    "page_size": 1,
    "kv_cache_dtype": "fp8_e5m2",
    "dcp_size": 2,
    "moe_dp_size": 2,
    "attn_cp_size": 2,
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


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.field)
def test_what_sglang_has_yet_to_decide_is_not_judged_at_the_beginning(refusal: Any) -> None:
    undecided = WORKING | {"device": None, "page_size": None}
    assert find_refusal(undecided.get, resolved=False) is None
    given = undecided | {refusal.field: BREAKING.get(refusal.field, True)}
    assert str(find_refusal(given.get, resolved=False)).startswith(refusal.flag)


DECODE: dict[str, Any] = {"disaggregation_mode": "decode", "disaggregation_transfer_backend": "fake"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("disaggregation_transfer_backend", "mori"),
        ("disaggregation_decode_enable_radix_cache", True),
        ("disaggregation_decode_enable_offload_kvcache", True),
        ("disaggregation_decode_retraction_backup", "host_pool"),
        ("disaggregation_decode_host_receive_threshold", 0.5),
        ("disaggregation_decode_allocation_policy", "prefill_complete"),
        ("disaggregation_enable_kv_checksum", True),
        ("enable_pd_role_switch", True),
    ],
)
def test_a_decode_server_refuses_by_name_what_it_cannot_do(field: str, value: Any) -> None:
    message = find_decode_refusal((DECODE | {field: value}).get)
    assert str(message).startswith(f"--{field.replace('_', '-')} {value} does not work with --enable-dyncp")
    other = {field: value, "disaggregation_mode": "null"}
    assert find_decode_refusal(other.get) is None, "nothing of it matters on another server"


def test_a_decode_server_is_served_and_copies_no_retracted_request() -> None:
    assert find_refusal((WORKING | DECODE).get) is None and find_decode_refusal(DECODE.get) is None
    assert complete_decode(DECODE.get) == {"disaggregation_decode_retraction_backup": "cpu_tensor"}
    assert complete_decode((DECODE | {"disaggregation_decode_retraction_backup": "host_pool"}).get) == {}
    assert complete_decode(WORKING.get) == {}
    assert "SGLANG_DISAGG_STAGING_BUFFER=1" in str(find_decode_refusal(DECODE.get, staging=True))


def test_window_models_behind_prefill_servers_are_refused_by_name() -> None:
    assert find_window_refusal("null", "GptOssForCausalLM") is None
    message = str(find_window_refusal("decode", "GptOssForCausalLM"))
    assert message.startswith("--disaggregation-mode decode does not work with --enable-dyncp for GptOssForCausalLM")


@pytest.mark.parametrize("field", ["attention_backend", "prefill_attention_backend", "decode_attention_backend"])
@pytest.mark.parametrize("backend", ["intel_amx", "flex_attention", "triton", "fa3"])
def test_a_cpu_runs_sharded_steps_with_one_backend(field: str, backend: str) -> None:
    """Ours stands before that one alone there: another would look for remote pages in its own pool."""
    plain = WORKING | {"attention_backend": "torch_native"}
    assert find_cpu_backend_refusal(plain.get) is None and find_cpu_backend_refusal((plain | {field: "torch_native"}).get) is None
    refused = f"--{field.replace('_', '-')} {backend} does not work with --enable-dyncp on --device cpu"
    assert str(find_cpu_backend_refusal((plain | {field: backend}).get)).startswith(refused)
    assert find_cpu_backend_refusal((plain | {field: backend, "device": "cuda"}).get) is None, "a GPU has its own"


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
        assert complete_widths(*given, dp_size=1) == {"attn_dp_size": 4, "ep_size": 4}


def test_fewer_instances_than_ranks_have_slices() -> None:
    for given in ((4, 2, 1), (4, 2, 4)):
        assert complete_widths(*given, dp_size=1) == {"attn_dp_size": 2, "ep_size": 4}
    assert complete_widths(8, 2, 1, 1, ("attn_dp_size",)) == {"attn_dp_size": 2, "ep_size": 8}


SLICED: dict[str, Any] = {"tp_size": 4, "attn_dp_size": 2, "device": "cpu", "disaggregation_mode": "null", "nnodes": 1}
SLICED_ON_GPU = SLICED | {
    "device": "cuda",
    "attention_backend": "flashinfer",
    "kv_cache_dtype": "auto",
    "moe_a2a_backend": "none",
    "cuda_graph_config": SimpleNamespace(decode=SimpleNamespace(backend="full")),
}
BESIDE_SLICES = [
    ("disaggregation_mode", "decode", "--disaggregation-mode decode"),
    ("nnodes", 2, "--nnodes 2"),
]
BESIDE_SLICES_ON_GPU = [
    ("attention_backend", "fa3", "--attention-backend fa3"),
    ("attention_backend", "flashmla", "--attention-backend flashmla"),
    ("attention_backend", "torch_native", "--attention-backend torch_native"),
    ("decode_attention_backend", "fa3", "--decode-attention-backend fa3"),
    ("kv_cache_dtype", "fp8_e4m3", "--kv-cache-dtype fp8_e4m3"),
    ("kv_cache_dtype", "float16", "--kv-cache-dtype float16"),
    ("moe_a2a_backend", "deepep", "--moe-a2a-backend deepep"),
    ("cuda_graph_config", SimpleNamespace(decode=SimpleNamespace(backend="disabled")), "--cuda-graph-backend-decode disabled"),
]


def test_slices_are_served_where_they_were_run() -> None:
    for run in (SLICED, SLICED_ON_GPU, SLICED_ON_GPU | {"kv_cache_dtype": "bfloat16", "moe_a2a_backend": None}):
        assert find_slices_refusal(run.get, DynCpConfig()) is None
    assert find_slices_refusal(SLICED_ON_GPU.get, DynCpConfig(transport="peer", node_size=2)) is None


@pytest.mark.parametrize(("field", "value", "flag"), BESIDE_SLICES)
def test_no_device_ran_slices_on_such_a_server(field: str, value: Any, flag: str) -> None:
    for run in (SLICED, SLICED_ON_GPU):
        assert find_slices_refusal((run | {field: value}).get, DynCpConfig()) == (
            f"--attn-dp-size 2 with --tp 4 does not work with --enable-dyncp and {flag}: attention TP 2 was not run with it yet"
        )
        assert find_slices_refusal((run | {field: value, "attn_dp_size": 4}).get, DynCpConfig()) is None, "one slice is the instance"


@pytest.mark.parametrize(("field", "value", "flag"), BESIDE_SLICES_ON_GPU)
def test_a_gpu_refuses_by_name_what_slices_were_not_run_with(field: str, value: Any, flag: str) -> None:
    message = f"and {flag}: attention TP 2 was not run with it on a GPU yet"
    assert message in str(find_slices_refusal((SLICED_ON_GPU | {field: value}).get, DynCpConfig()))
    for run in (SLICED | {field: value}, SLICED_ON_GPU | {field: value, "attn_dp_size": 4}):
        assert find_slices_refusal(run.get, DynCpConfig()) is None, "a CPU, and instances of one slice, are not asked"


def test_slices_on_a_gpu_need_peer_memory_and_one_node() -> None:
    for config, flag in (
        (DynCpConfig(transport="nccl"), "--dyncp-transport nccl"),
        (DynCpConfig(transport="gloo"), "--dyncp-transport gloo"),
        (DynCpConfig(node_size=1), "--dyncp-node-size 1"),
    ):
        assert f"and {flag}: attention TP 2 was not run with it on a GPU yet" in str(find_slices_refusal(SLICED_ON_GPU.get, config))
        assert find_slices_refusal(SLICED.get, config) is None


@pytest.mark.parametrize(
    ("sizes", "given", "message"),
    [
        ((1, 1, 1, 1), (), "--tp 1 does not work"),
        (
            (4, 3, 4, 1),
            (),
            "--attn-dp-size 3 does not work with --enable-dyncp: it is the number of instances, at least 2, and divides --tp 4",
        ),
        ((4, 8, 4, 1), (), "--attn-dp-size 8 does not work"),
        ((4, 2, 2, 1), (), "--ep-size 2 does not work with --enable-dyncp: it must equal --tp 4"),
        ((4, 4, 2, 1), (), "--ep-size 2 does not work"),
        ((4, 1, 1, 1), ("ep_size",), "--ep-size 1 does not work with --enable-dyncp: it must equal --tp 4"),
        ((4, 1, 4, 1), ("attn_dp_size",), "--attn-dp-size 1 does not work"),
        ((4, 1, 1, 4), (), "--dp-size 4 does not work with --enable-dyncp: replicas do not share requests"),
    ],
)
def test_other_widths_are_refused(sizes: tuple[int, int, int, int], given: tuple[str, ...], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        complete_widths(*sizes, given)


def test_a_width_that_is_named_is_told_from_the_default() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ep-size", "--ep", dest="ep_size", type=int, default=1)
    parser.add_argument("--other", type=int, default=1)
    note_given_widths(parser)
    named, silent = parser.parse_args(["--ep", "1"]), parser.parse_args(["--other", "2"])
    assert (named.ep_size, getattr(named, GIVEN)) == (1, {"ep_size"})
    assert (silent.ep_size, hasattr(silent, GIVEN)) == (1, False)


@pytest.mark.parametrize(
    ("device", "given", "completed"),
    [("cpu", None, {"page_size": 16}), ("cuda", None, {"page_size": 64}), ("cuda", 64, {}), ("cpu", 1, {}), ("xpu", None, {})],
)
def test_page_size_is_completed_only_where_nobody_named_one(device: str, given: int | None, completed: dict[str, int]) -> None:
    """An explicit 1 is left alone, and refused by name."""
    assert complete_page_size({"device": device, "page_size": given}.get) == completed


@pytest.mark.parametrize(
    ("given", "chunk", "changes", "completed"),
    [
        (4096, 1365, {}, {"chunked_prefill_size": 1360}),
        (4096, 1024, {}, {}),
        (-1, -1, {}, {}),
        (None, None, {}, {}),
        (100, 33, {"page_size": 1}, {}),
        (100, 33, {"disaggregation_mode": "decode"}, {}),
    ],
)
def test_a_chunk_is_whole_pages(given: int | None, chunk: int | None, changes: dict[str, Any], completed: dict[str, int]) -> None:
    values = WORKING | {"chunked_prefill_size": chunk, "attn_dp_size": 3} | changes
    assert complete_chunk_size(given, values.get) == completed


@pytest.mark.parametrize(("given", "chunk"), [(47, 15), (2, 0)])
def test_a_chunk_below_a_page_is_refused(given: int, chunk: int) -> None:
    values = WORKING | {"chunked_prefill_size": chunk, "attn_dp_size": 3}
    with pytest.raises(SettingError, match=f"--chunked-prefill-size {given} .*: {chunk} tokens for each of 3 instances .*at least 48$"):
        complete_chunk_size(given, values.get)


def test_whole_prompts_in_one_step_are_refused() -> None:
    """One longer than a pool ended the server: SGLang's buffers of a step hold a pool's tokens, or a chunk's."""
    for chunk in (-1, 0, None):
        values = WORKING | {"chunked_prefill_size": chunk}
        message = find_chunk_refusal(values.get, sharded=True)
        assert str(message).startswith(f"--chunked-prefill-size {chunk} works with --dyncp-policy local only: a prompt longer than one")
        assert find_chunk_refusal(values.get, sharded=False) is None, "no prompt is longer than its pool"
        assert find_chunk_refusal((values | {"disaggregation_mode": "decode"}).get, sharded=True) is None, "it prefills nothing"
    assert find_chunk_refusal((WORKING | {"chunked_prefill_size": 4096}).get, sharded=True) is None


def test_prompts_are_not_retained_where_none_may_be_reused() -> None:
    off = WORKING | {"disable_radix_cache": True}
    assert str(find_cache_refusal(off.get, 0.8)).startswith("--dyncp-cache-fraction 0.8 does not work with --disable-radix-cache")
    assert find_cache_refusal(off.get, 0.0) is None
    assert find_cache_refusal((WORKING | {"disable_radix_cache": False}).get, 0.8) is None


RESOLVE = """
import json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.server_args import prepare_server_args
for line in json.loads(sys.argv[1]):
    try:
        args = prepare_server_args(line)
        args.resolve_once()
        args.check_server_args()
        view = resolving_view(args)
        outcome = [view.attn_dp_size, view.ep_size, view.dp_size, view.page_size]
    except SystemExit as end:
        outcome = str(end)
    except Exception as error:
        outcome = f"SGLang's own: {error!r}"
    print("RESOLVED", json.dumps(outcome))
"""

LINES: list[tuple[str, list[int] | str]] = [
    ("--tp 2", [2, 2, 1, 16]),
    ("--tp 8", [8, 8, 1, 16]),
    ("--tp 4 --page-size 32", [4, 4, 1, 32]),
    ("--tp 3", [3, 3, 1, 16]),
    ("--tp 4 --chunked-prefill-size 5000", [4, 4, 1, 16]),
    ("--tp 4 --chunked-prefill-size 50", "sglang_dcp: --chunked-prefill-size 50 does not work with --enable-dyncp: 12 tokens"),
    ("--tp 4 --chunked-prefill-size -1", "sglang_dcp: --chunked-prefill-size -1 works with --dyncp-policy local only: a prompt"),
    ("--tp 4 --chunked-prefill-size -1 --dyncp-policy local", [4, 4, 1, 16]),
    ("--tp 4 --dyncp-cache-fraction 0.5 --disable-radix-cache", "sglang_dcp: --dyncp-cache-fraction 0.5 does not work with"),
    ("--tp 4 --dyncp-cache-fraction 0.5 --disaggregation-mode decode --disaggregation-transfer-backend fake", [4, 4, 1, 16]),
    (
        "--tp 4 --dyncp-cache-fraction 0.5 --disable-radix-cache --disaggregation-mode decode --disaggregation-transfer-backend fake",
        "sglang_dcp: --dyncp-cache-fraction 0.5 does not work with",
    ),
    ("--tp 4 --attn-dp-size 4", [4, 4, 1, 16]),
    ("--tp 4 --dp-size 4 --enable-dp-attention", [4, 4, 1, 16]),
    ("--tp-size 4 --dp 4 --enable-dp-attention --ep 4", [4, 4, 1, 16]),
    ("--tensor-parallel-size 4 --expert-parallel-size 4", [4, 4, 1, 16]),
    ("--tp 4 --dp 4", "sglang_dcp: --dp-size 4 does not work"),
    ("--tp 4 --dp 2 --attn-dp-size 4", "sglang_dcp: --dp-size 2 does not work"),
    ("--tp 4 --ep-size 1", "sglang_dcp: --ep-size 1 does not work"),
    ("--tp 4 --attn-dp-size 2", [2, 4, 1, 16]),
    ("--tp 4 --dp 2 --enable-dp-attention", [2, 4, 1, 16]),
    ("--tp 4 --attn-dp-size 3", "sglang_dcp: --attn-dp-size 3 does not work"),
    ("--tp 4 --attn-dp-size 2 --dyncp-max-degree 3", "sglang_dcp: --dyncp-max-degree"),
    (
        "--tp 4 --attn-dp-size 2 --disaggregation-mode decode --disaggregation-transfer-backend fake",
        "sglang_dcp: --attn-dp-size 2 with --tp 4",
    ),
    ("--tp 1", "sglang_dcp: --tp 1 does not work"),
    ("", "sglang_dcp: --tp 1 does not work"),
    ("--tp 4 --page-size 1", "sglang_dcp: --page-size 1 does not work"),
    # SGLang's own steps would end these with errors of theirs.
    ("--tp 4 --attn-cp-size 2", "sglang_dcp: --attn-cp-size 2 does not work"),
    ("--tp 4 --moe-dp-size 2", "sglang_dcp: --moe-dp-size 2 does not work"),
    ("--tp 4 --speculative-algorithm NGRAM", "sglang_dcp: --speculative-algorithm NGRAM does not work"),
    ("--tp 4 --dllm-algorithm LowConfidence", "sglang_dcp: --dllm-algorithm LowConfidence does not work"),
    ("--tp 4 --device xpu", "sglang_dcp: --device xpu does not work"),
    ("--tp 4 --enable-single-batch-overlap", "sglang_dcp: --enable-single-batch-overlap True does not work"),
    ("--tp 4 --enable-mis --attention-backend flashinfer", "sglang_dcp: --enable-mis True does not work with --enable-dyncp: the"),
    ("--tp 4 --enable-mis --dyncp-policy local", "sglang_dcp: --enable-mis True does not work with --enable-dyncp: the"),
    ("--tp 4 --load-balance-method round_robin", [4, 4, 1, 16]),
    ("--tp 4 --load-balance-method total_tokens", [4, 4, 1, 16]),
    ("--tp 4 --attention-backend flex_attention", "sglang_dcp: --attention-backend flex_attention does not work with --enable-dyncp on"),
    ("--tp 4 --decode-attention-backend triton", "sglang_dcp: --decode-attention-backend triton does not work with --enable-dyncp on"),
    ("--tp 4 --attention-backend torch_native", [4, 4, 1, 16]),
    ("--tp 4 --tokenizer-worker-num 2", [4, 4, 1, 16]),
    ("--tp 4 --moe-dense-tp-size 1 --enable-dp-lm-head --enable-eplb --eplb-rebalance-layers-per-chunk 1", [4, 4, 1, 16]),
    ("--tp 4 --enable-eplb", "sglang_dcp: --enable-eplb True does not work with --enable-dyncp on --device cpu without"),
    ("--tp 4 --dyncp-cost-model README.md", "sglang_dcp: --dyncp-cost-model 'README.md' does not work: cost model README.md: not JSON"),
    ("--tp 4 --dyncp-cost-model docs/examples/load.json", "sglang_dcp: --dyncp-cost-model 'docs/examples/load.json' does not work: cost"),
    ("--tp 4 --dyncp-degree 3", "sglang_dcp: --dyncp-degree 3 works with --dyncp-policy fixed only"),
    ("--tp 4 --dyncp-policy local --dyncp-max-degree 2", "sglang_dcp: --dyncp-max-degree 2 has no effect with --dyncp-policy local"),
    ("--tp 4 --dyncp-policy local --dyncp-max-guest-fraction 0.5", "sglang_dcp: --dyncp-max-guest-fraction 0.5 has no effect with"),
    ("--tp 4 --dyncp-policy local --dyncp-scope cluster", "sglang_dcp: --dyncp-scope cluster has no effect with --dyncp-policy local"),
    ("--tp 4 --dyncp-policy local --dyncp-max-degree 1", [4, 4, 1, 16]),
    ("--tp 4 --dyncp-cache-min-tokens 128", "sglang_dcp: --dyncp-cache-min-tokens 128 has no effect without --dyncp-cache-fraction"),
    ("--tp 4 --dyncp-cache-min-tokens 128 --dyncp-cache-fraction 0.5", [4, 4, 1, 16]),
]
"""Flags as launch lines have them, and the widths (attention, experts, replicas) and page size that come of them, or our own refusal."""

DOCUMENTED = [*(line for line in serve_lines() if "--enable-dyncp" in line), manifest_line()]
"""As they are written, with all their instances; test/runtime/test_documented_serve.py starts them with two."""


@pytest.fixture(scope="module")
def resolution() -> tuple[list[Any], str]:
    """SGLang's whole resolution with our hooks, of all lines in one process, and what it logged."""
    lines = [["--model-path", model_path("qwen3moe"), "--enable-dyncp", "--device", "cpu", *flags.split()] for flags, _ in LINES]
    for line in DOCUMENTED:
        flags = shlex.split(line.partition(" serve ")[2].replace("MODEL", model_path("qwen3moe")))
        _, server_flags = split_restart(flags)
        lines.append(list(plan_launch(server_flags, os.environ, cuda_devices=None).flags))
    launch = plan_launch(lines[0], os.environ, cuda_devices=None)
    command = [sys.executable, "-c", RESOLVE, json.dumps(lines)]
    result = subprocess.run(command, env={**os.environ, **launch.additions}, capture_output=True, text=True, check=False, timeout=300)
    found = [json.loads(line.removeprefix("RESOLVED ")) for line in result.stdout.splitlines() if line.startswith("RESOLVED ")]
    assert len(found) == len(lines), result.stderr[-2000:]
    return found, result.stderr


@pytest.fixture(scope="module")
def resolved(resolution: tuple[list[Any], str]) -> list[Any]:
    return resolution[0]


@pytest.mark.own_process
def test_a_balancing_method_that_is_not_used_is_named(resolution: tuple[list[Any], str]) -> None:
    found = re.findall(r"dyncp: --load-balance-method (\w+) is not used: requests are placed by --dyncp-policy", resolution[1])
    assert found == ["round_robin"], "total_tokens is what the router does"


@pytest.mark.own_process
@pytest.mark.parametrize("index", range(len(LINES)), ids=[flags or "no flag" for flags, _ in LINES])
def test_a_launch_line_gets_its_widths_or_our_refusal(resolved: list[Any], index: int) -> None:
    expected = LINES[index][1]
    if isinstance(expected, str):
        assert str(resolved[index]).startswith(expected)
    else:
        assert resolved[index] == expected


@pytest.mark.own_process
@pytest.mark.parametrize("index", range(len(DOCUMENTED)), ids=DOCUMENTED)
def test_a_documented_line_resolves_as_it_is_written(resolved: list[Any], index: int) -> None:
    words = DOCUMENTED[index].split()
    instances = int(words[words.index("--tp") + 1])
    page_size = int(words[words.index("--page-size") + 1]) if "--page-size" in words else 16
    assert resolved[len(LINES) + index] == [instances, instances, 1, page_size]


def test_serve_commands_are_found_in_every_form() -> None:
    block = "sglang serve \\\n  --tp 2 # two\nX=1 python -m sglang.launch_server --tp 4 [more]\nsglang-dcp serve --help"
    page = f"```bash\n{block}\n```\nsglang serve prose"
    assert serve_lines([page]) == ["X=1 python -m sglang.launch_server --tp 4", "sglang serve --tp 2"]
    common = "--model-path MODEL --tp 8 --enable-dyncp"
    ports = "--host 0.0.0.0 --page-size 64"
    decode = f"sglang-dcp serve {common} {ports} --disaggregation-mode decode --disaggregation-transfer-backend mooncake"
    assert {f"sglang-dcp serve {common}", f"sglang-dcp serve --restart 3 {common}", decode} <= set(DOCUMENTED)
