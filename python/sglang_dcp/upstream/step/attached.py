"""The instance of this process, where it has one: hooks ask here, in one decorator, whether it does.

A handler gets the `Runtime` first. Before the scheduler is built, and in processes that have none, SGLang's own function runs as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from sglang_dcp.upstream.step.runtime import Runtime

Handler = Callable[..., Any]

_runtime: Runtime | None = None


def attach(runtime: Runtime | None) -> None:
    """None: this process has no instance (any more)."""
    global _runtime
    _runtime = runtime


def current() -> Runtime | None:
    """None before the scheduler is built, and in processes that have none."""
    return _runtime


def driver_method(name: str) -> Handler:
    """A hook of kind "after" whose handler is a method of the StepDriver. It gets SGLang's result, which stands where it answers None."""

    def hook(result: Any, *args: Any, **kwargs: Any) -> Any:
        return result if _runtime is None else getattr(_runtime.driver, name)(result)

    return hook


def around(handler: Handler) -> Handler:
    """For a hook of kind "around": handler(runtime, original, *args)."""

    @functools.wraps(handler)
    def hook(original: Handler, *args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs) if _runtime is None else handler(_runtime, original, *args, **kwargs)

    return hook


def before(handler: Handler) -> Handler:
    """For a hook of kind "before": handler(runtime, *args). SGLang goes on with the same arguments."""

    @functools.wraps(handler)
    def hook(*args: Any, **kwargs: Any) -> None:
        if _runtime is not None:
            handler(_runtime, *args, **kwargs)

    return hook


def after(handler: Handler) -> Handler:
    """For a hook of kind "after": handler(runtime, result, *args). Where it answers None, SGLang's result stands."""

    @functools.wraps(handler)
    def hook(result: Any, *args: Any, **kwargs: Any) -> Any:
        return result if _runtime is None else handler(_runtime, result, *args, **kwargs)

    return hook
