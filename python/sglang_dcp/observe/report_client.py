"""Reads the report of a running server over HTTP. Standard library only."""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from typing import Any

ROUTE = "/dyncp/requests"
LOAD_ROUTE = "/dyncp/load"
LIVE_ROUTE = "/dyncp/live"
META_KEY = "dyncp"
"""Where a request lived, in its answer's meta_info."""
REPORT_RID = "dyncp/report"
LOAD_RID = "dyncp/load"
"""Mark the control requests that ask the schedulers for report and load: SGLang's GetInternalStateReq has no other free field."""
DEFAULT_PORT = 30000
HINTS = {
    404: "was the server started with --enable-dyncp?",
    401: "--api-key: the server's --admin-api-key, or its --api-key where there is none",
}


class ReportError(RuntimeError):
    """No report; the message says from where and why."""


@dataclass(frozen=True)
class ReportClient:
    """url: of the server, without a path. api_key: the server's --admin-api-key, or its --api-key where there is none."""

    url: str
    api_key: str | None = None
    timeout_s: float = 30.0

    def read(self, request_id: str | None = None) -> dict[str, Any]:
        """{"instances": [...], "requests": [...]}; only the requests named `request_id` when given. Raises ReportError."""
        return self._get(ROUTE + ("" if request_id is None else "?" + urllib.parse.urlencode({"rid": request_id})))

    def read_load(self) -> dict[str, Any]:
        """{"instances": [...], "degrees": {...}, "longest": [...]}. Raises ReportError."""
        return self._get(LOAD_ROUTE)

    def _get(self, path: str) -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        try:
            request = urllib.request.Request(self.url.rstrip("/") + path, headers=headers)
            with urllib.request.urlopen(request, timeout=self.timeout_s) as response:
                return dict(json.load(response))
        except urllib.error.HTTPError as error:
            hint = HINTS.get(error.code, "")
            raise ReportError(f"{self.url}{path} answered {error.code} {error.reason}; {hint}".rstrip("; ")) from error
        except (urllib.error.URLError, OSError, ValueError) as error:
            raise ReportError(f"{self.url} gives no report: {error} (--port, --url)") from error


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help=f"port of a server on this machine (default {DEFAULT_PORT})")
    parser.add_argument("--url", help="address of the server, instead of --port: http://HOST:PORT")
    parser.add_argument("--api-key", help="the server's --admin-api-key, or its --api-key where there is none")


def client_of(args: argparse.Namespace) -> ReportClient:
    return ReportClient(args.url or f"http://127.0.0.1:{args.port}", args.api_key)
