"""Several tokenizer workers: each process checks its requests, with the limits that the main process has learned."""

from __future__ import annotations

import os

APP_VARIABLE = "SGLANG_HTTP_SERVER_APP_PATH"
"""SGLang's name for the application that tokenizer workers import."""
WORKER_APP = "sglang_dcp.upstream.front.worker_app:app"
POOL_KEY = "dyncp_pool_tokens"
"""Tokens of the smallest pool, among what SGLang hands from the main process to its workers: the answer of scheduler 0."""


def select_worker_app(enabled: bool) -> None:
    """Workers that start from now on import our application, unless the user chose one (find_app_refusal)."""
    if enabled:
        os.environ.setdefault(APP_VARIABLE, WORKER_APP)
    elif os.environ.get(APP_VARIABLE) == WORKER_APP:
        del os.environ[APP_VARIABLE]


def find_app_refusal(workers: int, app: str | None, reason: str) -> str | None:
    """The message for an application of the user's, which would serve without our checks, or None. app: the variable's value."""
    if workers == 1 or app == WORKER_APP:
        return None
    return f"{APP_VARIABLE}={app} does not work with --enable-dyncp and --tokenizer-worker-num {workers}: {reason}"
