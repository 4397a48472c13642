"""The table of a run, and what it is compared with."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import torch

from sglang_dcp.dataflow.measure.timing import event_times

COPY_BYTES = 1 << 30


@dataclass(frozen=True)
class Row:
    """One line of the table. bytes: read plus written; 0 where bytes are not the point."""

    name: str
    microseconds: float
    bytes: int = 0
    note: str = ""

    def share(self, copy_bandwidth: float) -> float:
        """Share of the measured copy bandwidth (bytes per second)."""
        return self.bytes / (self.microseconds * 1e-6) / copy_bandwidth


def copy_bandwidth() -> float:
    """Bytes per second of a large device copy, read plus written."""
    source = torch.empty(COPY_BYTES // 4, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    milliseconds = statistics.median(event_times(lambda: target.copy_(source), 20))
    return 2 * COPY_BYTES / (milliseconds * 1e-3)


def print_table(rows: list[Row], bandwidth: float) -> None:
    print(f"{'kernel':64} {'us':>9} {'MB':>9} {'of copy':>8}  note")
    for row in rows:
        moved, share = (f"{row.bytes / 1e6:9.2f}", f"{row.share(bandwidth):8.2f}") if row.bytes else (" " * 9, " " * 8)
        print(f"{row.name:64} {row.microseconds:9.2f} {moved} {share}  {row.note}")
