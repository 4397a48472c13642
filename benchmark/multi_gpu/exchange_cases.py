"""Which rows travel in one measured exchange, and how many bytes that is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_dcp.dataflow.contracts import StepPlan, TokenList
from sglang_dcp.dataflow.step_plan import merge_list

NANOCP_FIXED_US = 15.8
NANOCP_GB_PER_S = 361.0
"""NanoCP's own settings on H200: query 5.92, result 5.64 and LSE 4.26 us fixed, 2.77e-6 us per byte (authors' artifact evaluation)."""


@dataclass(frozen=True)
class RowShape:
    """One row's query and partial result."""

    name: str
    num_heads: int
    qk_head_dim: int
    v_head_dim: int
    kv_row_elements: int

    def query_bytes(self, element_bytes: int) -> int:
        return self.num_heads * self.qk_head_dim * element_bytes

    def return_bytes(self, element_bytes: int) -> int:
        """Output, and LSE in float32."""
        return self.num_heads * (self.v_head_dim * element_bytes + 4)


ROW_SHAPES = {
    "deepseek-v3": RowShape("deepseek-v3", 128, 576, 512, 576),
    "qwen3-235b-a22b": RowShape("qwen3-235b-a22b", 64, 128, 128, 1024),
    "tiny": RowShape("tiny", 4, 16, 16, 32),
}


@dataclass(frozen=True)
class ExchangeCase:
    """Rows of each home in one step; each has `degree` shards: its home and the instances after it, around the ring."""

    shape: RowShape
    pattern: str
    home_rows: tuple[int, ...]
    degree: int

    @property
    def num_instances(self) -> int:
        return len(self.home_rows)

    def shards(self, home: int) -> list[int]:
        return sorted((home + step) % self.num_instances for step in range(self.degree))

    def routes(self) -> list[list[list[int]]]:
        return [[self.shards(home)] * rows for home, rows in enumerate(self.home_rows)]

    def guest_rows(self, rank: int) -> list[int]:
        """Rows that come to `rank`, per home."""
        return [rows if home != rank and rank in self.shards(home) else 0 for home, rows in enumerate(self.home_rows)]

    def routed_rows(self) -> int:
        """Rows that the busiest instance sends or receives."""
        out = [rows * (self.degree - 1) for rows in self.home_rows]
        return max(max(out), *(sum(self.guest_rows(rank)) for rank in range(self.num_instances)))

    def nanocp_us(self) -> float:
        """What NanoCP's linear model gives for these rows: bfloat16 query, result and LSE."""
        row = self.shape.query_bytes(2) + self.shape.num_heads * (self.shape.v_head_dim + 1) * 2
        return NANOCP_FIXED_US + self.routed_rows() * row / (NANOCP_GB_PER_S * 1e3)


def exchange_cases(num_instances: int, shapes: tuple[str, ...], row_counts: tuple[int, ...]) -> list[ExchangeCase]:
    """Every home has the rows, and one home has them all; all instances hold shards."""
    cases = []
    for name in shapes:
        for rows in row_counts:
            one_home = (rows, *[0] * (num_instances - 1))
            cases.append(ExchangeCase(ROW_SHAPES[name], "every home", (rows,) * num_instances, num_instances))
            cases.append(ExchangeCase(ROW_SHAPES[name], "one home", one_home, num_instances))
    return cases


def step_plan(case: ExchangeCase, rank: int) -> StepPlan:
    """The plan that the layers of such a step would get. An instance without rows has one padding token, as in a served step."""
    n, rows = case.num_instances, case.home_rows[rank]
    targets = [d for d in case.shards(rank) if d != rank] if rows else []
    receive = case.guest_rows(rank)
    nobody = np.zeros(0, dtype=np.int64)
    none, own = TokenList.of(nobody), TokenList.of(np.arange(rows))
    return StepPlan(
        step=0,
        num_tokens=max(1, rows),
        send_queries=tuple(own if d in targets else none for d in range(n)),
        receive_query_splits=tuple(receive),
        send_kv=(none,) * n,
        receive_kv_slots=(none.index,) * n,
        write_slots=none.index,
        pool_rows=(),
        pool_tokens=none,
        chunk_rows=(),
        chunk_tokens=none,
        merges=merge_list(max(1, rows), nobody, [np.arange(rows) if d in targets else nobody for d in range(n)]),
    )
