"""mkdocs hook: links that leave docs/ point into the repository. With SITE_SOURCE_URL they lead there, else they become plain text."""

from __future__ import annotations

import os
import re
from typing import Any

OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\((?:\.\./)+([^)\s]+)\)")


def on_page_markdown(markdown: str, **_arguments: Any) -> str:
    source = os.environ.get("SITE_SOURCE_URL", "").rstrip("/")
    if source:
        return OUTSIDE.sub(lambda link: f"[{link.group(1)}]({source}/{link.group(2)})", markdown)
    return OUTSIDE.sub(lambda link: f"`{link.group(2)}`" if "/" not in link.group(1) else f"`{link.group(1)}`", markdown)
