"""One touch point on SGLang, as data. The records are in the modules beside this; catalogue.py has them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["before", "after", "around", "replace", "add", "register", "refuse"]
HookSet = Literal["flags", "cpu", "dyncp", "pd"]


@dataclass(frozen=True)
class Hook:
    """One touch point.

    target:      dotted path in sglang; for kind "register" the registry function that the handler calls.
    kind:        before, after, around, replace: as in sglang.srt.plugins.hook_registry. "add": sets an attribute that upstream lacks.
                 "refuse": replaces a method by handler(method), which raises when it is called.
                 "register": calls the handler once, which uses an official registry, or puts a value of ours in the target's place.
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
