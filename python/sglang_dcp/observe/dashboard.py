"""The load drawn for a terminal: a bar per instance, the balance of the last readings, degrees and the longest requests."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sglang_dcp.observe.tables import balance, degree_text, instance_name, printable, shards_text

BAR_WIDTH = 32
KEPT_READINGS = 60
TICKS = "▁▂▃▄▅▆▇█"
OWN, GUEST, RETAINED, FREE, HOMES = "blue", "dark_orange3", "green4", "grey50", "magenta"


class Dashboard:
    """Draws one load after the other; remembers the balance of the last KEPT_READINGS."""

    def __init__(self) -> None:
        self._kv: deque[float | None] = deque(maxlen=KEPT_READINGS)
        self._homes: deque[float | None] = deque(maxlen=KEPT_READINGS)

    def draw(self, load: Mapping[str, Any], most_requests: int) -> RenderableType:
        """load: the body of GET /dyncp/load."""
        instances = load["instances"]
        self._kv.append(balance([entry["kv_tokens"] for entry in instances]))
        self._homes.append(balance([entry["home_requests"] for entry in instances]))
        degrees = "  ".join(f"{degree}: {number}" for degree, number in load["degrees"].items()) or "-"
        return Group(
            _instances(instances),
            Text(),
            self._balance(),
            Text.assemble("degrees, and how many requests have them:  ", degrees),
            Text(),
            _requests(load["longest"][:most_requests]),
        )

    def _balance(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for name, values, style in (("KV tokens", self._kv, OWN), ("requests", self._homes, HOMES)):
            last = values[-1]
            table.add_row(
                "largest / mean", name, "-" if last is None else f"{last:.2f}", Text(sparkline(values), style=style, no_wrap=True)
            )
        return table


def sparkline(values: Sequence[float | None] | deque[float | None]) -> str:
    """One character per value: 1.00 is the lowest; the largest, or 2.00 if all are below, the highest. None: a blank."""
    top = max((value for value in values if value is not None), default=2.0)
    span = max(top, 2.0) - 1.0
    return "".join(" " if value is None else TICKS[round((value - 1.0) / span * (len(TICKS) - 1))] for value in values)


def bar(parts: Sequence[tuple[int, str]], total: int) -> Text:
    """A bar of BAR_WIDTH characters. parts: (tokens, style) of `total`. Ends are rounded, not lengths, so that parts add up; a part that is
    not zero gets a character while there is room."""
    text, done, before = Text(no_wrap=True), 0, 0
    for tokens, style in parts:
        done += tokens
        end = min(BAR_WIDTH, max(round(BAR_WIDTH * done / total) if total else 0, before + (tokens > 0)))
        text.append("█" * (end - before), style=style)
        before = end
    text.append("░" * (BAR_WIDTH - before), style=FREE)
    return text


def _instances(instances: Sequence[Mapping[str, Any]]) -> Table:
    legend = Text.assemble("KV: ", ("█ own ", OWN), ("█ guests ", GUEST), ("█ retained ", RETAINED), ("░ free", FREE))
    table = Table(box=None, pad_edge=False)
    table.add_column("instance", justify="right")
    table.add_column(legend, no_wrap=True)
    for name in ("tokens", "of pool", "guests", "home requests", "queue"):
        table.add_column(name, justify="right")
    for load in instances:
        guests, retained = load["guest_tokens"], load.get("retained_tokens", 0)
        own = max(0, load["kv_tokens"] - guests - retained)
        share = f"{100 * load['kv_tokens'] / load['pool_tokens']:.0f} %"
        drawn = bar([(own, OWN), (guests, GUEST), (retained, RETAINED)], load["pool_tokens"])
        counts = (f"{value:,}" for value in (guests, load["home_requests"], load["queued"]))
        table.add_row(instance_name(load), drawn, f"{load['kv_tokens']:,}", share, *counts)
    return table


def _requests(requests: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("longest requests", no_wrap=True, max_width=40)
    table.add_column("state", no_wrap=True)
    for name in ("prompt", "output", "home", "degree"):
        table.add_column(name, justify="right")
    table.add_column("shards (instance:tokens)")
    for entry in requests:
        lengths = (f"{entry[name]:,}" for name in ("prompt_tokens", "output_tokens"))
        where = (str(entry["home"]), degree_text(entry), shards_text(entry))
        # As Text: a string would be read as markup.
        table.add_row(Text(printable(entry["rid"])), entry["state"], *lengths, *where)
    return table
