"""meta_info.dyncp: from the scheduler's output to the answer of the main process."""

from __future__ import annotations

from typing import Any

from sglang_dcp.upstream.front.result import add_meta_info


def stock(manager: None, meta_info: dict[str, Any], state: None, customized_info: dict[str, Any], index: int, reason: Any) -> None:
    for key, values in customized_info.items():
        meta_info.setdefault(key, []).extend(values[index])


def test_our_value_is_an_object_and_the_others_stay() -> None:
    where = {"home": 1}
    info = {"dyncp": [[where], []], "other": [[1], [2]]}
    first: dict[str, Any] = {}
    second: dict[str, Any] = {}
    add_meta_info(stock, None, first, None, info, 0, None)
    add_meta_info(stock, None, second, None, info, 1, None)
    assert first == {"dyncp": where, "other": [1]}
    assert second == {"other": [2]}
    assert list(info) == ["dyncp", "other"], "the message of the whole batch is not changed"


def test_without_ours_the_stock_call_is_untouched() -> None:
    meta: dict[str, Any] = {}
    add_meta_info(stock, None, meta, None, {"other": [[1]]}, 0, None)
    assert meta == {"other": [1]}
