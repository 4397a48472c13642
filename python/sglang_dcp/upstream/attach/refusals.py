"""SGLang's settings that cannot work together with --enable-dyncp, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_dcp.upstream.attach.cuda_settings import QUANTISED_KV


@dataclass(frozen=True)
class Refusal:
    """A setting that cannot work together with --enable-dyncp. `works` judges the resolved value of `field`."""

    field: str
    flag: str
    works: Callable[[Any], bool]
    reason: str


def _off(value: Any) -> bool:
    return not value


ANOTHER_CACHE = "the ledger was run beside SGLang's own prefix tree alone"
ANOTHER_POOL = "what is exchanged is read from pools of one layer each"
PAST_THE_CHECKS = "its requests reach the schedulers without the checks of the main process"

REFUSALS: tuple[Refusal, ...] = (
    Refusal("device", "--device", lambda v: v in ("cpu", "cuda"), "there is no data path for this device"),
    Refusal("pp_size", "--pp-size", lambda v: v == 1, "a request's shards are found by data-parallel rank alone"),
    Refusal("speculative_algorithm", "--speculative-algorithm", _off, "step plans assume one new token per request and step"),
    Refusal("disaggregation_mode", "--disaggregation-mode", lambda v: v in (None, "null", "decode"), "prefill servers run without it"),
    Refusal("enable_hierarchical_cache", "--enable-hierarchical-cache", _off, "host copies of remote pages do not exist"),
    Refusal("enable_lora", "--enable-lora", _off, "not tested with sharded requests"),
    Refusal("lora_paths", "--lora-paths", _off, "not tested with sharded requests"),
    Refusal("enable_two_batch_overlap", "--enable-two-batch-overlap", _off, "it splits a step's rows in two"),
    Refusal(
        "enable_single_batch_overlap",
        "--enable-single-batch-overlap",
        _off,
        "SGLang runs it on no Hopper GPU, and sharded steps were run on no other",
    ),
    Refusal("enable_mixed_chunk", "--enable-mixed-chunk", _off, "a batch is either a prefill or a decode"),
    Refusal("enable_pdmux", "--enable-pdmux", _off, "a batch is either a prefill or a decode"),
    Refusal("page_size", "--page-size", lambda v: v is not None and v > 1, "the ledger works in pages of at least 2 tokens"),
    Refusal(
        "kv_cache_dtype",
        "--kv-cache-dtype",
        lambda v: v in ("auto", "bf16", "bfloat16", "float16", "float32", QUANTISED_KV),
        f"of quantised K/V {QUANTISED_KV} alone is exchanged",
    ),
    Refusal("enable_hisparse", "--enable-hisparse", _off, "it keeps KV of running requests on the host"),
    Refusal("dllm_algorithm", "--dllm-algorithm", _off, "diffusion decoding rewrites tokens"),
    Refusal("dcp_size", "--dcp-size", lambda v: v == 1, "static and dynamic context parallelism exclude each other"),
    Refusal("moe_dp_size", "--moe-dp-size", lambda v: v == 1, "experts are spread over all instances"),
    Refusal("attn_cp_size", "--attn-cp-size", lambda v: v == 1, "static and dynamic context parallelism exclude each other"),
    Refusal("elastic_ep_backend", "--elastic-ep-backend", _off, "the number of instances is fixed"),
    Refusal("is_embedding", "--is-embedding", _off, "embedding models do not decode"),
    Refusal("smg_grpc_mode", "--smg-grpc-mode", _off, PAST_THE_CHECKS),
    Refusal("enable_memory_saver", "--enable-memory-saver", _off, "released pools would take guests' pages with them"),
    Refusal("enable_streaming_session", "--enable-streaming-session", _off, "a session keeps KV rows that the ledger does not know"),
    Refusal("enable_priority_scheduling", "--enable-priority-scheduling", _off, "preemption would free pages that reservations count on"),
    Refusal("enable_lmcache", "--enable-lmcache", _off, ANOTHER_CACHE),
    Refusal("enable_flexkv", "--enable-flexkv", _off, ANOTHER_CACHE),
    Refusal("radix_cache_backend", "--radix-cache-backend", _off, ANOTHER_CACHE),
    Refusal("enable_unified_cache_external_linker", "--enable-unified-cache-external-linker", _off, ANOTHER_CACHE),
    Refusal("enable_unified_memory", "--enable-unified-memory", _off, ANOTHER_POOL),
    Refusal("enable_page_major_kv_layout", "--enable-page-major-kv-layout", _off, ANOTHER_POOL),
    Refusal("kv_canary", "--kv-canary", lambda v: v in (None, "none"), "it looks for a request's pages in its home's pool"),
    Refusal(
        "enable_return_routed_experts",
        "--enable-return-routed-experts",
        _off,
        "experts are recorded by a token's place in its home's pool, and remote ones have none there",
    ),
    Refusal("enable_mis", "--enable-mis", _off, "the attention mask of several items in one prompt is not causal"),
    Refusal("enable_nvidia_megakernel", "--enable-nvidia-megakernel", _off, "a fused step leaves no layer to exchange partial results in"),
    Refusal(
        "checkpoint_engine_wait_weights_before_ready",
        "--checkpoint-engine-wait-weights-before-ready",
        _off,
        "updates of weights are refused, so the server would wait for ever",
    ),
    Refusal("use_ray", "--use-ray", _off, "not tested with schedulers that Ray starts"),
    Refusal("dwdp_size", "--dwdp-size", lambda v: v <= 1, "not tested with sharded requests"),
    # Behind the settings that turn it on themselves (DWDP, elastic EP): theirs is the flag that the user gave.
    Refusal(
        "enable_dp_attention_local_control_broadcast",
        "--enable-dp-attention-local-control-broadcast",
        _off,
        "an instance that pauses a step before the others would leave them waiting in the step's exchange",
    ),
)


def find_refusal(values: Callable[[str], Any], *, resolved: bool = True) -> str | None:
    """The message for the first setting that cannot work, or None. `values(field)` reads a setting.

    resolved: False before SGLang's resolution, where None says that SGLang has yet to decide it.
    """
    for refusal in REFUSALS:
        value = values(refusal.field)
        if value is None and not resolved:
            continue
        if not refusal.works(value):
            return f"{refusal.flag} {value} does not work with --enable-dyncp: {refusal.reason}"
    return None
