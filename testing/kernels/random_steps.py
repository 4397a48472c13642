"""Random routings, hostile ones included."""

from __future__ import annotations

import random

from sgl_kernel_dcp import RowLine, StepMessage, TableShape

from sglang_dcp.dataflow.reference import route_tables

PATTERNS = ("mixed", "all_local", "all_everywhere", "one_home", "empty", "single_row", "full")


def random_routes(rng: random.Random, shape: TableShape, pattern: str) -> tuple[list[list[list[int]]], list[list[int]]]:
    """Routes and tails of a step within the capacities of `shape` (attention rows are kept within by dropping shards)."""
    n = shape.num_instances
    counts = [rng.randint(0, shape.max_home_rows) for _ in range(n)]
    if pattern == "empty":
        counts = [0] * n
    elif pattern == "single_row":
        counts = [0] * n
        counts[rng.randrange(n)] = 1
    elif pattern == "one_home":
        counts = [shape.max_home_rows if h == 0 else 0 for h in range(n)]
    elif pattern == "full":
        counts = [shape.max_home_rows] * n
    room = [shape.max_attention_rows] * n
    kv_room = [shape.max_kv_rows] * n
    routes: list[list[list[int]]] = []
    tails: list[list[int]] = []
    for home in range(n):
        home_routes, home_tails = [], []
        for _ in range(counts[home]):
            if pattern == "all_local":
                wanted = [home]
            elif pattern in ("all_everywhere", "one_home"):
                wanted = list(range(n))
            else:
                wanted = rng.sample(range(n), min(n, rng.choice([0, 1, 1, 1, 2, n])))
            shards = [s for s in sorted(wanted) if room[s] > 0]
            for shard in shards:
                room[shard] -= 1
            remote = [s for s in shards if s != home and kv_room[s] > 0]
            tail = rng.choice(remote) if remote and rng.random() < 0.5 else -1
            if tail >= 0:
                kv_room[tail] -= 1
            home_routes.append(shards)
            home_tails.append(tail)
        routes.append(home_routes)
        tails.append(home_tails)
    return routes, tails


def random_messages(rng: random.Random, shape: TableShape, num_entries: int, num_slots: int, pattern: str) -> list[StepMessage]:
    """One message per instance. Entries and slots of an instance are distinct; some rows are empty."""
    routes, tails = random_routes(rng, shape, pattern)
    messages = []
    for rank in range(shape.num_instances):
        tables = route_tables(routes, tails, rank)
        arriving = set(tables.kv_receive)
        entries = rng.sample(range(num_entries), len(tables.attention))
        slots = rng.sample(range(num_slots), len(tables.attention))
        pages_left = shape.max_pages
        lines = []
        for entry, slot, row in zip(entries, slots, tables.attention, strict=True):
            limit = min(shape.max_pages_per_row, pages_left) * shape.page_size
            tokens = rng.choice([0, 1, rng.randint(0, limit), shape.page_size]) if limit else 0
            tokens = min(tokens, limit)
            pages_left -= -(-tokens // shape.page_size)
            new_page = rng.randrange(1 << 20) if tokens and rng.random() < 0.3 else -1
            lines.append(RowLine(entry, tokens, new_page, slot if row in arriving else -1))
        messages.append(StepMessage(routes, tails, lines))
    return messages


def without_lone_rows(message: StepMessage, rank: int) -> StepMessage:
    """The same step for instance `rank`, less the rows that another home attends alone."""
    routes, tails = [], []
    for home, (home_routes, home_tails) in enumerate(zip(message.routes, message.tails, strict=True)):
        kept = [m for m, shards in enumerate(home_routes) if home == rank or shards != [home]]
        routes.append([home_routes[m] for m in kept])
        tails.append([home_tails[m] for m in kept])
    return StepMessage(routes, tails, message.rows)
