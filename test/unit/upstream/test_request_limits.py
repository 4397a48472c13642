"""Which requests the main process refuses: pins, lengths, options; every message names value and limit."""

from __future__ import annotations

import re
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt import runtime_context

from sglang_dcp.config import CONFIG_VARIABLE, ConfigError, DynCpConfig
from sglang_dcp.policy.split_limits import Layout
from sglang_dcp.upstream.attach.settings import find_layout_refusal
from sglang_dcp.upstream.front.request_limits import REFUSED_OPTIONS, RequestError, RequestLimits, check_address, check_options, read_pin
from sglang_dcp.upstream.pool import capacity
from sglang_dcp.upstream.router.placement_hint import ACTION_TYPE, strip_hints
from sglang_dcp.upstream.router.placement_request import describe_request

POOL, PAGE = 1024, 16


def limits(instances: int = 4, **config: Any) -> RequestLimits:
    return RequestLimits(DynCpConfig(**config).resolve(instances), instances, POOL, PAGE)


@pytest.mark.parametrize("degree", [0, -1, 5, 99, "two", "2", 1.5, 2.0, [2], True, None, {}])
def test_senseless_degree(degree: Any) -> None:
    with pytest.raises(RequestError, match=r"custom_params.dyncp.degree must be an integer in 1\.\.4 .*got ") as refused:
        limits().check(100, {"custom_params": {"dyncp": {"degree": degree}}})
    assert repr(degree) in str(refused.value)


@pytest.mark.parametrize("home", [-1, 4, 9, "0", 0.0, False])
def test_senseless_home(home: Any) -> None:
    with pytest.raises(RequestError, match=r"dyncp.home must be an integer in 0\.\.3"):
        limits().check(100, {"custom_params": {"dyncp": {"home": home}}})


@pytest.mark.parametrize("pin", [None, 2, "degree", [1], True])
def test_pin_must_be_an_object(pin: Any) -> None:
    with pytest.raises(RequestError, match="must be an object"):
        read_pin({"dyncp": pin}, Layout(4, 4))


def test_unknown_key_is_named() -> None:
    with pytest.raises(RequestError, match="dyncp.degre is unknown; there are degree, home, at_most"):
        read_pin({"dyncp": {"degre": 2}}, Layout(4, 4))


def test_custom_params_of_others_are_left_alone() -> None:
    assert read_pin({"thinking_budget": 3}, Layout(4, 4)) == {}
    assert read_pin(None, Layout(4, 4)) == {}
    assert read_pin({"dyncp": {"degree": 4, "home": 0}}, Layout(4, 4)) == {"degree": 4, "home": 0}


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
def test_every_honourable_pin_passes(degree: int) -> None:
    for home in range(4):
        limits().check(degree * PAGE, {"custom_params": {"dyncp": {"degree": degree, "home": home}}, "max_new_tokens": 10})


@pytest.mark.parametrize("hosts", [{"num_nodes": 2}, {"node_size": 2}])
def test_a_prompt_beyond_a_node_names_the_node_s_size(hosts: dict[str, int]) -> None:
    """Two nodes of two: what fits one is placed there, whatever home is pinned; four pools hold nothing that two cannot."""
    nodes = limits(**hosts)
    assert nodes.split_limits.max_degree == 2 and nodes.reach_tokens == 2 * POOL
    for home in range(4):
        placement = nodes.check(2 * POOL - 3 * PAGE, {"max_new_tokens": 1, "custom_params": {"dyncp": {"home": home}}})
        assert {rank // 2 for rank in placement.shards} == {home // 2}
    with pytest.raises(RequestError, match="2 KV pools of 1024 tokens of a node with 2 instances .*--dyncp-node-size"):
        nodes.check(2 * POOL, {"max_new_tokens": 1})
    with pytest.raises(RequestError, match="degree must be an integer in 1..2 .the instances of a node, --tp 4., got 3"):
        nodes.check(320, {"custom_params": {"dyncp": {"degree": 3}}})
    limits(**hosts, scope="cluster").check(4 * POOL - 3 * PAGE, {"max_new_tokens": 1})


CONTRADICTIONS = [
    ({"max_degree": 3, "num_nodes": 2}, "--dyncp-max-degree 3 exceeds the 2 instances of a node .*--nnodes 2.*--dyncp-scope cluster"),
    ({"policy": "fixed", "degree": 4, "node_size": 2}, "--dyncp-degree 4 exceeds the 2 instances of a node .*--dyncp-scope cluster"),
    ({"node_size": 3}, "--dyncp-node-size 3 does not divide the 4 instances of a host"),
    ({"node_size": 4, "num_nodes": 2}, "--dyncp-node-size 4 does not divide the 2 instances of a host"),
    ({"num_nodes": 3}, "4 instances .--tp. cannot be spread evenly over --nnodes 3"),
    ({"max_degree": 5}, "--dyncp-max-degree 5 exceeds the number of instances, 4"),
]


@pytest.mark.parametrize(("settings", "message"), CONTRADICTIONS, ids=str)
def test_flags_that_no_layout_can_keep_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DynCpConfig(**settings).resolve(4)
    assert re.search(message, str(find_layout_refusal(DynCpConfig(**settings), 4)))
    assert find_layout_refusal(DynCpConfig(node_size=2, num_nodes=2, max_degree=2), 8) is None


def test_more_shards_than_pages() -> None:
    with pytest.raises(ValueError, match="degree = 3 needs one page per shard.*2 pages of 16"):
        limits().check(32, {"custom_params": {"dyncp": {"degree": 3}}})


def test_max_degree_bounds_pins_and_length() -> None:
    bounded = limits(max_degree=2)
    with pytest.raises(ValueError, match="degree = 3 exceeds --dyncp-max-degree 2"):
        bounded.check(320, {"custom_params": {"dyncp": {"degree": 3}}})
    bounded.check(2 * POOL - 3 * PAGE, {"max_new_tokens": 1})
    with pytest.raises(RequestError, match="2 KV pools of 1024 tokens .*--dyncp-max-degree"):
        bounded.check(2 * POOL, {"max_new_tokens": 1})


BORDER = [(4064, 0, True), (4064, 15, True), (4064, 16, False), (4065, 0, False), (4081, 0, False)]


@pytest.mark.parametrize(("prompt", "new", "fits"), BORDER)
def test_border_of_the_capacity(prompt: int, new: int, fits: bool) -> None:
    """4 x 1024 tokens: the prompt takes whole pages, one more page and one token stay free."""
    if fits:
        limits().check(prompt, {"max_new_tokens": new})
        return
    with pytest.raises(RequestError, match=rf"\({prompt} tokens.*max_new_tokens \({new}\) exceed 4079 .*--max-total-tokens"):
        limits().check(prompt, {"max_new_tokens": new})


def test_output_without_a_bound_takes_what_is_left() -> None:
    limits().check(4064, {})
    limits().check(4064, {"max_new_tokens": None})
    request = describe_request(4000, None, {}, 4096, page_size=16, largest_degree=4)
    assert (request.max_new_tokens, request.expected_new_tokens) == (96, 96)
    assert describe_request(5000, None, {}, 4096, page_size=16, largest_degree=4).max_new_tokens == 0


def test_pinned_degree_must_hold_the_prompt() -> None:
    with pytest.raises(ValueError, match="1024.*degree"):
        limits().check(1500, {"custom_params": {"dyncp": {"degree": 1}}, "max_new_tokens": 4})
    limits().check(900, {"custom_params": {"dyncp": {"degree": 1}}, "max_new_tokens": 1500})


def test_whatever_passes_can_be_placed() -> None:
    """The router's process ends when its policy raises: whatever length and pin passes must not make it."""
    checker = limits(2)
    for prompt in range(1, 2 * POOL + 40, 7):
        for pin in ({}, {"degree": 1}, {"degree": 2}, {"degree": 2, "home": 1}, {"home": 0}):
            for new in (None, 0, 64, POOL):
                sampling = {"custom_params": {"dyncp": pin}, "max_new_tokens": new}
                try:
                    checker.check(prompt, sampling)
                except ValueError:
                    continue
                request = describe_request(prompt, new, pin, checker.reach_tokens, page_size=checker.page_size, largest_degree=2)
                assert request.prompt_tokens + request.max_new_tokens <= 2 * POOL


POOLS = [({}, 4), ({"policy": "local"}, 1), ({"policy": "fixed", "degree": 2}, 2), ({"max_degree": 3}, 3)]


@pytest.mark.parametrize(("config", "pools"), POOLS)
def test_pools_per_policy(config: dict[str, Any], pools: int) -> None:
    assert limits(**config).split_limits.max_degree == pools
    with pytest.raises(ValueError):
        limits(**config).check(pools * POOL, {})
    limits(**config).check(pools * POOL - 3 * PAGE, {})


def test_local_takes_no_pins() -> None:
    with pytest.raises(RequestError, match="no effect with --dyncp-policy local"):
        limits(policy="local").check(10, {"custom_params": {"dyncp": {"home": 1}}})


def test_pin_and_rank_exclude_each_other() -> None:
    with pytest.raises(RequestError, match="routed_dp_rank 1"):
        limits().check(10, {"custom_params": {"dyncp": {"home": 1}}}, routed_dp_rank=1)


@pytest.mark.parametrize("value", ["8", 2.5, True])
def test_max_new_tokens_must_be_an_integer(value: Any) -> None:
    with pytest.raises(RequestError, match="max_new_tokens must be an integer"):
        limits().check(10, {"max_new_tokens": value})


@pytest.mark.parametrize("name", REFUSED_OPTIONS)
def test_options_are_refused_by_name(name: str) -> None:
    with pytest.raises(RequestError, match=f"{name} does not work with --enable-dyncp"):
        check_options(SimpleNamespace(**{name: [None, "x"]}))


def test_options_that_are_not_set_pass() -> None:
    check_options(SimpleNamespace(**dict.fromkeys(REFUSED_OPTIONS)))
    lists = ("image_data", "video_data", "audio_data", "lora_path", "return_hidden_states", "multi_item_delimiter_indices")
    for empty in ([], [None, None]):
        check_options(SimpleNamespace(**dict.fromkeys(lists, empty)))
    for empty in (False, 0, [False]):
        check_options(SimpleNamespace(return_hidden_states=empty))
    check_options(SimpleNamespace(sampling_params=[{"n": 2}, {}]))


def test_options_that_sglang_ignores_pass() -> None:
    """Empty ones, and embeddings beside a prompt that has text or token ids."""
    check_options(SimpleNamespace(session_params={}, lora_path=""))
    embeddings = [[0.5, 0.25]]
    check_options(SimpleNamespace(input_ids=[5], input_embeds=embeddings))
    check_options(SimpleNamespace(text=["a", "b"], input_ids=None, input_embeds=embeddings))
    for prompt in ({}, {"text": None, "input_ids": None}):
        with pytest.raises(RequestError, match="input_embeds"):
            check_options(SimpleNamespace(input_embeds=embeddings, **prompt))


@pytest.mark.parametrize("value", [[0], [[0]], [[], [0, 0]], [[0.0]]])
def test_a_list_of_zeros_is_set(value: Any) -> None:
    for name in ("multi_item_delimiter_indices", "input_embeds"):
        with pytest.raises(RequestError, match=name):
            check_options(SimpleNamespace(**{name: value}))


@pytest.mark.parametrize("value", [False, 0, "", {}, [], [None]])
def test_whatever_sglang_acts_on_is_refused(value: Any) -> None:
    """It would use overrides of embeddings that are not null, and take any medium that is no list for one."""
    names = ["input_embeds", "positional_embed_overrides"]
    names += [] if isinstance(value, list) else ["image_data", "video_data", "audio_data"]
    for name in names:
        with pytest.raises(RequestError, match=name):
            check_options(SimpleNamespace(**{name: value}))


@pytest.mark.parametrize("priority", [-5, 0, 5])
def test_priority_is_ignored_as_by_a_server_without_priority_scheduling(priority: int) -> None:
    check_options(SimpleNamespace(priority=priority))


@pytest.mark.parametrize("sampling", [{"beam_width": 4}, [{}, {"beam_width": 2}]])
def test_beam_search_is_refused(sampling: Any) -> None:
    with pytest.raises(RequestError, match="beam_width"):
        check_options(SimpleNamespace(sampling_params=sampling))


def test_client_hints_lose_their_placement() -> None:
    from sglang.srt.managers.kv_hints import KvHintAction, KvHintsEnvelope

    def action(kind: str) -> KvHintAction:
        return KvHintAction(action_id=kind, action_type=kind, action_version="1", payload={"home": 1})

    envelope = KvHintsEnvelope(protocol_version="1", message_id="m", actions=[action(ACTION_TYPE), action("other")])
    assert [kept.action_type for kept in strip_hints(envelope).actions] == ["other"]
    assert strip_hints(None) is None


@pytest.mark.parametrize("policy", ["dual-balance", "local"])
@pytest.mark.parametrize("rank", [-1, 4, 99])
def test_a_named_rank_outside_the_cluster(policy: str, rank: int) -> None:
    with pytest.raises(RequestError, match=rf"routed_dp_rank must be an integer in 0\.\.3 .*got {rank}"):
        limits(policy=policy).check(100, {}, rank)


@pytest.mark.parametrize("rank", range(4))
def test_a_named_rank_reaches_as_far_as_the_cluster(rank: int) -> None:
    limits().check(3500, {"max_new_tokens": 100}, rank)
    with pytest.raises(RequestError, match="exceed 1007 tokens"):
        limits(policy="local").check(3500, {"max_new_tokens": 100}, rank)


def test_a_degree_that_is_meant_as_a_bound_is_that_of_a_short_prompt() -> None:
    """A client library can set one pin for all its requests."""
    checker = limits()
    short = {"custom_params": {"dyncp": {"degree": 2, "at_most": True}}}
    assert checker.check(PAGE - 1, short).degree == 1
    assert checker.check(2 * PAGE, short).degree == 2
    with pytest.raises(ValueError, match="1 pages"):
        checker.check(PAGE - 1, {"custom_params": {"dyncp": {"degree": 2}}})


@pytest.mark.parametrize(
    ("pin", "message"),
    [({"degree": 2, "at_most": 1}, "must be true or false, got 1"), ({"at_most": True}, "says how degree is meant, and there is none")],
)
def test_a_bound_that_makes_no_sense_is_refused(pin: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        limits().check(100, {"custom_params": {"dyncp": pin}})


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.5])
def test_what_guests_may_never_take_is_refused_at_the_door(fraction: float) -> None:
    """Admitted, it would wait on an empty cluster for ever, with pages promised to it."""
    checker = limits(4, max_guest_fraction=fraction)
    reach = POOL + 3 * int(POOL * fraction)
    checker.check(reach - 3 * PAGE, {"max_new_tokens": 1})
    with pytest.raises(RequestError, match=rf"exceed {reach - PAGE - 1} tokens.*--dyncp-max-guest-fraction {fraction}"):
        checker.check(reach, {"max_new_tokens": 1})
    bounded = limits(4, max_guest_fraction=fraction, max_degree=2)
    assert bounded.reach_tokens == POOL + int(POOL * fraction)


def test_every_door_asks_the_same_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang's own bounds on length (worker, output) follow the same reach."""
    config = DynCpConfig(max_guest_fraction=0.25, max_degree=3)
    monkeypatch.setenv(CONFIG_VARIABLE, config.to_json())
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: SimpleNamespace(num_dp_ranks=4))
    assert capacity.reach_tokens(POOL, PAGE) == limits(4, max_guest_fraction=0.25, max_degree=3).reach_tokens == POOL + 2 * POOL // 4
    worker = SimpleNamespace(model_runner=SimpleNamespace(page_size=PAGE), model_config=SimpleNamespace(context_len=10**6))
    raised = capacity.raise_worker_limits((POOL, 0, 0, 0, 1023, 1018, "rest"), worker)
    assert raised == (POOL, 0, 0, 0, 1535, 1530, "rest")
    monkeypatch.delenv(CONFIG_VARIABLE)
    assert capacity.reach_tokens(POOL, PAGE) == POOL


def test_a_decode_server_wants_the_address_of_a_prefill_server() -> None:
    whole = SimpleNamespace(bootstrap_host="10.0.0.1", bootstrap_room=0)
    check_address(whole, "decode", "mooncake")
    for mode, backend in (("null", "mooncake"), ("decode", "fake")):
        check_address(SimpleNamespace(), mode, backend)
    for name in ("bootstrap_host", "bootstrap_room"):
        with pytest.raises(RequestError, match=f"{name} is missing, and --disaggregation-mode is decode"):
            check_address(SimpleNamespace(**(vars(whole) | {name: None})), "decode", "mooncake")


@pytest.mark.parametrize("page", [2, 16, 64])
def test_what_is_too_long_is_cut_to_what_is_served(page: int, caplog: pytest.LogCaptureFixture) -> None:
    """--allow-auto-truncate. The longest prompt and output that pass are left as they are."""
    some = RequestLimits(DynCpConfig().resolve(4), 4, POOL, page)
    for prompt, asked in ((5000, None), (5000, 1), (4000, 500), (100, 5000), (some.most_tokens, 0)):
        sampling = {"temperature": 0.0} | ({} if asked is None else {"max_new_tokens": asked})
        given, ids = dict(sampling), [7] * prompt
        pages = -(-prompt // page)
        with pytest.raises(RequestError) if pages * page + (asked or 0) > some.most_tokens else nullcontext():
            some.check(prompt, sampling)
        cut = some.truncate(ids, sampling)
        some.check(len(ids), cut)
        assert sampling == given and cut.keys() == given.keys(), "others may share the parameters"
        assert len(ids) == min(prompt, some.most_tokens // page * page)
        again = list(ids)
        caplog.clear()
        assert some.truncate(again, cut) is cut and again == ids and not caplog.records


def test_a_cut_says_what_it_cut(caplog: pytest.LogCaptureFixture) -> None:
    limits().truncate([7] * 5000, {"max_new_tokens": 100})
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "--allow-auto-truncate: the input, 5000 tokens, is cut to 4064 (4 KV pools of 1024 tokens)"
    assert second.startswith("--allow-auto-truncate: max_new_tokens, 100, is cut to 15 (4 KV pools")
