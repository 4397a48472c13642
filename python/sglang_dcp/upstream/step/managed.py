"""Which of SGLang's requests the ledger knows."""

from __future__ import annotations

from typing import Any


def is_managed(req: Any) -> bool:
    """Whether the pages of SGLang's request come from the ledger: `req.dyncp` is its HomeRequest."""
    return getattr(req, "dyncp", None) is not None
