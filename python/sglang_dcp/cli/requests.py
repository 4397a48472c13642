"""`sglang-dcp requests [ID]`: where requests live or lived: home, shards and degree."""

from __future__ import annotations

import argparse
import json
import sys

from sglang_dcp.cli.values import at_least
from sglang_dcp.observe.report_client import ReportError, add_server_arguments, client_of
from sglang_dcp.observe.tables import format_requests


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("id", nargs="?", help="id of the answer (OpenAI's `id`, /generate's meta_info.id); without it the last requests")
    parser.add_argument(
        "--last", type=at_least(1), default=20, metavar="N", help="without an id: how many (default 20, the server keeps 1000)"
    )
    parser.add_argument("--json", action="store_true", help="machine-readable")
    add_server_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """0 when there is something to show, 1 when the server does not answer or does not know the id."""
    try:
        requests = client_of(args).read(args.id)["requests"]
    except ReportError as error:
        print(f"sglang-dcp requests: {error}", file=sys.stderr)
        return 1
    if args.id is None:
        requests = requests[: args.last]
    elif not requests:
        print(f"sglang-dcp requests: {args.id!r} is not among the last 1000 requests", file=sys.stderr)
        return 1
    print(json.dumps(requests, indent=1) if args.json else format_requests(requests))
    return 0
