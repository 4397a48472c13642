"""The live page as one document: `live/page.html` with its style and script in place, and the headers that go with it."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True)
class LivePage:
    """html: the document; it holds no data. headers: of the HTTP answer."""

    html: str
    headers: dict[str, str]


@cache
def live_page() -> LivePage:
    """The page. Its policy lets a browser run this style and this script, and ask this server; nothing else."""
    folder = resources.files("sglang_dcp.observe") / "live"
    page, style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.html", "style.css", "page.js"))
    html = page.replace("/*STYLE*/", style).replace("/*SCRIPT*/", script)
    policy = (
        f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-store",
    }
    return LivePage(html, headers)


def _source(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
