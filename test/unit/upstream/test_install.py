"""Hooks beside those of other plugins: SGLang's registry applies the hooks of a target once, and leaves out in silence what comes later."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_dcp.upstream.attach import install as attach
from sglang_dcp.upstream.attach.hook import Hook

MODULE = "dyncp_hooked"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module to hook, and a registry and a list of installed hooks for this test alone."""
    made = ModuleType(MODULE)

    class Served:
        def method(self) -> list[str]:
            return ["stock"]

        @staticmethod
        def plain() -> list[str]:
            return ["stock"]

    made.Served = Served  # type: ignore[attr-defined]
    made.handler = lambda result, *args: [*result, "ours"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, MODULE, made)
    monkeypatch.setattr(HookRegistry, "_hooks", type(HookRegistry._hooks)(list))
    monkeypatch.setattr(HookRegistry, "_patched", set())
    monkeypatch.setattr(attach, "_installed", [])
    return made


def our_hook(target: str) -> Hook:
    return Hook(f"{MODULE}.Served.{target}", "after", "flags", f"{MODULE}:handler", "", "", "")


def theirs(result: list[str], *args: Any) -> list[str]:
    return [*result, "theirs"]


def call(module: ModuleType, target: str) -> list[str]:
    found: list[str] = getattr(module.Served(), target)()
    return found


@pytest.mark.parametrize("target", ["method", "plain"])
@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (("register", "apply", "install", "apply"), ["stock", "theirs", "ours"]),
        (("register", "install", "apply"), ["stock", "ours", "theirs"]),
        (("install", "register", "apply"), ["stock", "ours", "theirs"]),
        (("install", "apply", "register", "apply"), ["stock", "ours", "theirs"]),
    ],
)
def test_each_plugin_s_hook_is_called_once_whoever_comes_first(
    module: ModuleType, target: str, order: tuple[str, ...], expected: list[str]
) -> None:
    acts: dict[str, Any] = {
        "register": lambda: HookRegistry.register(f"{MODULE}.Served.{target}", theirs, HookType.AFTER),
        "apply": HookRegistry.apply_hooks,
        "install": lambda: attach.install([our_hook(target)]),
    }
    for act in order:
        acts[act]()
    assert call(module, target) == expected
    attach.verify_installed()


def test_a_set_that_comes_later_joins_one_that_is_there(module: ModuleType) -> None:
    module.second = lambda result, *args: [*result, "second"]  # type: ignore[attr-defined]
    attach.install([our_hook("method")])
    attach.install([Hook(f"{MODULE}.Served.method", "after", "dyncp", f"{MODULE}:second", "", "", "")])
    assert call(module, "method") == ["stock", "ours", "second"]
    attach.verify_installed()


@pytest.mark.parametrize("target", ["method", "plain"])
def test_a_hook_that_is_gone_is_named(module: ModuleType, target: str) -> None:
    attach.install([our_hook(target)])
    attach.verify_installed()
    setattr(module.Served, target, lambda *args: ["somebody else's"])
    with pytest.raises(attach.HookError, match=rf"hooks not in place, refusing to serve: {MODULE}.Served.{target}"):
        attach.verify_installed()
