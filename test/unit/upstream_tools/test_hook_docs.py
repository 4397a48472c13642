"""docs/upstream_hooks.md is what the hook records say."""

from __future__ import annotations

from scripts.generate_hook_docs import DOCUMENT, REPOSITORY, SETS, render
from sglang_dcp.upstream.attach.catalogue import all_hooks
from sglang_dcp.upstream.attach.hook import Hook

VERSION = (REPOSITORY / "UPSTREAM_VERSION").read_text().strip()


def test_the_document_equals_the_records() -> None:
    """Fails after a hook was changed, until `python scripts/generate_hook_docs.py` has run."""
    assert DOCUMENT.read_text() == render(all_hooks(), VERSION)


def test_every_hook_says_why_it_is_there_and_when_it_can_go() -> None:
    for hook in all_hooks():
        assert hook.why and hook.upstream and hook.remove_when, hook.target
        assert hook.hook_set in SETS, hook.target


def test_another_record_makes_another_document() -> None:
    hook = Hook("sglang.a.B.c", "after", "dyncp", "m:f", "because", "nothing", "never", ("x",))
    text = render((*all_hooks(), hook), VERSION)
    assert text != DOCUMENT.read_text()
    assert "| `sglang.a.B.c`, after | `m:f` | because | never |\n" in text
    assert f"{len(all_hooks()) + 1} touch points" in text
