"""What a step runs as: decided once, when all instances have met, and read by everything behind that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sglang_dcp.dataflow.contracts import HomeRow, StepPlan
from sglang_dcp.dataflow.graph.table_rows import ListedRow, PooledRow
from sglang_dcp.dataflow.step_rows import StepRows


@dataclass(frozen=True)
class Stock:
    """No row is sharded, on any instance: SGLang's step as it is."""


@dataclass
class Eager:
    """Some row is sharded and no graph serves: our per-layer path attends every row. plans: by the window of the layers (None: all keys),
    each made by the first such layer, which knows the padded number of tokens; on the device."""

    rows: StepRows
    home_rows: Sequence[HomeRow]
    plans: dict[int | None, StepPlan] = field(default_factory=dict)


@dataclass
class GraphStep:
    """A decode step as the tables want it (`StepRows.table_rows`). is_advance: the rows are those of the step before, one token on."""

    step: int
    words: list[np.ndarray]
    rows: Sequence[ListedRow | PooledRow]
    is_advance: bool = False

    @classmethod
    def of(cls, rows: StepRows) -> GraphStep:
        return cls(rows.participant.step, *rows.table_rows())


@dataclass
class Graph:
    """A step of decodes, some of them sharded, that replays the graph captured for `guest_rows` rows of other homes."""

    guest_rows: int
    step: GraphStep

    def advance(self) -> None:
        """The next step has the same rows, one token on."""
        self.step.step += 1
        self.step.is_advance = True


StepMode = Stock | Eager | Graph

STOCK = Stock()
