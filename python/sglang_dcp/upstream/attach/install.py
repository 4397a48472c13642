"""Puts the hook sets in place and checks that they are."""

from __future__ import annotations

import inspect
import logging
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
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
    """Puts `hooks` in place in this process, around what other plugins' have made of their targets. HookError when a target is missing.

    Not by HookRegistry.register and apply_hooks: these apply the hooks of a target once in a process, and leave out in silence what is
    registered for it later. So a plugin that came first would displace ours, and ours would displace one that comes after.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookSource, HookType

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
            parent, name = _parent_and_name(hook.target)
            setattr(parent, name, handler(getattr(parent, name)))
        elif isinstance((place := _parent_and_name(hook.target))[0], type):
            _wrap_method(*place, hook.kind, handler)
        else:
            HookRegistry._apply_target(hook.target, [(HookType(hook.kind), handler, HookSource("sglang_dcp", "sglang-dcp"))])
        _installed.append(hook)


def _wrap_method(parent: type, name: str, kind: str, handler: Callable[..., Any]) -> None:
    """As the registry wraps it, but for its search of every module for copies of the function: a method has none, and to search for each
    of ours takes a process three seconds."""
    from sglang.srt.plugins.hook_registry import HookType, _wrap_fn

    held = vars(parent).get(name)
    if isinstance(held, (classmethod, staticmethod)):
        setattr(parent, name, type(held)(_wrap_fn(held.__func__, handler, HookType(kind))))
    else:
        setattr(parent, name, _wrap_fn(getattr(parent, name), handler, HookType(kind)))


def in_place() -> set[str]:
    """Targets that are wrapped by ours in this process."""
    return {hook.target for hook in _wrappers()}


def verify_installed() -> None:
    """Raises HookError unless every installed hook is in place (SGLang only logs a hook that failed)."""
    missing = [hook.target for hook in _wrappers() if not is_in_place(hook)]
    if missing:
        raise HookError(f"hooks not in place, refusing to serve: {', '.join(missing)}")


def _wrappers() -> list[Hook]:
    return [hook for hook in _installed if hook.kind not in ("add", "register", "refuse")]


def is_in_place(hook: Hook) -> bool:
    """Whether a call of the hook's target comes to its handler, as far as the wrappers of SGLang's registry tell."""
    handler = resolve_handler(hook)
    layer = inspect.getattr_static(*_parent_and_name(hook.target))
    layer = getattr(layer, "__func__", layer)  # of a static or class method
    while layer is not None:
        if layer is handler or any(value is handler for value in _held_by(layer)):
            return True
        layer = getattr(layer, "__wrapped__", None)
    return False


def _held_by(function: Any) -> Iterator[Any]:
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # an empty cell
            yield cell.cell_contents
