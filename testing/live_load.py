"""What a server says of its instances and their longest requests at this moment."""

from __future__ import annotations

from typing import Any

from sglang_dcp.observe.report_client import LOAD_ROUTE
from testing.client import Client


def loads(client: Client) -> list[dict[str, Any]]:
    """Of all instances, by rank."""
    return list(client.json("GET", LOAD_ROUTE)["instances"])


def states(client: Client) -> list[tuple[str, str]]:
    """(rid, state) of the longest requests: "waiting" for pages, "arriving" with their K/V, "running", or "sits out"."""
    return [(entry["rid"], entry["state"]) for entry in client.json("GET", LOAD_ROUTE)["longest"]]
