"""SGLang plugin for tests: attention TP on a GPU is refused because it was not run there; the check that runs it lifts that refusal."""

from __future__ import annotations


def register() -> None:
    from sglang_dcp.upstream.attach import settings

    settings.find_slices_refusal = lambda values: None
