"""Puts the hook sets in place and checks that they are."""

from __future__ import annotations

import inspect
import logging
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any

from sglang_dcp.upstream.attach.hook import Hook

logger = logging.getLogger(__name__)

_installed: list[Hook] = []


class HookError(RuntimeError):
    """A touch point on SGLang is missing or looks different; the message names it."""


def resolve_handler(hook: Hook) -> Callable[..., Any]:
    module, _, name = hook.handler.partition(":")
    return getattr(pkgutil.resolve_name(module), name)


def _parent_and_name(target: str) -> tuple[Any, str]:
    path, _, name = target.rpartition(".")
    return pkgutil.resolve_name(path), name


def find_problems(hooks: Iterable[Hook]) -> list[str]:
    """Compares targets with the installed SGLang. One line per problem."""
    problems = []
    for hook in hooks:
        try:
            parent, name = _parent_and_name(hook.target)
        except (ImportError, AttributeError) as error:
            problems.append(f"{hook.target}: gone ({error})")
            continue
        exists = hasattr(parent, name)
        if hook.kind == "add":
            if exists and getattr(getattr(parent, name), "dyncp_added", False) is False:
                problems.append(f"{hook.target}: upstream has it now; remove the hook ({hook.remove_when})")
            continue
        if not exists:
            problems.append(f"{hook.target}: gone")
            continue
        if hook.parameters:
            have = inspect.signature(inspect.unwrap(getattr(parent, name))).parameters
            missing = [p for p in hook.parameters if p not in have]
            if missing:
                problems.append(f"{hook.target}: parameter {', '.join(missing)} is gone; it has ({', '.join(have)})")
    return problems


def install(hooks: Iterable[Hook]) -> None:
    """Registers and applies `hooks` in this process. Raises HookError when a target is missing."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    pending = [hook for hook in hooks if hook not in _installed]
    problems = find_problems(pending)
    if problems:
        raise HookError("sglang_dcp cannot attach to this SGLang:\n  " + "\n  ".join(problems))
    for hook in pending:
        handler = resolve_handler(hook)
        if hook.kind == "register":
            handler()
        elif hook.kind == "add":
            parent, name = _parent_and_name(hook.target)
            handler.dyncp_added = True  # type: ignore[attr-defined]
            setattr(parent, name, handler)
        elif hook.kind == "refuse":
            # Not through the registry: it would search every module for copies of a method, which has none, for each of them.
            parent, name = _parent_and_name(hook.target)
            setattr(parent, name, handler(getattr(parent, name)))
        else:
            HookRegistry.register(hook.target, handler, HookType(hook.kind))
        _installed.append(hook)
    HookRegistry.apply_hooks()


def verify_installed() -> None:
    """Raises HookError unless every installed hook is in place (SGLang only logs a hook that failed)."""
    from sglang.srt.plugins.hook_registry import HookRegistry

    patched = HookRegistry._patched
    missing = [h.target for h in _installed if h.kind not in ("add", "register", "refuse") and h.target not in patched]
    if missing:
        raise HookError(f"hooks not in place, refusing to serve: {', '.join(missing)}")
