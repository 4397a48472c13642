"""The runtime check without a GPU: which servers a case starts, whether its prompts do what its stages claim, and what it lets pass."""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmark.gpu_runtime import nodes
from sglang_dcp.policy.cost_model import load_cost_model
from sglang_dcp.policy.placement import make_policy
from sglang_dcp.policy.types import InstanceLoad
from sglang_dcp.upstream.router.placement_request import describe_request
from testing.client import Answer, Token
from testing.gpu import random_models, runtime_check, stages
from testing.gpu.runtime_cases import BOUNDS, COST_MODEL, FLOAT32_BOUNDS, Case, build_servers, within_bounds
from testing.gpu.servers import GpuServer

CASES = ("gqa", "gqa_nccl", "mla", "gqa4", "mla4", "gqa8", "mla8", "gqa_f32", "gqa4_nodes", "mla4_nodes", "gqa_tp2")
DEVICES = ("cuda", "cpu")


def value_of(server: GpuServer, flag: str) -> str:
    """The value that argparse takes: the last."""
    command = server.command()
    return command[len(command) - command[::-1].index(flag)]


def test_names() -> None:
    assert Case.parse("mla4_nccl") == Case("mla4_nccl", "mla", 4, "nccl")
    assert Case.parse("gqa8").shape == ("gqa", 2, 8)
    assert Case.parse("gqa_f32").is_float32 and Case.parse("gqa").instances == 2
    for name in (
        "gqa3",
        "mla_f32",
        "mla_fa3",
        "mla_fp8",
        "mla_fa3_fp8",
        "gqa_flashmla",
        "gqa_flashmla_fp8",
        "gqa_",
        "moe",
        "gqa,mla",
        "gqa_nodes",
        "gqa8_nodes",
        "gqa4_tp2",
    ):
        with pytest.raises(ValueError, match=name):
            Case.parse(name)


def test_servers_of_a_case() -> None:
    cases = [Case.parse(name) for name in CASES]
    models = {case.stock_name: Path(case.stock_name) for case in cases}
    pairs = build_servers(cases, models, "cuda", one_gpu=True, with_stock=True)
    assert pairs["gqa"][1] is pairs["gqa_nccl"][1] and pairs["gqa"][1] is not pairs["gqa4"][1]
    four, stock = pairs["mla4"]
    assert stock is not None and value_of(four, "--tp") == "4" and value_of(stock, "--tp") == "1"
    assert value_of(four, "--chunked-prefill-size") == "2048"  # 512 of each instance
    assert int(value_of(stock, "--max-total-tokens")) == 4 * int(value_of(four, "--max-total-tokens"))
    two_nodes, same = pairs["mla4_nodes"]
    assert value_of(two_nodes, "--dyncp-node-size") == "2" and same is stock and two_nodes.uses_peer_memory
    assert four.uses_peer_memory and not pairs["gqa_nccl"][0].uses_peer_memory
    two_slices, of_one = pairs["gqa_tp2"]
    assert [value_of(two_slices, flag) for flag in ("--tp", "--attn-dp-size", "--ep")] == ["4", "2", "4"] and two_slices.uses_peer_memory
    assert of_one is not None and value_of(of_one, "--tp") == "1" and "--attn-dp-size" not in of_one.command()
    assert not two_slices.plugins
    for server in pairs["gqa_f32"]:
        assert server is not None and not server.uses_peer_memory
        assert (value_of(server, "--dtype"), value_of(server, "--attention-backend")) == ("float32", "torch_native")
        assert server.environment == {"SGLANG_FORCE_FUSED_OP_BACKEND": "torch"} and server.plugins == ("plain_ops",)
    for server in build_servers([Case.parse("gqa_fp8")], {"gqa_fp8": Path()}, "cuda", one_gpu=True, with_stock=True)["gqa_fp8"]:
        assert server is not None and value_of(server, "--kv-cache-dtype") == "fp8_e4m3" and server.plugins == ("kv_scales",)
    for name, backend, plugins in (("gqa_fa3_fp8", "fa3", ("kv_scales",)), ("mla_flashmla_fp8", "flashmla", ())):
        for server in build_servers([Case.parse(name)], {name: Path()}, "cuda", one_gpu=True, with_stock=True)[name]:
            assert server is not None and server.plugins == plugins
            assert (value_of(server, "--attention-backend"), value_of(server, "--kv-cache-dtype")) == (backend, "fp8_e4m3")
            assert value_of(server, "--page-size") == ("64" if backend == "flashmla" else "16")
    for server in build_servers([Case.parse("gqa_fa3")], {"gqa_fa3": Path()}, "cuda", one_gpu=True, with_stock=True)["gqa_fa3"]:
        assert server is not None and value_of(server, "--attention-backend") == "fa3" and not server.plugins
    for device, plugins in (("cuda", ()), ("cpu", ("sinks_on_cpu",))):
        for server in build_servers([Case.parse("oss")], {"oss": Path()}, device, one_gpu=False, with_stock=True)["oss"]:
            assert server is not None and server.plugins == plugins and value_of(server, "--moe-runner-backend") == "triton"
            is_one_pool = device == "cpu" and not server.dyncp
            assert ("--disable-hybrid-swa-memory" in server.command()) == is_one_pool
    assert all(not server.plugins and value_of(server, "--dtype") == "bfloat16" for server in pairs["gqa4"] if server)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_prompts_do_what_the_stages_claim(name: str, device: str) -> None:
    """By the policy itself, asked about an idle cluster: pins are possible, growth needs one shard more, long prompts need several."""
    case = Case.parse(name)
    sizes, instances, most = case.sizes(device), case.instances, case.node_size
    policy = make_policy(
        "dual-balance",
        num_instances=instances,
        page_size=16,
        cost_model=load_cost_model(COST_MODEL, instances),
        degree=None,
        max_degree=most,
        max_guest_fraction=1.0,
    )

    def degree_of(length: int, new_tokens: int, pin: dict[str, int]) -> int:
        loads = [InstanceLoad(rank=rank, node=rank // most, kv_tokens=0, kv_capacity=sizes.pool) for rank in range(instances)]
        request = describe_request(length, new_tokens, pin, most * sizes.pool, page_size=16, largest_degree=most)
        return len(policy.place(request, loads, 16).shards)

    for length in sizes.lengths:
        for degree in range(1, most + 1):
            assert degree_of(length, sizes.new_tokens, {"degree": degree, "home": instances - 1}) == degree
    assert [degree for degree, _, _ in sizes.growing] == list(range(1, len(sizes.growing) + 1))
    for degree, length, new_tokens in sizes.growing:
        assert degree_of(length, new_tokens, {"degree": degree, "home": 0}) == degree
        assert degree * sizes.pool < length + new_tokens < (degree + 1) * sizes.pool
    for pools, length in enumerate(sizes.longs, start=1):
        assert length > pools * sizes.pool and degree_of(length, sizes.new_tokens, {}) > pools


def answer(ids: list[int], new_tokens: int, degree: int, error: float) -> Answer:
    """Tokens and scores that follow from the prompt alone; every score is off by `error`."""
    rng = random.Random(str(ids))

    def tokens(count: int) -> tuple[Token, ...]:
        return tuple(Token(rng.randrange(256), -rng.random() + error, 1.0) for _ in range(count))

    return Answer("", (), {"dyncp": {"degree_end": degree}}, tokens(len(ids) - 1), tokens(new_tokens))


def run_check(
    monkeypatch: pytest.MonkeyPatch, name: str, errors: dict[int, float], growth: int = 1, *, opened: str = "", eager_steps: int = 0
) -> dict[str, Any]:
    """The stages against stand-ins. errors: of our answers, by degree. opened: whose memory was, as the log has it; eager_steps: of every
    request, beside its prefill."""
    case = Case.parse(name)
    ours, stock = case.server(Path(), "cuda", dyncp=True, one_gpu=True), case.server(Path(), "cuda", dyncp=False, one_gpu=True)
    sizes, steps = case.sizes("cuda"), {"graph": 0.0, "eager": 0.0, "sharded_graph": 0.0}

    def ask(server: Any, ids: list[int], new_tokens: int, pin: dict[str, Any] | None) -> Answer:
        if server is stock:
            return answer(ids, new_tokens, 1, 0.0)
        degree = pin["custom_params"]["dyncp"]["degree"] if pin else case.node_size
        if len(ids) + new_tokens > degree * sizes.pool:
            degree += growth
        steps["sharded_graph"] += case.node_size * (new_tokens - 1) if degree > 1 else 0
        steps["graph"] += case.instances * (new_tokens - 1)
        steps["eager"] += case.instances * (-(-len(ids) // 512) + eager_steps)
        return answer(ids, new_tokens, degree, errors.get(degree, 0.0))

    monkeypatch.setattr(stages, "ask", ask)
    monkeypatch.setattr(stages, "step_counts", lambda server: dict(steps))
    monkeypatch.setattr(stages, "time", SimpleNamespace(sleep=lambda seconds: None, monotonic=lambda: 0.0))
    monkeypatch.setattr(GpuServer, "alive", property(lambda server: True))
    monkeypatch.setattr(GpuServer, "log", lambda server: opened)
    check = stages.Check(case, ours, stock, lambda: None)
    check.run()
    return check.result


def test_every_stage_of_four_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_check(monkeypatch, "gqa4", {1: 0.03, 2: 0.03, 3: 0.031, 4: 0.032})
    assert list(found["stages"]) == [
        *("unsharded", "degree_2", "degree_3", "degree_4", "degree_4_again", "growth_from_1", "growth_from_2"),
        *("longer_than_1_pool", "longer_than_2_pools", "soak", "soak_unsharded", "unsharded_again"),
    ]
    assert runtime_check.case_holds(found), found
    assert {1, 2, 3, 4} == set(found["stages"]["soak"]["degrees"])
    assert found["stages"]["growth_from_2"]["degrees"] == [3]


OWN_NODES = "peer memory with instances 0-1, 4\npeer memory with instances 2-3, 4\n" * 2


@pytest.mark.parametrize(
    ("opened", "eager_steps", "ok"), [(OWN_NODES, 0, True), ("peer memory with instances 0-3, 4", 0, False), (OWN_NODES, 1, False)]
)
def test_two_nodes(monkeypatch: pytest.MonkeyPatch, opened: str, eager_steps: int, ok: bool) -> None:
    """Memory of another node was opened, or a decode step with sharded rows ran without a graph: the stage fails."""
    found = run_check(monkeypatch, "gqa4_nodes", {}, opened=opened, eager_steps=eager_steps)
    assert list(found["stages"]) == [
        *("unsharded", "degree_2", "degree_2_again", "growth_from_1", "longer_than_1_pool"),
        *("nodes", "soak", "soak_unsharded", "unsharded_again"),
    ]
    assert found["stages"]["nodes"]["ok"] == ok == runtime_check.case_holds(found)
    assert (found["stages"]["nodes"]["sharded_graph_share"] == 1.0) == (eager_steps == 0)
    served = {"held": ok, "cases": {"gqa4_nodes": nodes.summarise(found)}}
    exchange = {"mla": {"exchange_2x2_over_2": 1.02}, "gqa": {"exchange_2x2_over_2": 1.2}}
    figures = nodes.conclude({"served": served, "exchange": exchange})
    assert figures["exchange_2x2_over_2"] == 1.2 and not figures["bars"]["exchange_2x2_over_2"]
    assert figures["bars"]["served"] == ok and figures["bars"]["sharded_graph_share"] == (eager_steps == 0)
    json.dumps(figures | served)


@pytest.mark.parametrize(
    ("name", "errors", "growth", "failing"),
    [
        ("gqa4", {1: 0.03, 3: 0.3}, 1, {"degree_3", "growth_from_2", "soak"}),
        ("gqa4", {}, 2, {"growth_from_1", "growth_from_2"}),
        ("gqa", {2: 0.2}, 1, {"degree_2", "degree_2_again", "growth_from_1", "longer_than_1_pool", "soak"}),
        ("gqa_f32", {2: 3e-4}, 1, {"degree_2", "degree_2_again", "growth_from_1", "longer_than_1_pool", "soak"}),
        ("gqa_f32", {1: 3e-4}, 1, {"unsharded", "soak", "soak_unsharded", "unsharded_again"}),
    ],
)
def test_a_wrong_answer_or_degree_fails_its_stages(
    monkeypatch: pytest.MonkeyPatch, name: str, errors: dict[int, float], growth: int, failing: set[str]
) -> None:
    found = run_check(monkeypatch, name, errors, growth)
    assert {stage for stage, entry in found["stages"].items() if not entry["ok"]} == failing
    assert not runtime_check.case_holds(found)


def test_peer_memory_without_a_sharded_graph_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    found = run_check(monkeypatch, "gqa", {})
    assert runtime_check.case_holds(found)
    monkeypatch.setattr(stages.Check, "_counts", lambda self: {"sharded_graph": 0.0})
    case = Case.parse("gqa")
    check = stages.Check(case, case.server(Path(), "cuda", dyncp=True, one_gpu=True), None, lambda: None)
    check.run()
    failed = {stage for stage, entry in check.result["stages"].items() if entry.get("error") == "no step with sharded rows ran as a graph"}
    assert failed == {"degree_2", "degree_2_again", "growth_from_1", "soak"}


@pytest.mark.parametrize("wrong", ["ours", "stock"])
def test_who_erred_is_told_by_who_repeats_itself(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """A token of one answer is another one the first time: both servers are asked again, once."""
    case = Case.parse("gqa")
    ours, stock = case.server(Path(), "cuda", dyncp=True, one_gpu=True), case.server(Path(), "cuda", dyncp=False, one_gpu=True)
    asked: list[Any] = []

    def ask(server: Any, ids: list[int], new_tokens: int, pin: dict[str, Any] | None) -> Answer:
        asked.append(server)
        given = answer(ids, new_tokens, 1, 0.0)
        if server is {"ours": ours, "stock": stock}[wrong] and asked.count(server) == 1:
            tokens = list(given.output_tokens)
            tokens[2] = Token(tokens[2].id + 1, tokens[2].logprob, 1.0)
            given = Answer("", (), given.meta, given.prompt_tokens, tuple(tokens))
        return given

    monkeypatch.setattr(stages, "ask", ask)
    check = stages.Check(case, ours, stock, lambda: None)
    (parted,) = check._compare([([1, 2, 3], 8, {"pinned": 2})], 1)["parted"]
    assert parted["place"] == 2 and not parted["is_tie"] and len(asked) == 4
    assert parted["ours_repeats"] == (wrong == "stock") and parted["stock_repeats"] == (wrong == "ours")


def test_an_incomplete_case_does_not_hold() -> None:
    assert not runtime_check.case_holds({}) and not runtime_check.case_holds({"stages": {"unsharded": {"ok": True}}})


SERVER = "import sys, time; time.sleep(float(sys.argv[1])); print(sys.argv[2], flush=True); time.sleep(120)"


def run_waves(monkeypatch: pytest.MonkeyPatch, out: Path, waves: str, words: str, stage: Any, limit_s: float) -> tuple[Any, dict[str, Any]]:
    """Waves of stand-in servers that print `words` after a moment. stage(case, waves object): what a case does."""
    monkeypatch.setattr(GpuServer, "command", lambda server: [sys.executable, "-c", SERVER, "0.1", words])
    monkeypatch.setattr(GpuServer, "freeze_garbage", lambda server: True)  # they listen nowhere
    cases = [[Case.parse(name) for name in wave.split(",")] for wave in waves.split("/")]
    together = [case for wave in cases for case in wave]
    pairs = build_servers(together, {case.stock_name: Path() for case in together}, "cuda", one_gpu=True, with_stock=True)
    found = runtime_check.Waves(cases, pairs, out)

    class Stages:
        def __init__(self, case: Case, *_: Any) -> None:
            self.case, self.result = case, {"stages": {}}

        def run(self) -> None:
            stage(self.case.name, found)
            self.result["complete"] = True

    monkeypatch.setattr(runtime_check, "Check", Stages)
    return found, found.run(time.monotonic() + limit_s)


def test_the_next_wave_starts_while_one_is_checked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = {}

    def stage(name: str, waves: Any) -> None:
        time.sleep(0.8)
        seen[name] = {server.name for server in waves.running}

    waves, report = run_waves(monkeypatch, tmp_path, "gqa,mla/gqa4", "fired up and ready", stage, 60)
    assert seen["gqa"] == {"gqa", "gqa_stock", "mla", "mla_stock", "gqa4", "gqa4_stock"}
    assert seen["gqa4"] == {"gqa4", "gqa4_stock"}
    assert all(runtime_check.case_holds(report["checks"][name]) for name in ("gqa", "mla", "gqa4"))
    assert json.loads((tmp_path / "runtime_check.json").read_text()) == report
    assert not any(server.alive for server in waves.started)


def test_servers_that_never_become_ready_fail_their_wave_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    began = time.monotonic()
    waves, report = run_waves(monkeypatch, tmp_path, "gqa/mla", "still loading", lambda *_: None, 4)
    assert time.monotonic() - began < 25
    assert not any(runtime_check.case_holds(report["checks"].get(name, {})) for name in ("gqa", "mla"))
    assert not any(server.alive for server in waves.started)


def test_bounds() -> None:
    def found(mean: float, p99: float, most: float, parted: int = 0) -> dict[str, Any]:
        return {"all": {"count": 9, "mean": mean, "p99": p99, "max": most}, "parted_without_tie": parted}

    base = found(0.03, 0.1, 0.2)
    assert within_bounds(found(0.06, 0.2, 9.0), base, BOUNDS)
    assert not within_bounds(found(0.07, 0.2, 0.2), base, BOUNDS)
    assert not within_bounds(found(0.03, 0.3, 0.3), base, BOUNDS)
    assert not within_bounds(found(0.0, 0.0, 0.0, parted=1), base, BOUNDS)
    assert within_bounds(found(1e-5, 1e-4, 2e-4), base, FLOAT32_BOUNDS)
    assert not within_bounds(found(1e-5, 1e-4, 3e-4), base, FLOAT32_BOUNDS)
    assert not within_bounds(found(3e-5, 1e-4, 1e-4), base, FLOAT32_BOUNDS)


def test_models_of_fewer_layers(tmp_path: Path) -> None:
    small = random_models.write_model("mla", tmp_path, 2)
    assert small.name == "mla_2layers" and (small / "model.safetensors").is_file()
    shapes = random_models.weight_shapes(random_models.MLA | {"num_hidden_layers": 2})
    assert {key.split(".")[2] for key in shapes if ".layers." in key} == {"0", "1"}
