"""The live page in a real browser, against a small server that a test can change, stop and start again."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
from playwright.sync_api import expect

from sglang_dcp.observe.live_page import live_page
from sglang_dcp.observe.report_client import LIVE_ROUTE, LOAD_ROUTE

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE_ID = '<img src=x onerror="document.title=1"><script>document.title=2</script>&amp;\u202e" onclick=x'


def instance(rank: int, kv: int, guests: int = 0, homes: int = 1, **more: Any) -> dict[str, Any]:
    return {"rank": rank, "pool_tokens": 1024, "kv_tokens": kv, "guest_tokens": guests, "home_requests": homes, "queued": 0} | more


def request(rid: str, *shards: tuple[int, int], **more: Any) -> dict[str, Any]:
    told = [{"rank": rank, "tokens": tokens} for rank, tokens in shards]
    lengths = {"prompt_tokens": sum(tokens for _, tokens in shards), "output_tokens": 1}
    degrees = {"degree_start": len(shards), "degree_end": len(shards)}
    return {"rid": rid, "state": "running", "home": shards[0][0] if shards else 0, "shards": told, **lengths, **degrees} | more


LOAD = {
    "instances": [instance(0, 768, 256, 3, queued=2), instance(1, 256, 0, 1, retained_tokens=64)],
    "degrees": {"1": 3, "2": 1},
    "longest": [request("long", (1, 192), (0, 256), degree_start=1), request("short", (0, 100))],
}


class LoadServer:
    """Serves the page and `load`; `status` other than 200 is answered instead; with `key`, the load needs it. `asked`: headers of the
    readings, names in lower case."""

    def __init__(self) -> None:
        self.load: Any = LOAD
        self.status, self.key, self.port = 200, None, 0
        self.asked: list[dict[str, str]] = []
        self.paths: list[str] = []
        self._server: ThreadingHTTPServer | None = None

    def start(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.paths.append(self.path)
                if self.path == LIVE_ROUTE:
                    self._answer(200, live_page().html, {"Content-Type": "text/html; charset=utf-8"} | live_page().headers)
                    return
                outer.asked.append({name.lower(): value for name, value in self.headers.items()})
                allowed = outer.key is None or self.headers.get("Authorization") == f"Bearer {outer.key}"
                status = outer.status if allowed else 401
                self._answer(status, json.dumps(outer.load if status == 200 else {}), {"Content-Type": "application/json"})

            def _answer(self, status: int, body: str, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_arguments: Any) -> None:
                return

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


@pytest.fixture
def server() -> Iterator[LoadServer]:
    made = LoadServer()
    made.start()
    yield made
    made.stop()


@pytest.fixture
def page(browser: Browser, server: LoadServer) -> Iterator[Page]:
    """The page, open. Fails where the browser's console has an error other than a request that failed."""
    context = browser.new_context()
    opened = context.new_page()
    errors: list[str] = []
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("console", lambda message: errors.append(message.text) if "Content Security Policy" in message.text else None)
    opened.goto(f"http://127.0.0.1:{server.port}{LIVE_ROUTE}")
    yield opened
    context.close()
    assert errors == []


def rows(page: Page, table: str) -> list[list[str]]:
    return page.eval_on_selector_all(f"#{table} tr", "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))")


def test_the_page_is_one_document_with_a_policy_that_fits() -> None:
    page = live_page()
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|\bsrc=|@import|url\(", page.html)
    for forbidden in ("innerHTML", "insertAdjacentHTML", "outerHTML", "document.write", "eval("):
        assert forbidden not in page.html
    policy = page.headers["Content-Security-Policy"]
    for tag in ("style", "script"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page.html, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_what_the_load_says_is_what_is_shown(page: Page) -> None:
    page.wait_for_selector("body[data-readings]")
    assert [cells[0:1] + cells[2:] for cells in rows(page, "instances")] == [
        ["0", "768", "75 %", "256", "3", "2"],
        ["1", "256", "25 %", "0", "1", "0"],
    ]
    widths = page.eval_on_selector_all("#instances .bar", "bars => bars.map(bar => [...bar.children].map(part => part.style.width))")
    assert widths == [["50%", "25%", "0%"], ["18.75%", "0%", "6.25%"]]
    assert [(cells[0], cells[2]) for cells in rows(page, "degrees")] == [("1", "3"), ("2", "1")]
    assert (page.inner_text("#balance-kv"), page.inner_text("#balance-homes")) == ("1.50", "1.50")
    assert page.inner_text(".axis").split("\n") == ["60 s ago", "bottom 1.00, top 2.00", "now"]
    long, short = rows(page, "longest")
    assert long[:6] == ["long", "running", "448", "1", "1", "1 → 2"]
    assert long[6].strip() == "1: 192, 0: 256"
    assert short[4:6] == ["0", "1"]
    colours = page.eval_on_selector_all("#longest .bar", "bars => bars.map(bar => [...bar.children].map(part => part.className))")
    assert colours == [["own", "guest"], ["own"]]


def test_the_balance_is_drawn_over_time_with_gaps_and_bounded(server: LoadServer, browser: Browser) -> None:
    """On a clock of the test's: five minutes are kept, and a time without figures is a gap."""
    context = browser.new_context()
    page = context.new_page()
    page.clock.install(time=1_000_000)
    page.clock.pause_at(1_000_001)
    page.goto(f"http://127.0.0.1:{server.port}{LIVE_ROUTE}")
    readings = page.locator("body")
    for number in range(1, 5):
        expect(readings).to_have_attribute("data-readings", str(number))
        page.clock.run_for(1000)
    expect(readings).to_have_attribute("data-readings", "5")
    path = page.locator("path.line-kv")
    assert re.fullmatch("M[^ML]*L[^ML]*L[^ML]*L[^ML]*L600.0 75.0", path.get_attribute("d") or ""), path.get_attribute("d")
    server.load = {"instances": [instance(0, 0, homes=0), instance(1, 0, homes=0)], "degrees": {}, "longest": []}
    page.clock.run_for(1000)
    expect(page.locator("#balance-kv")).to_have_text("-")
    server.load = LOAD
    page.clock.run_for(1000)
    expect(page.locator("#balance-kv")).to_have_text("1.50")
    assert (path.get_attribute("d") or "").count("M") == 2
    page.clock.fast_forward(400_000)
    expect(readings).to_have_attribute("data-readings", "8")
    assert path.get_attribute("d") == "M600.0 75.0", "what is older than five minutes is gone"
    context.close()


def test_an_idle_cluster_has_no_balance(server: LoadServer, page: Page) -> None:
    server.load = {"instances": [instance(0, 0, homes=0), instance(1, 0, homes=0)], "degrees": {}, "longest": []}
    expect(page.locator("#balance-kv")).to_have_text("-")
    assert (page.inner_text("#balance-homes"), rows(page, "degrees"), rows(page, "longest")) == ("-", [], [])


def test_a_clients_text_stays_text(server: LoadServer, page: Page) -> None:
    server.load = LOAD | {"longest": [request(HOSTILE_ID, (0, 10), state="<b>x</b>")]}
    expect(page.locator("#longest td.id").first).to_have_text(re.compile("^<img"))
    (cells,) = page.eval_on_selector_all("#longest tr", "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))")
    assert cells[:2] == [HOSTILE_ID, "<b>x</b>"]
    assert page.query_selector("#longest img, #longest script, #longest b") is None
    assert page.title() == "sglang_dcp, live"


def test_a_server_that_goes_and_comes_back(server: LoadServer, page: Page) -> None:
    page.wait_for_selector("body[data-readings]")
    server.stop()
    expect(page.locator("#status")).to_have_text(re.compile("^no answer since"))
    assert page.get_attribute("#figures", "class") == "lost"
    shown = rows(page, "instances")
    assert len(shown) == 2, "the last figures stay, marked as old"
    server.load = LOAD | {"instances": [instance(rank, 100) for rank in range(3)]}
    server.start()
    expect(page.locator("#instances tr")).to_have_count(3)
    assert page.inner_text("#status").startswith("live")
    assert page.get_attribute("#figures", "class") == ""


@pytest.mark.parametrize("status", [404, 503])
def test_an_answer_that_is_an_error_is_named(server: LoadServer, page: Page, status: int) -> None:
    page.wait_for_selector("body[data-readings]")
    server.status = status
    expect(page.locator("#status")).to_have_text(re.compile(rf"^no answer since .*\(HTTP {status}\)$"))


def test_a_key_travels_in_a_header_alone(server: LoadServer, page: Page) -> None:
    server.key = "secret-key"
    page.wait_for_selector("#key-form:not([hidden])")
    for wrong, note in (("wrong", "does not take"), ("k\u0113y", "no header can carry")):
        page.fill("#key", wrong)
        page.press("#key", "Enter")
        expect(page.locator("#key-note")).to_contain_text(note)
    page.fill("#key", " secret-key ")
    page.press("#key", "Enter")
    page.wait_for_selector("#key-form", state="hidden")
    assert server.asked[-1]["authorization"] == "Bearer secret-key"
    assert page.inner_text("#status").startswith("live")
    page.reload()
    page.wait_for_selector("body[data-readings]")
    assert not page.is_visible("#key-form"), "this tab keeps it"
    assert set(server.paths) == {LIVE_ROUTE, LOAD_ROUTE}, "nothing in addresses"
    assert "secret" not in page.url + page.content() + page.evaluate("document.cookie + JSON.stringify(localStorage)")
    assert page.evaluate("document.getElementById('key').value") == ""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_readable_in_both_schemes(page: Page, scheme: Any) -> None:
    """Text against its background: a contrast of 4.5, as WCAG asks for."""
    page.emulate_media(color_scheme=scheme)
    page.wait_for_selector("body[data-readings]")
    for selector in ("body", ".legend", "#instances td", "th", "footer", "#status"):
        colour, ground = page.eval_on_selector(
            selector, "e => [getComputedStyle(e).color, getComputedStyle(document.body).backgroundColor]"
        )
        assert contrast(colour, ground) >= 4.5, (selector, colour, ground)


def contrast(first: str, second: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_a_narrow_window_does_not_scroll_sideways(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.wait_for_selector("body[data-readings]")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
