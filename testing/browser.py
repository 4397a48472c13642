"""A headless Chromium of Debian's, driven by Playwright."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from testing.debian import Program

if TYPE_CHECKING:
    from playwright.sync_api import Browser

CHROMIUM = ("chromium-headless-shell", "chromium-headless-shell")
"""Debian's package, and the executable in it."""


@contextmanager
def running_browser(program: Program) -> Iterator[Browser]:
    """While it runs, this thread has an event loop: no asyncio.run beside it."""
    from playwright.sync_api import sync_playwright

    # Chromium's own sandbox needs rights that a container does not give; it shows pages of this repository alone.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program.path, env=program.environment, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()
