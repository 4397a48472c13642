"""Fits the attention constants of the cost model to a table of measured kernel times. Standard library only."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Measurement:
    """One timed attention kernel: `requests` rows of `tokens_per_request` KV tokens took `microseconds`.

    longest_row: tokens of one of these rows where it is another length; 0: all are equal. captured_rows: as InstanceWork's.
    """

    model: str
    requests: int
    tokens_per_request: int
    microseconds: float
    longest_row: int = 0
    captured_rows: int = 0

    @property
    def tokens(self) -> int:
        if not self.longest_row:
            return self.requests * self.tokens_per_request
        return (self.requests - 1) * self.tokens_per_request + self.longest_row


@dataclass(frozen=True, slots=True)
class AttentionFit:
    """time = fixed_us + us_per_token * tokens + us_per_row * requests, with the signed relative error of every measurement."""

    fixed_us: float
    us_per_token: float
    us_per_row: float
    errors: tuple[float, ...]

    @property
    def max_error(self) -> float:
        return max(abs(error) for error in self.errors)


def read_measurements(path: Path) -> list[Measurement]:
    """Reads a CSV with the columns of Measurement, the last two optional. Raises ValueError naming file and line for a bad row."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        wanted = {"model", "requests", "tokens_per_request", "microseconds"}
        if not wanted <= set(reader.fieldnames or ()):
            raise ValueError(f"{path}: expected the columns {sorted(wanted)}, got {reader.fieldnames}")
        rows = []
        for row in reader:
            try:
                item = _measurement(row)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
            if item.requests < 1 or item.tokens_per_request < 1 or not item.microseconds > 0 or item.longest_row < 0:
                raise ValueError(f"{path}, line {reader.line_num}: counts and time must be positive, got {row}")
            rows.append(item)
    return rows


def _measurement(row: dict[str, str]) -> Measurement:
    further = {name: int(row[name]) for name in ("longest_row", "captured_rows") if row.get(name)}
    return Measurement(row["model"], int(row["requests"]), int(row["tokens_per_request"]), float(row["microseconds"]), **further)


def fit_attention(measurements: Sequence[Measurement], with_rows: bool = False) -> AttentionFit:
    """Least squares of the relative error with constants >= 0; `with_rows` adds a cost per row. Raises ValueError for too few sizes."""
    num_terms = 3 if with_rows else 2
    columns = [[1.0, float(item.tokens), float(item.requests)][:num_terms] for item in measurements]
    times = [item.microseconds for item in measurements]
    if len({tuple(column) for column in columns}) < 2:
        raise ValueError(f"fitting needs at least two different sizes, got {len(measurements)} measurements of one")
    best: tuple[float, list[float]] | None = None
    for size in range(num_terms, 0, -1):
        for chosen in combinations(range(num_terms), size):
            solution = _solve([[column[k] / time for k in chosen] for column, time in zip(columns, times, strict=True)])
            if solution is None or min(solution) < 0:
                continue
            full = [0.0] * 3
            for k, value in zip(chosen, solution, strict=True):
                full[k] = value
            squares = sum(error**2 for error in _errors(full, measurements))
            if best is None or squares < best[0] - 1e-12:
                best = squares, full
    if best is None:
        raise ValueError("no non-negative constants fit the measurements")
    fixed, per_token, per_row = best[1]
    return AttentionFit(fixed, per_token, per_row, _errors(best[1], measurements))


def _errors(terms: Sequence[float], measurements: Sequence[Measurement]) -> tuple[float, ...]:
    return tuple((terms[0] + terms[1] * item.tokens + terms[2] * item.requests) / item.microseconds - 1 for item in measurements)


def _solve(rows: Sequence[Sequence[float]]) -> list[float] | None:
    """x that minimises |rows x - 1|^2 by the normal equations; None when they are singular."""
    size = len(rows[0])
    scale = [max(abs(row[k]) for row in rows) or 1.0 for k in range(size)]
    scaled = [[row[k] / scale[k] for k in range(size)] for row in rows]
    matrix = [[sum(row[i] * row[j] for row in scaled) for j in range(size)] + [sum(row[i] for row in scaled)] for i in range(size)]
    for i in range(size):
        pivot = max(range(i, size), key=lambda r: abs(matrix[r][i]))
        if abs(matrix[pivot][i]) < 1e-9:
            return None
        matrix[i], matrix[pivot] = matrix[pivot], matrix[i]
        for r in range(size):
            if r != i:
                factor = matrix[r][i] / matrix[i][i]
                matrix[r] = [left - factor * right for left, right in zip(matrix[r], matrix[i], strict=True)]
    return [matrix[i][size] / matrix[i][i] / scale[i] for i in range(size)]
