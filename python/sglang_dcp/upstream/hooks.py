"""Every touch point on SGLang, as data. `docs/upstream_hooks.md` is generated from here.

`sglang_dcp.upstream.install` turns these records into patches and refuses to serve when one is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["before", "after", "around", "replace", "add", "register"]
HookSet = Literal["flags", "cpu", "dyncp"]


@dataclass(frozen=True)
class Hook:
    """One touch point.

    target:      dotted path in sglang; for kind "register" the registry function that the handler calls.
    kind:        before, after, around, replace: as in sglang.srt.plugins.hook_registry. "add": sets an attribute that upstream lacks.
                 "register": calls the handler once, which uses an official registry.
    handler:     "module:function" of ours, imported when the set is installed.
    why:         what it is for. upstream: what would replace it there. remove_when: the observable that makes it unneeded.
    parameters:  names of the target's parameters that the handler relies on; checked at start.
    """

    target: str
    kind: Kind
    hook_set: HookSet
    handler: str
    why: str
    upstream: str
    remove_when: str
    parameters: tuple[str, ...] = ()


_NO_FLAG_SEAM = "a seam for plugin flags"

FLAGS_HOOKS: tuple[Hook, ...] = (
    Hook(
        target="sglang.srt.server_args.ServerArgs.add_cli_args",
        kind="after",
        hook_set="flags",
        handler="sglang_dcp.upstream.server_args:add_flags",
        why="SGLang's own command line takes --enable-dyncp and --dyncp-*",
        upstream=_NO_FLAG_SEAM,
        remove_when="plugins can declare flags",
        parameters=("parser",),
    ),
    Hook(
        target="sglang.srt.server_args.ServerArgs.from_cli_args",
        kind="after",
        hook_set="flags",
        handler="sglang_dcp.upstream.server_args:read_flags",
        why="parsed flags reach every process, and switch the dyncp set on",
        upstream=_NO_FLAG_SEAM,
        remove_when="plugins can declare flags",
        parameters=("args",),
    ),
)

DYNCP_HOOKS: tuple[Hook, ...] = ()


def all_hooks() -> tuple[Hook, ...]:
    """Every touch point of every set."""
    from sglang_dcp.cpu.hooks import CPU_HOOKS

    return FLAGS_HOOKS + CPU_HOOKS + DYNCP_HOOKS


def check_targets() -> list[str]:
    """Problems with the targets in the installed SGLang: one line each, empty when all resolve."""
    from sglang_dcp.upstream.install import find_problems

    return find_problems(all_hooks())
