"""`sglang-dcp top`: live view of the instances and of the requests under way."""

from __future__ import annotations

import argparse
import sys
import time

from sglang_dcp.observe.report_client import ReportError, add_server_arguments, client_of
from sglang_dcp.observe.tables import format_instances, format_requests

CLEAR_SCREEN = "\x1b[H\x1b[2J"
ENDED = ("finished", "aborted")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--interval", type=float, default=1.0, metavar="S", help="seconds between two readings (default 1)")
    parser.add_argument("--once", action="store_true", help="print one reading and end")
    parser.add_argument("--last", type=int, default=20, metavar="N", help="most requests to show (default 20)")
    add_server_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Until interrupted, or the server stops to answer (1)."""
    client = client_of(args)
    try:
        while True:
            report = client.read()
            live = [entry for entry in report["requests"] if entry["state"] not in ENDED]
            longest_first = sorted(live, key=lambda entry: -(entry["prompt_tokens"] + entry["output_tokens"]))
            text = f"{format_instances(report['instances'])}\n\n{format_requests(longest_first[: args.last])}"
            print(text if args.once else CLEAR_SCREEN + text, flush=True)
            if args.once:
                return 0
            time.sleep(args.interval)
    except ReportError as error:
        print(f"sglang-dcp top: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
