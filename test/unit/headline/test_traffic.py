"""What is sent: the same for all contenders, and with a history the requests that would still run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from benchmark.headline.client import Arrival, request_body
from benchmark.headline.traffic import MOST_RATE, WEKA, arrivals, parse_mix, workload
from benchmark.headline.weka import OUTPUTS, PROMPTS, SHARES, weka_lengths

MS, SECONDS, MOST = 20.0, 30.0, 4096


def with_history(mix: float | str = 0.05, rate: float = 8.0, seed: int = 1, longest: int = 400_000) -> list[Arrival]:
    return arrivals(mix, rate, SECONDS, seed, longest, MOST, MS)


def test_equal_arguments_bring_equal_arrivals_in_order() -> None:
    for mix in (0.05, WEKA):
        found = with_history(mix)
        assert found == with_history(mix) and found != with_history(mix, seed=2)
        assert [one.at_s for one in found] == sorted(one.at_s for one in found)
        assert found[0].at_s >= 0 and found[-1].at_s < SECONDS


def test_no_history_is_as_ever() -> None:
    found = arrivals(0.03, 4.0, SECONDS, 1, 50_000)
    rows = workload(0.03, 50_000).requests(4.0, SECONDS, 1)
    assert found == [Arrival(at, prompt, max(2, output)) for at, prompt, output in rows] and not any(one.begun for one in found)


def test_nobody_is_lost_who_would_still_run() -> None:
    """Counted apart from the module: every drawn request has ended before 0, has begun, or comes within the window."""
    history_s = MOST * MS / 1000
    rows = workload(0.05, 400_000).requests(MOST_RATE, 3 * (history_s + SECONDS), 1)
    marks = np.random.default_rng((1, 9)).random(len(rows))
    still, new = [], []
    for (at, prompt, output), mark in zip(rows, marks, strict=True):
        at -= history_s
        if mark >= 8.0 / MOST_RATE:
            continue
        generated = int(-at * 1000 / MS)
        if at < 0 and generated < max(2, output):
            still.append((prompt + generated, max(2, output - generated)))
        if 0 <= at < SECONDS:
            new.append((at, prompt, max(2, output)))
    found = with_history()
    assert sorted((one.prompt_tokens, one.output_tokens) for one in found if one.begun) == sorted(still) and len(still) > 50
    assert [(one.at_s, one.prompt_tokens, one.output_tokens) for one in found if not one.begun] == new and len(new) > 200


def test_a_higher_rate_has_all_requests_of_a_lower_one_at_the_same_times() -> None:
    for mix in (0.05, WEKA):
        counts = []
        for rate in (2.0, 4.0, 8.0):
            low, high = with_history(mix, rate), with_history(mix, 2 * rate)
            lower, higher = ({(one.at_s * (not one.begun), one.prompt_tokens, one.output_tokens) for one in some} for some in (low, high))
            assert lower < higher
            counts.append(sum(not one.begun for one in low) / rate / SECONDS)
        assert counts == pytest.approx([1.0] * 3, abs=0.25), "and about as many as it says"
    for wrong in (0.0, MOST_RATE + 1):
        with pytest.raises(ValueError, match="requests/s with a history"):
            with_history(rate=wrong)


def test_the_begun_come_evenly_in_the_first_second_the_long_ones_too() -> None:
    begun = [one for one in with_history(0.05, 12.0) if one.begun]
    for some in (begun, [one for one in begun if one.prompt_tokens > 20_000]):
        times = [one.at_s for one in some]
        assert len(times) >= 5 and max(times) < 1.0
        assert sum(at < 0.5 for at in times) == pytest.approx(len(times) / 2, abs=1.5)
    assert min(one.output_tokens for one in begun) >= 2 and max(one.output_tokens for one in begun) <= MOST


def test_arrivals_go_on_until_the_end_of_the_window() -> None:
    """A number of exponential gaps may end seconds before it."""
    for seed in range(1, 30):
        assert with_history(0.0, 4.0, seed)[-1].at_s > SECONDS - 3


def test_weka_lengths_follow_their_table_and_its_cap() -> None:
    rows = weka_lengths(400_000).requests(100.0, 200.0, 1)
    prompts, outputs = sorted(row[1] for row in rows), sorted(row[2] for row in rows)
    for share, prompt, output in list(zip(SHARES, PROMPTS, OUTPUTS, strict=True))[2:9]:
        assert prompts[int(share * len(rows))] == pytest.approx(min(prompt, 400_000), rel=0.1)
        assert outputs[int(share * len(rows))] == pytest.approx(output, rel=0.1)
    assert prompts[-1] == 400_000 and prompts[0] >= PROMPTS[0] and outputs[0] >= 1
    assert rows[:100] == weka_lengths(400_000).requests(100.0, 1.0, 1) and len(SHARES) + len(PROMPTS) + len(OUTPUTS) <= 40
    assert parse_mix(WEKA) == WEKA


def test_a_request_has_its_own_fields_and_the_contenders() -> None:
    pin = {"custom_params": {"dyncp": {"degree": 1}}}
    body = json.loads(request_body(Arrival(0.0, 300, 7), 5, {"bootstrap_host": "x", "sampling_params": pin}))
    assert len(body["input_ids"]) == 300 and set(body["input_ids"]) <= set(range(256)) and body["stream"] is True
    assert body["bootstrap_host"] == "x" and body["sampling_params"] == {"temperature": 0, "max_new_tokens": 7, "ignore_eos": True, **pin}
    by_length = [json.loads(request_body(Arrival(0.0, n, 7), 5, lambda tokens: {"long": tokens > 5})) for n in (5, 6)]
    assert [body["long"] for body in by_length] == [False, True]
    assert request_body(Arrival(0.0, 9, 7), 5, {}) == request_body(Arrival(0.0, 9, 7), 5, {}) != request_body(Arrival(0.0, 9, 7), 6, {})
