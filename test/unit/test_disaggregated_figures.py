"""The benchmark behind prefill servers without a server: what its check says of answers that are not one pool's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmark.serving.disaggregated import STOCK, TOLERANCE, WITH, as_report, figures, find_faults
from testing.client import Answer, Token
from testing.comparison import TIE_GAP

SURE, NEAR = 100 * TIE_GAP, TIE_GAP / 2


def answer_of(*tokens: Token) -> Answer:
    """To a prompt of two pages and a token."""
    return Answer("", tuple(token.id for token in tokens), {"prompt_tokens": 33}, output_tokens=tokens)


REFERENCE = answer_of(Token(5, -0.25, SURE), Token(6, -0.5, SURE), Token(7, -0.7, NEAR), Token(8, -0.1, SURE))


def faults_of(answer: Answer, *, pages: float = 3, prefill: str = WITH, degree: int = 4) -> list[str]:
    found = figures([REFERENCE], [answer], pages)
    return find_faults({"model": "m", "prefill": prefill, "degrees": {str(degree): found}})


def with_token(place: int, **changes: Any) -> Answer:
    tokens = list(REFERENCE.output_tokens)
    tokens[place] = replace(tokens[place], **changes)
    return answer_of(*tokens)


def test_equal_answers_and_those_that_part_at_a_tie_have_no_fault() -> None:
    assert faults_of(REFERENCE) == [] == faults_of(with_token(1, logprob=-0.5 + TOLERANCE / 2))
    assert faults_of(with_token(2, id=9, logprob=-0.6)) == [] == faults_of(with_token(3, id=9))


def test_another_token_a_distance_or_a_missing_token_is_one() -> None:
    (other,) = faults_of(with_token(0, id=9))[:1]
    assert "degree 4" in other and "stock 5, ours 9" in other
    (far,) = faults_of(with_token(1, logprob=-0.5 + 2 * TOLERANCE))
    assert "2 tokens that can differ" in far and str(TOLERANCE) in far
    assert "no number" in faults_of(with_token(1, logprob=float("nan")))[0]
    assert faults_of(answer_of(REFERENCE.output_tokens[0]))


def test_tokens_that_the_model_is_sure_of_show_nothing() -> None:
    sure = answer_of(Token(5, 0.0, SURE), Token(6, -0.0, SURE))
    (fault,) = find_faults({"model": "m", "prefill": WITH, "degrees": {"4": figures([sure], [sure], 3)}})
    assert "0 tokens that can differ" in fault


def test_pages_are_sent_once_by_this_package_and_to_each_shard_by_stock() -> None:
    assert faults_of(REFERENCE, pages=12, prefill=STOCK) == []
    assert faults_of(REFERENCE, pages=12) == ["m, prefill server with this package, degree 4: 4.0 copies sent, not 1"]
    assert faults_of(REFERENCE, pages=3, prefill=STOCK) == ["m, prefill server stock, degree 4: 1.0 copies sent, not 4"]
    assert faults_of(REFERENCE, pages=2)


def test_a_model_is_asked_again_without_the_others() -> None:
    def report(model: str, commit: str, earlier: dict[str, Any] | None = None) -> dict[str, Any]:
        return as_report({"command": f"ask {model}", "commit": commit, "machine": "m"}, [{"model": model, "of": commit}], earlier)

    both = report("b", "2", report("a", "1"))
    assert both["cases"] == [{"model": "a", "of": "1"}, {"model": "b", "of": "2"}]
    assert (both["command"], both["commit"], both["machine"]) == ("ask a; ask b", "1; 2", "m")
    assert report("b", "3", report("b", "2"))["commit"] == "3"
