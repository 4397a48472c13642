"""`sglang-dcp top`: live view of the instances and of the longest requests under way."""

from __future__ import annotations

import argparse
import sys
import time

from rich.console import Console
from rich.live import Live

from sglang_dcp.cli.values import above_zero
from sglang_dcp.observe.dashboard import Dashboard
from sglang_dcp.observe.load import MOST_REQUESTS
from sglang_dcp.observe.report_client import ReportClient, ReportError, add_server_arguments, client_of
from sglang_dcp.observe.tables import format_instances, format_requests


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--interval", type=above_zero, default=1.0, metavar="S", help="seconds between two readings (default 1)")
    parser.add_argument("--once", action="store_true", help="print one reading and end")
    last = f"most requests to show (default and most: {MOST_REQUESTS})"
    parser.add_argument("--last", type=int, choices=range(MOST_REQUESTS + 1), default=MOST_REQUESTS, metavar="N", help=last)
    add_server_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Until interrupted, or the server stops to answer (1). Bars on a terminal; else plain lines, one reading after the other."""
    client, console = client_of(args), Console()
    try:
        if args.once or not console.is_terminal:
            print_readings(client, console, args)
        else:
            draw_readings(client, console, args)
    except ReportError as error:
        print(f"sglang-dcp top: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0
    return 0


def print_readings(client: ReportClient, console: Console, args: argparse.Namespace) -> None:
    while True:
        load = client.read_load()
        if console.is_terminal:
            console.print(Dashboard().draw(load, args.last))
        else:
            print(f"{format_instances(load['instances'])}\n\n{format_requests(load['longest'][: args.last])}", flush=True)
        if args.once:
            return
        time.sleep(args.interval)


def draw_readings(client: ReportClient, console: Console, args: argparse.Namespace) -> None:
    dashboard = Dashboard()
    drawn = dashboard.draw(client.read_load(), args.last)
    with Live(drawn, console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(args.interval)
            live.update(dashboard.draw(client.read_load(), args.last), refresh=True)
