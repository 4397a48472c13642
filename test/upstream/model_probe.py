"""Builds tiny models of SGLang's own classes on the CPU and recomputes the attention of every layer from two halves of the pool.

Prints one JSON line per model. Runs in a process of its own (see test_served_models.py): the environment must be set before SGLang is
imported. SGLang is imported once; each model has a fork, because SGLang holds one model's topology per process.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from model_cases import CASES, ModelCase

PROMPT_TOKENS, DECODE_STEPS = 23, 3
TOKENIZER = Path(__file__).resolve().parents[2] / "testing" / "models" / "qwen3moe"
WEIGHT_RANGE = 0.3
"""Dummy weights are of this size, instead of SGLang's 0.001: attention shall differ from a plain mean of the values."""


class Recorder:
    """Recomputes each layer's attention behind stock's, and keeps the largest differences."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []  # layer id, new tokens
        self.error = self.size = self.half_alone = self.pool_error = 0.0
        self.complaints: set[str] = set()
        self.sinks: set[tuple[int, ...]] = set()

    def look(self, pool: Any, batch: Any, table: torch.Tensor, call: dict[str, Any], output: torch.Tensor) -> None:
        from sglang_dcp.upstream.layers.attention_backend import PoolLayer, with_rotary_part

        layer = call["layer"]
        if call["k"] is None or not call["save_kv_cache"]:
            self.complaints.add("K/V are not handed to the backend")
            return
        if layer.k_scale is not None or layer.xai_temperature_len > 0:
            self.complaints.add("scaled keys, or a temperature by position")
        try:
            q, k, v = with_rotary_part(call["q"], call["k"], call["v"], **call["kwargs"])
        except TypeError as error:
            self.complaints.add(str(error))
            return
        cache = PoolLayer(pool, layer, latent=layer.tp_k_head_num == 1 and layer.qk_head_dim != layer.v_head_dim)
        keys, values = cache.keys_and_values()
        new_kv = cache.new_kv(k, v)
        self.pool_error = max(self.pool_error, float((keys[batch.out_cache_loc] - new_kv.keys).abs().max()))
        self.pool_error = max(self.pool_error, float((values[batch.out_cache_loc] - new_kv.values).abs().max()))
        self.calls.append((layer.layer_id, q.shape[0]))
        self._compare(q, keys, values, table[int(batch.req_pool_indices[0]), : int(batch.seq_lens[0])].long(), layer, output)

    def _compare(self, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, layer: Any, output: Any) -> None:
        from sglang_dcp.dataflow.merge import merge_partial_states
        from sglang_dcp.dataflow.reference import partial_attention
        from sglang_dcp.upstream.attach.models import window_of

        queries = q.reshape(q.shape[0], layer.tp_q_head_num, layer.qk_head_dim)
        positions = torch.arange(len(slots))
        own = positions[-len(queries) :]
        cut = len(slots) // 2
        states = []
        for part in (slice(0, cut), slice(cut, None)):
            at = {"query_positions": own, "key_positions": positions[part], "window": window_of(layer)}
            states.append(partial_attention(queries, keys[slots[part]], values[slots[part]], scale=layer.scaling, **at))
        merged = merge_partial_states(torch.stack([s.output for s in states]), torch.stack([s.lse for s in states])).output
        stock = output.reshape(merged.shape)
        self.size = max(self.size, float(stock.abs().max()))
        self.error = max(self.error, float((merged - stock).abs().max()))
        self.half_alone = max(self.half_alone, float((states[0].output - stock).abs().max()))


def register_recording_backend(recorder: Recorder) -> None:
    from sglang.srt.layers.attention.attention_registry import register_attention_backend
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    class RecordingBackend(TorchNativeAttnBackend):
        def forward(self, q: Any, k: Any, v: Any, layer: Any, batch: Any, save_kv_cache: bool = True, **kwargs: Any) -> Any:
            call = {"q": q, "k": k, "v": v, "layer": layer, "save_kv_cache": save_kv_cache, "kwargs": kwargs}
            # SGLang's torch_native has no sinks, so the layer is compared without its own.
            if (sinks := kwargs.pop("sinks", None)) is not None:
                recorder.sinks.add(tuple(sinks.shape))
            output = super().forward(q, k, v, layer, batch, save_kv_cache, **kwargs)
            recorder.look(self.token_to_kv_pool, batch, self.req_to_token_pool.req_to_token, call, output)
            return output

    register_attention_backend("torch_native")(RecordingBackend)


def load(folder: str, *, load_format: str = "dummy", pool_tokens: int = 512, **further: Any) -> Any:
    """SGLang's ModelRunner for one rank, with dummy weights or (load_format "auto") those of the folder. further: server arguments."""
    from sglang.benchmark import one_batch
    from sglang.srt.model_loader import loader, weight_utils
    from sglang.srt.server_args import PortArgs, ServerArgs

    def larger_weights(model: torch.nn.Module) -> None:
        weight_utils.initialize_dummy_weights(model, -WEIGHT_RANGE, WEIGHT_RANGE)

    loader.initialize_dummy_weights = larger_weights
    arguments = ServerArgs(
        model_path=folder,
        tokenizer_path=str(TOKENIZER),
        trust_remote_code=True,
        load_format=load_format,
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        max_total_tokens=pool_tokens,
        chunked_prefill_size=pool_tokens,
        max_running_requests=4,
        # Stock's torch_native writes latents by token id.
        page_size=1,
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
        disable_hybrid_swa_memory=True,
        **further,
    )
    arguments.resolve_once()
    one_batch._set_envs_and_config(arguments)
    one_batch.publish(arguments, role="scheduler", ranks=one_batch.SpawnRanks(world_rank=0, gpu_id=0))
    one_batch._init_process_global_configs()
    return one_batch.load_model(arguments, PortArgs.init_new(arguments), 0, 0)[0]


def run_steps(runner: Any) -> None:
    """One prompt and a few tokens."""
    from sglang.benchmark.one_batch import prepare_synthetic_inputs_for_latency_test

    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, 256, (PROMPT_TOKENS,), generator=generator).tolist()
    tokens, _, batch = runner.extend(prepare_synthetic_inputs_for_latency_test(1, PROMPT_TOKENS, [prompt]))
    for _ in range(DECODE_STEPS):
        tokens, _ = runner.decode(tokens, batch)


def probe(case: ModelCase) -> dict[str, Any]:
    from sglang_dcp.upstream.attach import models

    if case.architecture == "GptOssForCausalLM":
        serve_on_any_cpu()
    recorder = Recorder()
    register_recording_backend(recorder)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(case.config()))
        runner = load(folder)
    run_steps(runner)
    model = runner.torch_runner.model
    layers = models.attention_layers(model)
    modules = dict(model.named_modules())
    return {
        "model": type(model).__name__,
        "owners": sorted({type(modules[name]).__name__ for name in layers.values()}),
        "layers": sorted(layers),
        "calls": recorder.calls,
        "unsupported": models.find_unsupported_layer(model),
        "complaints": sorted(recorder.complaints),
        "sinks": sorted(recorder.sinks),
        "dtype": str(runner.torch_runner.dtype),
        "size": recorder.size,
        "error": recorder.error,
        "half_alone": recorder.half_alone,
        "pool_error": recorder.pool_error,
        "skips_idle": any("is_idle" in inspect.getsource(type(layer).forward) for layer in decoder_layers(modules, layers)),
        "gathers_tokens": any(hasattr(module, "attn_boundary") for module in modules.values()),
        "heads_with_two_instances": heads_with_two_instances(model, runner.torch_runner.model_config.hf_config),
    }


def serve_on_any_cpu() -> None:
    """gpt-oss, which SGLang serves on a CPU with kernels of Intel's matrix extension alone. Its experts pass their input on: what is
    looked at is attention."""
    from sglang.srt.arg_groups import model_hook
    from sglang.srt.models.gpt_oss import GptOssSparseMoeBlock

    model_hook.attention_backends_of = lambda view: ("intel_amx", "intel_amx")
    GptOssSparseMoeBlock.forward_normal = lambda self, hidden_states: hidden_states


def decoder_layers(modules: dict[str, torch.nn.Module], layers: dict[int, str]) -> list[torch.nn.Module]:
    """What calls the attention of each layer."""
    return [modules[name.rpartition(".")[0]] for name in layers.values()]


def heads_with_two_instances(model: torch.nn.Module, config: Any) -> list[int]:
    """Query heads that a layer gets where each of two ranks attends requests of its own. Built anew without storage."""
    from sglang.srt import runtime_context

    # There is one process, and so no group of two; building alone asks for none.
    runtime_context._validate_parallel = lambda *args: None
    with runtime_context.get_parallel().override(tp_size=2, attn_dp_size=2, attn_tp_size=1, moe_ep_size=2), torch.device("meta"):
        built = type(model)(config)
    return sorted({module.tp_q_head_num for module in built.modules() if type(module).__name__ == "RadixAttention"})


def import_once() -> None:
    """What all forks share: the hooks, and then every import that a first model would do, of all model files most of all."""
    import sglang.benchmark.one_batch  # noqa: F401
    from sglang.srt.configs.bailing_moe_v2 import BailingMoeV2Config
    from transformers import AutoConfig

    # Ling's checkpoints bring a configuration class of their own.
    AutoConfig.register("bailing_moe_v2", BailingMoeV2Config)

    from sglang_dcp.cpu.hooks import CPU_HOOKS
    from sglang_dcp.upstream.attach.install import install

    install(CPU_HOOKS)
    import sglang.srt.models.registry  # noqa: F401

    import sglang_dcp.upstream.layers.attention_backend  # noqa: F401

    gc.collect()
    gc.freeze()  # SGLang collects garbage when it makes a pool; the forks need not look at what was imported


def main(names: list[str]) -> None:
    import_once()
    for case in CASES:
        if names and case.architecture not in names:
            continue
        child = os.fork()
        if child == 0:
            try:
                outcome = probe(case)
            except BaseException:  # noqa: BLE001 - whatever it raises is the finding
                outcome = {"failed": traceback.format_exc()[-3000:]}
            print("PROBE " + json.dumps({"architecture": case.architecture} | outcome), flush=True)
            os._exit(0)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
