"""docs/results/clients.md: what benchmark clients call time per token, beside the truth."""

from __future__ import annotations

import shlex
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from scripts.client_runs.clients import CLIENTS, Client, Load
from scripts.result_pages.markdown import load, notes, page, source, table

NOTES = (
    "`guidellm`: its TPOT is the whole latency over the tokens, the wait for the first included; its ITL is what others call TPOT.",
    "`sglang.bench_serving`, `evalscope`: ITL is the time between chunks, so it grows with the tokens of a chunk; TPOT does not.",
    "`inference-perf`: the tokens of a chunk count as arriving together, so the median of its ITL is 0 where chunks hold several. "
    "It ends without a complaint when it sends fewer requests than it was asked for.",
    "More than were asked for: one request to try the server came first.",
)


def render() -> str:
    result = load("clients.json")
    truth, clients = result["truth"], result["clients"]
    return page(
        "What clients call time per token",
        source("clients.json", result),
        f"A server that answers by the clock: first token after {truth['ttft_ms']:g} ms, then one every {truth['token_ms']:g} ms, "
        f"sent one or several to a chunk. Each client was asked for {truth['requests']} requests. Means in ms; `-`: no such figure.",
        table(
            ["client", "version", "tokens a chunk", "reached the server", "true", "its TPOT", "its ITL", "its ITL, P50"],
            _rows(clients, truth["token_ms"], truth["requests"]),
        ),
        "## Against a server of ours",
        "Two instances on the CPU, every request in two shards. Time per token as the server's metrics tell it, and the figure of the "
        "client that is the same thing.",
        table(
            ["client", "asked", "reached the server", "in two shards", "reported", "server, ms", "client, ms", "which figure"],
            _served(clients),
        ),
        "## Names in the reports",
        table(["client", "TPOT", "ITL"], [(name, f"`{client['tpot']}`", f"`{client['itl']}`") for name, client in clients.items()]),
        notes(NOTES),
        "## The commands",
        "`python scripts/clients.py` does all of this. One of them against a server of yours, in an environment of its own:",
        "\n\n".join(_command(client) for client in CLIENTS),
    )


def _command(client: Client) -> str:
    """As the script runs it, with names in place of its own address, model and folders."""
    load = Load("http://HOST:30000", "MODEL", Path("TOKENIZER"), num_requests=24, concurrency=2)
    with TemporaryDirectory() as folder:
        command = shlex.join(client.command(load, Path(folder), Path()))
        settings = "".join(f"OUT/{path.name}: `{path.read_text()}`" for path in Path(folder).iterdir())
    lines = [f"pip install {shlex.quote(client.package)}"] if client.package else []
    block = "\n".join([*lines, command])
    return f"<!-- by hand: needs a running server -->\n```bash\n{block}\n```\n\n{settings}".replace(folder, "OUT").strip()


def _rows(clients: dict[str, Any], true_ms: float, requests: int) -> list[tuple[Any, ...]]:
    rows = []
    for name, client in clients.items():
        for run in client["runs"]:
            figures = ("-" if run[key] is None else f"{run[key]:.1f}" for key in ("tpot_ms", "itl_ms", "itl_p50_ms"))
            rows.append((f"`{name}`", client["version"], run["tokens_per_chunk"], f"{run['sent']} of {requests}", f"{true_ms:g}", *figures))
    return rows


def _served(clients: dict[str, Any]) -> list[tuple[Any, ...]]:
    rows = []
    for name, client in clients.items():
        run, which = client["served"], client["compare"]
        told = run["server"]
        counts = (run["asked"], told["sent"], told["sharded"], round(run["completed"]))
        figure = client[which.removesuffix("_ms")]
        rows.append((f"`{name}`", *counts, f"{told['token_ms']:.1f}", f"{run[which]:.1f}", f"`{figure}`"))
    return rows
