"""When an instance looks at its pool: once in each time that it is idle."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dcp.upstream.pool import page_audit
from sglang_dcp.upstream.pool.page_audit import CHECK_VARIABLE, check_when_due, every_round_asked_for


@pytest.fixture
def audits(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.delenv(CHECK_VARIABLE, raising=False)
    seen: list[Any] = []
    monkeypatch.setattr(page_audit, "check_integrity", seen.append)
    return seen


def rounds(idle: list[bool]) -> Any:
    """A runtime whose scheduler is idle, or is not, in each of the rounds."""
    answers = iter(idle)
    return SimpleNamespace(
        scheduler=SimpleNamespace(is_fully_idle=lambda: next(answers)), idle_audited=False, audit_every_round=every_round_asked_for()
    )


def count(audits: list[Any], idle: list[bool]) -> int:
    runtime, before = rounds(idle), len(audits)
    for _ in idle:
        check_when_due(runtime)
    return len(audits) - before


def test_an_idle_instance_looks_once_however_long_others_run(audits: list[Any]) -> None:
    assert count(audits, [True] * 50) == 1
    assert count(audits, [False, True, True, False, False, True, True, True]) == 2
    assert count(audits, [False] * 5) == 0


def test_tests_have_every_round_looked_at(audits: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CHECK_VARIABLE, "1")
    assert count(audits, [True, False, True, True]) == 4


def test_a_failed_look_is_not_forgotten(audits: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(runtime: Any) -> None:
        raise AssertionError("page 3 has no owner")

    monkeypatch.setattr(page_audit, "check_integrity", fail)
    runtime = rounds([True])
    with pytest.raises(AssertionError, match="page 3"):
        check_when_due(runtime)
    assert not runtime.idle_audited
