"""The router's memory of prompts, and when it follows it."""

import random

from sglang_dcp.policy.cost_model import load_cost_model
from sglang_dcp.policy.prefix_map import MOST_HOMES, PrefixMap, home_by_prefix
from sglang_dcp.policy.types import InstanceLoad

COST = load_cost_model("deepseek-v3.h200", 8)


def loads(*kv_tokens):
    return [InstanceLoad(rank, 0, tokens, 1_000_000, home_requests=1) for rank, tokens in enumerate(kv_tokens)]


def test_the_longest_beginning_comes_first_and_a_branch_ends_where_it_branches():
    prompts = PrefixMap(block_tokens=4)
    prompts.put(prompts.digests(list(range(16))), home=0, number=1)
    prompts.put(prompts.digests([0, 1, 2, 3, 9, 9, 9, 9]), home=1, number=1)
    later = prompts.digests(list(range(14)) + [7] * 6)
    assert prompts.find(later, taken_in=[1, 1]) == ((0, 12), (1, 4))
    assert prompts.find(prompts.digests([5] + list(range(1, 16))), taken_in=[1, 1]) == ()
    assert prompts.find(prompts.digests([0, 1, 2]), taken_in=[1, 1]) == ()


def test_a_namespace_keeps_equal_tokens_apart():
    prompts = PrefixMap(block_tokens=4)
    prompts.put(prompts.digests(range(8), ("tenant", None)), home=0, number=1)
    assert prompts.find(prompts.digests(range(8), (None, "tenant")), [1]) == ()
    assert prompts.find(prompts.digests(range(8), ("tenant", None)), [1]) == ((0, 8),)


def test_a_placement_under_way_has_nothing_to_offer():
    prompts = PrefixMap(block_tokens=4)
    digests = prompts.digests(range(8))
    prompts.put(digests, home=1, number=5)
    assert prompts.find(digests, taken_in=[9, 4]) == ()
    assert prompts.find(digests, taken_in=[9, 5]) == ((1, 8),)


def test_what_was_used_longest_ago_is_forgotten_from_its_end():
    prompts = PrefixMap(block_tokens=4, most_entries=6)
    old, new = prompts.digests(range(16)), prompts.digests(range(100, 116))
    prompts.put(old, home=0, number=1)
    prompts.put(new, home=0, number=2)
    assert len(prompts) == 6
    assert prompts.find(new, [2]) == ((0, 16),)
    assert prompts.find(old, [2]) == ((0, 8),)


def test_a_prefix_of_everybody_names_the_last_homes_only():
    prompts = PrefixMap(block_tokens=4)
    digests = prompts.digests(range(4))
    for home in range(MOST_HOMES + 4):
        prompts.put(digests, home, number=1)
    found = prompts.find(digests, [1] * (MOST_HOMES + 4))
    assert [home for home, _ in found] == list(range(MOST_HOMES + 3, 3, -1))


def test_a_long_conversation_goes_back_to_its_home_and_a_short_common_beginning_does_not_draw_everybody():
    busy = loads(200_000, 100_000, 100_000, 100_000)
    assert home_by_prefix(((0, 99_000),), 100_000, 500, busy, COST) == 0
    assert home_by_prefix(((0, 1_024),), 100_000, 500, busy, COST) is None
    assert home_by_prefix((), 100_000, 500, busy, COST) is None


def test_the_nearer_prefix_wins_unless_its_home_is_loaded():
    assert home_by_prefix(((0, 90_000), (1, 50_000)), 100_000, 500, loads(0, 0), COST) == 0
    assert home_by_prefix(((0, 52_000), (1, 50_000)), 100_000, 2_000, loads(900_000, 0), COST) == 1


def test_a_home_without_room_is_left_for_one_that_has_it_and_not_to_wait_elsewhere():
    cached, prompt = ((0, 90_000),), 120_000
    assert home_by_prefix(cached, prompt, 500, loads(990_000, 800_000), COST) is None
    assert home_by_prefix(cached, prompt, 500, loads(990_000, 990_000), COST) == 0
    assert home_by_prefix(cached, prompt, 500, loads(960_000, 800_000), COST) == 0, "there is room for the rest"


def test_turns_of_many_conversations_over_random_homes_come_home():
    """Sticky homes without a report: every turn finds the home of its last one, however many conversations share a system prompt."""
    choose, prompts = random.Random(0), PrefixMap(block_tokens=16)
    system = list(range(64))
    texts = [system + [choose.randrange(1000) for _ in range(100)] for _ in range(40)]
    homes = [choose.randrange(8) for _ in texts]
    for number, (text, home) in enumerate(zip(texts, homes, strict=True), 1):
        prompts.put(prompts.digests(text), home, number)
    for text, home in zip(texts, homes, strict=True):
        longer = prompts.digests(text + [choose.randrange(1000) for _ in range(30)])
        assert prompts.find(longer, [40] * 8)[0] == (home, 160)
