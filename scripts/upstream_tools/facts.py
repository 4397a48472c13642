"""Counts inside an upstream body that our code depends on, so that a report can say which one changed."""

from __future__ import annotations

import ast
from collections.abc import Callable

DP_ATTENTION = "sglang.srt.managers.scheduler_components.dp_attn.MLPSyncBatchInfo"


def find_facts(target: str, node: ast.stmt) -> dict[str, str]:
    """The facts of `target`, by name; empty for most."""
    return {name: reader(node) for name, reader in FACTS.get(target, {}).items()}


def _num_list_items(node: ast.stmt) -> str:
    """Items of the longest list literal: the columns of a rank's row in the step's all-gather."""
    return str(max((len(inner.elts) for inner in ast.walk(node) if isinstance(inner, ast.List)), default=0))


def _returned_names(node: ast.stmt) -> str:
    """Last name of every element of the returned tuple, in order: our hook replaces elements by position."""
    returned = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Return) and isinstance(inner.value, ast.Tuple)]
    return ", ".join(ast.unparse(item).rpartition(".")[2] for item in returned[-1].elts) if returned else ""


FACTS: dict[str, dict[str, Callable[[ast.stmt], str]]] = {
    f"{DP_ATTENTION}._get_local_tensor": {"sync columns": _num_list_items},
    f"{DP_ATTENTION}._get_fallback_tensor": {"sync columns": _num_list_items},
    "sglang.srt.managers.tp_worker.TpModelWorker.get_worker_info": {"returned elements": _returned_names},
}
