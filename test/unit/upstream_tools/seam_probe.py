"""Tries the staged changes on a patched SGLang and prints the outcomes as JSON. Runs in a process of its own, without hooks of ours."""

import argparse
import json
import os
import threading
import types

import expert_probe
import range_probe
import torch
import torch.distributed as dist


def outcome(attempt):
    try:
        return attempt()
    except Exception as error:  # noqa: BLE001 - whatever it raises is the finding
        return f"{type(error).__name__}: {str(error)[:300]}"


class OneOfTwo:
    """The parts of a GroupCoordinator that the collectives read, for a thread that plays a rank."""

    def __init__(self, rank, group):
        from sglang.srt.distributed.parallel_state import GroupCoordinator

        self.rank_in_group, self.world_size, self.device_group, self.pynccl_comm = rank, 2, group, None
        for name in ("_reduce_scatterv_without_nccl", "_all_gatherv_without_nccl"):
            setattr(self, name, getattr(GroupCoordinator, name).__get__(self))


def collectives_of_two_ranks():
    """Two ranks with 1 and 3 rows. Threads of one process, each with a gloo group of its own."""
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    store = dist.HashStore()
    results = {}

    def play(rank):
        group = dist.ProcessGroupGloo(dist.PrefixStore("two", store), rank, 2)
        original_reduce, original_gather = dist.all_reduce, dist.all_gather
        me = OneOfTwo(rank, group)
        sizes = [1, 3]
        rows = torch.arange(8.0).view(4, 2) * (rank + 1)
        own = torch.full((sizes[rank], 2), float(rank))
        results[rank] = (
            GroupCoordinator.reduce_scatterv(me, rows, sizes=sizes),
            GroupCoordinator.all_gatherv(me, own, sizes=sizes)[0],
            original_reduce,
            original_gather,
        )

    def all_reduce(tensor, group=None):
        group.allreduce([tensor]).wait()

    def all_gather(parts, tensor, group=None):
        group.allgather([parts], [tensor]).wait()

    saved = dist.all_reduce, dist.all_gather
    dist.all_reduce, dist.all_gather = all_reduce, all_gather
    try:
        threads = [threading.Thread(target=play, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    finally:
        dist.all_reduce, dist.all_gather = saved
    summed = torch.arange(8.0).view(4, 2) * 3
    gathered = torch.tensor([[0.0, 0.0], [1, 1], [1, 1], [1, 1]])
    return (
        torch.equal(results[0][0], summed[:1])
        and torch.equal(results[1][0], summed[1:])
        and all(torch.equal(results[rank][1], gathered) for rank in range(2))
    )


def parsed_flags():
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser, ServerArgs


def parser_without_plugins_is_as_before():
    parser, server_args = parsed_flags()
    known = server_args.from_cli_args(parser.parse_args(["--model-path", "x"]))
    return known.model_path == "x" and not any("--seam" in action.option_strings for action in parser._actions)


def flags_of_a_plugin_are_parsed_and_read():
    from sglang.srt.plugins import register_cli_args

    seen = {}

    def add(parser):
        parser.add_argument("--seam", type=int)

    def read(args, namespace):
        seen.update(seam=namespace.seam, args=args)

    register_cli_args(add, read)
    parser, server_args = parsed_flags()
    result = server_args.from_cli_args(parser.parse_args(["--model-path", "x", "--seam", "7"]))
    return seen["seam"] == 7 and seen["args"] is result


def sampling(custom_params):
    from sglang.srt.sampling.sampling_params import SamplingParams

    parameters = SamplingParams(custom_params=custom_params)
    parameters.normalize(None)
    parameters.verify(100)


def custom_params_pass_without_checks():
    sampling({"degree": 0})
    return True


def a_check_refuses_custom_params():
    from sglang.srt.sampling.sampling_params import register_custom_params_check

    def check(custom_params):
        if custom_params and custom_params.get("degree") == 0:
            raise ValueError("degree 0")

    register_custom_params_check(check)
    sampling({"degree": 1})
    try:
        sampling({"degree": 0})
    except ValueError as error:
        return str(error) == "degree 0"
    return False


class Policy:
    """Places requests that ask for it on rank 1."""

    def place(self, req, snapshots):
        if req.wanted:
            assert snapshots == ["load"]
            req.routed_dp_rank = 1


def controller():
    from sglang.srt.managers.data_parallel_controller import DataParallelController

    made = object.__new__(DataParallelController)
    made.placement_policy = Policy()
    made.load_snapshot_reader = types.SimpleNamespace(read_all=lambda: ["load"])
    made.sent = []
    made.maybe_external_dp_rank_routing = lambda req: req.routed_dp_rank is not None and (made.sent.append(req.routed_dp_rank) or True)
    made.round_robin_scheduler = lambda req: made.sent.append("round robin")
    return made


def dispatched(wanted):
    made = controller()
    made.placed_scheduler(types.SimpleNamespace(routed_dp_rank=None, wanted=wanted))
    return made.sent


def installed_policy_names():
    import inspect

    from sglang.srt.managers import data_parallel_controller as module

    module.register_placement_policy(lambda _controller: Policy())
    assert "_placement_policy_factory is not None" in inspect.getsource(module.DataParallelController.__init__)
    return dispatched(wanted=True) == [1]


def raised(counts, asked):
    from sglang.srt.managers.scheduler_components import dp_attn

    dp_attn._idle_rank_floors[:] = []
    dp_attn.register_idle_rank_floor(lambda: asked)
    info = object.__new__(dp_attn.MLPSyncBatchInfo)
    info.global_num_tokens, info.num_tokens = list(counts), 0
    info.apply_idle_rank_floor()
    return info.global_num_tokens, info.num_tokens


def attention(keys, values, query, return_lse):
    """One decode token over all of `keys` through the torch_native backend."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    backend = object.__new__(TorchNativeAttnBackend)
    backend.swa_out_cache_loc = None
    backend.token_to_kv_pool = types.SimpleNamespace(get_key_buffer=lambda _: keys, get_value_buffer=lambda _: values)
    backend.req_to_token_pool = types.SimpleNamespace(req_to_token=torch.arange(len(keys)).view(1, -1))
    layer = types.SimpleNamespace(
        tp_q_head_num=4,
        tp_k_head_num=2,
        qk_head_dim=8,
        v_head_dim=8,
        layer_id=0,
        scaling=0.3,
        is_cross_attention=False,
        sliding_window_size=None,
    )
    batch = types.SimpleNamespace(
        out_cache_loc=None,
        encoder_out_cache_loc=None,
        req_pool_indices=torch.tensor([0]),
        seq_lens=torch.tensor([len(keys)]),
        encoder_lens=None,
    )
    extra = {"return_lse": True} if return_lse else {}
    return backend.forward_decode(query, None, None, layer, batch, save_kv_cache=False, **extra)


def halves_merged_by_lse_equal_the_whole():
    generator = torch.Generator().manual_seed(1)
    keys, values = torch.randn(12, 2, 8, generator=generator), torch.randn(12, 2, 8, generator=generator)
    query = torch.randn(1, 32, generator=generator)
    whole = attention(keys, values, query, return_lse=False).view(4, 8)
    parts = [attention(keys[part], values[part], query, return_lse=True) for part in (slice(0, 5), slice(5, 12))]
    lse = torch.stack([part[1].view(4) for part in parts])
    weights = torch.softmax(lse, dim=0)
    merged = sum(weight.unsqueeze(-1) * part[0].view(4, 8) for weight, part in zip(weights, parts, strict=True))
    return bool(torch.allclose(whole, merged, atol=1e-5))


def decode_without_lse_is_as_before():
    result = attention(torch.ones(3, 2, 8), torch.ones(3, 2, 8), torch.ones(1, 32), return_lse=False)
    return isinstance(result, torch.Tensor) and bool(torch.allclose(result, torch.ones(1, 32)))


def a_decode_plan_waits_for_the_copy_of_the_last_one():
    """Two plans of one wrapper on a stand-in for a GPU; a plan on a CPU makes no event."""
    from sglang.srt.layers.attention import flashinfer_backend as backend

    calls = []

    def event():
        return types.SimpleNamespace(synchronize=lambda: calls.append("wait"), record=lambda: calls.append("mark"))

    updater = object.__new__(backend.FlashInferIndicesUpdaterDecode)
    updater.attn_backend = types.SimpleNamespace(kv_index_translator=types.SimpleNamespace(reads_are_translated=False))
    updater.kv_last_page_len = torch.ones(4)
    updater.num_qo_heads = updater.num_kv_heads = updater.head_dim = 1
    updater.data_type = updater.q_data_type = torch.bfloat16
    real_event, torch.cuda.Event = torch.cuda.Event, event
    try:
        for is_cuda, expected in ((True, ["plan", "mark", "wait", "plan", "mark"]), (False, ["plan", "plan"])):
            calls.clear()
            wrapper = types.SimpleNamespace(begin_forward=lambda *args, **kwargs: calls.append("plan"))
            spec = types.SimpleNamespace(kv_indptr=types.SimpleNamespace(shape=(3,), is_cuda=is_cuda), kv_indices=None)
            for _ in range(2):
                updater.call_begin_forward(wrapper, None, 0, None, None, spec, None, plan=None, req_pool_indices=None)
            if calls != expected:
                return calls
    finally:
        torch.cuda.Event = real_event
    return True


def heads_on_four_ranks(**arguments):
    """KV heads that a model with 2 gets on four ranks."""
    import tempfile
    from pathlib import Path

    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp

    source = Path(__file__).resolve().parents[3] / "testing" / "models" / "qwen3moe" / "config.json"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(json.loads(source.read_text()) | {"num_key_value_heads": 2}))
        return adjust_config_with_unaligned_cpu_tp(ModelConfig(folder), LoadConfig(), 4, **arguments).num_key_value_heads


def plain_rope_rotates():
    from sglang.srt.layers.rotary_embedding.factory import get_rope, get_rope_cpu

    generator = torch.Generator().manual_seed(1)
    positions, query, key = torch.arange(7), torch.randn(7, 64, generator=generator), torch.randn(7, 16, generator=generator)
    ours = get_rope_cpu(16, 16, 4096, 10000, False, None, torch.float32, 1.0, "cpu").forward_native(positions, query.clone(), key.clone())
    stock = get_rope(16, 16, 4096, 10000, False, None, torch.float32).forward_native(positions, query.clone(), key.clone())
    return all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True)) and not torch.equal(ours[0], query)


def rows_are_written_without_the_kernel():
    from sglang.srt.mem_cache import allocation

    allocation.assign_req_to_token_pool_cpu = None
    table = torch.zeros(3, 6, dtype=torch.int32)
    starts, ends = torch.tensor([1, 0]), torch.tensor([3, 1])
    allocation.assign_req_to_token_pool_func(torch.tensor([2, 0]), table, starts, ends, torch.tensor([7, 8, 9]), 2)
    return table.tolist() == [[9, 0, 0, 0, 0, 0], [0] * 6, [0, 7, 8, 0, 0, 0]]


def probe():
    import sglang

    return {
        "imported_from_the_copy": os.environ["PYTHONPATH"].split(os.pathsep)[0] in str(list(sglang.__path__)[0]),
        "collectives_of_two_ranks": outcome(collectives_of_two_ranks),
        "parser_without_plugins_is_as_before": outcome(parser_without_plugins_is_as_before),
        "flags_of_a_plugin_are_parsed_and_read": outcome(flags_of_a_plugin_are_parsed_and_read),
        "custom_params_pass_without_checks": outcome(custom_params_pass_without_checks),
        "a_check_refuses_custom_params": outcome(a_check_refuses_custom_params),
        "placed_requests_go_to_their_rank": outcome(installed_policy_names),
        "unplaced_requests_go_round_robin": outcome(lambda: dispatched(wanted=False) == ["round robin"]),
        "idle_ranks_are_raised_when_asked": outcome(lambda: raised([0, 3], True) == ([1, 3], 1) and raised([0, 3], False) == ([0, 3], 0)),
        "no_rank_is_raised_when_all_are_idle": outcome(lambda: raised([0, 0], True) == ([0, 0], 0)),
        "halves_merged_by_lse_equal_the_whole": outcome(halves_merged_by_lse_equal_the_whole),
        "decode_without_lse_is_as_before": outcome(decode_without_lse_is_as_before),
        "a_decode_plan_waits_for_the_copy_of_the_last_one": outcome(a_decode_plan_waits_for_the_copy_of_the_last_one),
        "heads_are_counted_per_attention_rank": outcome(lambda: (heads_on_four_ranks(attn_tp_size=1), heads_on_four_ranks()) == (2, 4)),
        "plain_rope_rotates": outcome(plain_rope_rotates),
        "rows_are_written_without_the_kernel": outcome(rows_are_written_without_the_kernel),
    } | {attempt.__name__: outcome(attempt) for attempt in (*expert_probe.ATTEMPTS, *range_probe.ATTEMPTS)}


if __name__ == "__main__":
    print("PROBE " + json.dumps(probe()))
