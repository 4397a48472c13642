"""Tables of steps whose rows mostly stay: rows moved as stretches give what looking at every one of them gives."""

from __future__ import annotations

import random
from typing import Any

import pytest

from sglang_dcp.dataflow.graph.static_tables import PageLines, RowsInput
from sglang_dcp.dataflow.graph.table_rows import ListedRow, PooledRow, TableRows
from sglang_dcp.ledger.kept_runs import kept_runs, narrowed

PAGE_SIZE, WIDTH = 4, 40


class Requests:
    """Attention rows of an instance: guests first, own ones behind. Requests leave, join, sit out, move their tail; names come again."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.next_name = self.next_page = 0
        self.guests: list[dict[str, Any]] = []
        self.own: list[dict[str, Any]] = []
        self.parked: list[dict[str, Any]] = []
        self.free_names: list[int] = []

    def join(self) -> None:
        rng, kind = self.rng, self.rng.choice(["guest", "listed", "pooled", "pooled"])
        self.next_name += 1
        name = self.free_names.pop() if kind == "pooled" and self.free_names and rng.random() < 0.7 else self.next_name
        row = {"key": name if kind == "pooled" else (kind, name), "kind": kind, "length": rng.randint(1, 40), "line": rng.randrange(90)}
        row["tail_here"], row["held"] = rng.random() < 0.6, []
        for page in range(-(-row["length"] // PAGE_SIZE)):
            is_last = (page + 1) * PAGE_SIZE >= row["length"]
            if row["tail_here"] if is_last else rng.random() < 0.5:
                self.add_page(row, page)
        if kind == "guest":
            self.guests.insert(rng.choice([len(self.guests), rng.randint(0, len(self.guests))]), row)
        else:
            self.own.append(row)

    def add_page(self, row: dict[str, Any], page: int) -> None:
        self.next_page += 1
        if not row["held"] or row["held"][-1][0] < page:
            row["held"].append((page, self.next_page))

    def step(self, changes: bool) -> None:
        """Everybody in the batch has one token more."""
        rng = self.rng
        if changes:
            for of in (self.guests, self.own):
                for row in [row for row in of if rng.random() < 0.1]:
                    of.remove(row)
                    if row["kind"] == "listed" and rng.random() < 0.5:
                        self.parked.append(row)
                    elif row["kind"] == "pooled":
                        self.free_names.append(row["key"])
            self.own += [row for row in self.parked if rng.random() < 0.3]
            self.parked = [row for row in self.parked if row not in self.own]
            for _ in range(rng.choice([0, 1, 1, 3])):
                self.join()
        for row in (*self.guests, *self.own):
            row["length"] += 1
            if row["length"] % PAGE_SIZE == 1:
                if changes and rng.random() < 0.4:
                    row["tail_here"] = not row["tail_here"]
                if row["tail_here"]:
                    self.add_page(row, (row["length"] - 1) // PAGE_SIZE)

    def begins_elsewhere(self) -> bool:
        return any(row["length"] % PAGE_SIZE == 0 for row in (*self.guests, *self.own) if row["kind"] != "pooled")

    def rows(self) -> list[ListedRow | PooledRow]:
        found: list[ListedRow | PooledRow] = []
        for row in (*self.guests, *self.own):
            if row["kind"] == "pooled":
                found.append(PooledRow(row["key"], row["line"], row["length"]))
            else:
                here = row["tail_here"]
                found.append(ListedRow(row["key"], row["length"], row["held"], here, here and row["kind"] == "guest"))
        return found


def moved(step: int, rows: list[ListedRow | PooledRow], before: TableRows) -> TableRows:
    """The same rows, with those of the step before that are one token on."""
    found = TableRows.of(step, rows)
    runs = narrowed(kept_runs(before.keys, found.keys), before.kinds, found.kinds)
    found.runs = narrowed(narrowed(runs, before.bases, found.bases), before.places, found.places)
    found.came_from = before.name
    assert list(found) == rows
    return found


def outcome(lines: PageLines, given: RowsInput | None) -> tuple[Any, ...]:
    changed = None
    if given is not None:
        changed = sorted(given.writes.T.tolist()), sorted(given.copies.T.tolist()), given.copy_pages
    return lines.table.tolist(), lines._tokens, changed


@pytest.mark.parametrize("seed", range(12))
def test_moved_rows_give_the_tables_of_rows_looked_at(seed: int) -> None:
    requests, fast, slow = Requests(seed), PageLines(40, WIDTH, PAGE_SIZE), PageLines(40, WIDTH, PAGE_SIZE)
    rng, step, before, num_moved, num_advances = requests.rng, 0, TableRows(), 0, 0
    for _ in range(10):
        requests.join()
    for _ in range(300):
        step += 1
        for of in (requests.guests, requests.own):
            of[:] = [row for row in of if row["length"] < WIDTH * PAGE_SIZE - 8][:10]
        changes = rng.random() < 0.4
        if not changes and not requests.begins_elsewhere() and before.keys == [row.key for row in requests.rows()] and before.keys:
            requests.step(changes=False)
            assert fast.advance(step) == slow.advance(step)
            assert outcome(fast, fast.renewal) == outcome(slow, slow.renewal)
            num_advances += 1
            continue
        requests.step(changes)
        if rng.random() < 0.05:
            step += 1  # a step that no graph served
        rows = requests.rows()
        now = moved(step, rows, before)
        num_moved += sum(size for _, _, size in now.runs)
        assert outcome(fast, fast.fill(step, now)) == outcome(slow, slow.fill(step, rows))
        assert len(set(fast.table[:, 0].tolist())) == len(rows), "no two rows share a line"
        before = now
    assert num_moved > 1000 and num_advances > 10
