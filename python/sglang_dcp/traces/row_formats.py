"""Formats in which a row is a request: which field holds what, as data.

A published format is known by the exact names of its fields; `table` takes the names that people give to columns of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from sglang_dcp.traces.records import RowError, TraceRequest
from sglang_dcp.traces.values import block_ids, date, length, milliseconds, seconds, seconds_or_date

ReadTime = Callable[[Any, str], float]


@dataclass(frozen=True)
class RowFormat:
    """`arrivals`, `prompts` and `outputs` are the spellings of a field, tried in order; a dot goes one object deeper.

    `marks`: fields that must be there as well for the format to be detected. `failed_output`: the reason given for a row of 0 output
    tokens, where the format gives that a meaning. `blocks`: the field with ids of the prompt's blocks of `block_tokens` each.
    """

    name: str
    arrivals: Mapping[str, ReadTime]
    prompts: Collection[str]
    outputs: Collection[str]
    marks: Collection[str] = ()
    failed_output: str | None = None
    blocks: str | None = None
    block_tokens: int = 0

    def matches(self, fields: Collection[str]) -> bool:
        """Whether a row or header with these names is of this format."""
        wanted = (self.arrivals, self.prompts, self.outputs)
        return set(self.marks) <= set(fields) and all(self._find(spellings, fields) for spellings in wanted)

    def used_fields(self, fields: Collection[str]) -> list[str]:
        """The three names that a request is read from. Raises ValueError naming the one that is not there."""
        chosen = []
        for what, spellings in (("arrival", self.arrivals), ("input", self.prompts), ("output", self.outputs)):
            name = self._find(spellings, fields)
            if name is None:
                expected, got = ", ".join(spellings), ", ".join(sorted(fields)[:12])
                raise ValueError(f"no column for {what}; {self.name} has {expected}, this has {got}")
            chosen.append(name)
        return chosen

    def read(self, row: Mapping[str, Any], names: list[str]) -> TraceRequest:
        """Raises RowError with the reason."""
        arrival, prompt, output = (_field(row, name) for name in names)
        if self.failed_output and output in (0, 0.0, "0", "0.0"):
            raise RowError(self.failed_output)
        ids = () if self.blocks is None else block_ids(row.get(self.blocks, ()), self.blocks)
        return TraceRequest(self.arrivals[names[0]](arrival, names[0]), length(prompt, names[1]), length(output, names[2]), ids)

    @staticmethod
    def _find(spellings: Collection[str], fields: Collection[str]) -> str | None:
        return next((name for name in spellings if name in fields), None)


def names_of(row: Mapping[str, Any]) -> list[str]:
    """Fields of a row, those of its objects as `outer.inner`."""
    inner = [f"{name}.{key}" for name, value in row.items() if isinstance(value, Mapping) for key in value]
    return [*row, *inner]


def _field(row: Mapping[str, Any], name: str) -> Any:
    if name in row:
        return row[name]
    outer, _, inner = name.partition(".")
    value = row.get(outer)
    if not inner or not isinstance(value, Mapping):
        raise RowError(f"{name} is missing")
    return value.get(inner)


AZURE = RowFormat("azure", {"TIMESTAMP": date}, ("ContextTokens",), ("GeneratedTokens",))
BURSTGPT = RowFormat(
    "burstgpt",
    {"Timestamp": seconds},
    ("Request tokens",),
    ("Response tokens",),
    failed_output="a failed request (0 response tokens)",
)
SERVEGEN = RowFormat("servegen", {"timestamp": seconds}, ("data.input_tokens",), ("data.output_tokens",))
MOONCAKE = RowFormat(
    "mooncake", {"timestamp": milliseconds}, ("input_length",), ("output_length",), ("hash_ids",), blocks="hash_ids", block_tokens=512
)
TABLE = RowFormat(
    "table",
    {
        "arrival": seconds_or_date,
        "arrival_s": seconds,
        "timestamp_s": seconds,
        "timestamp_ms": milliseconds,
        "timestamp": seconds_or_date,
    },
    ("input", "input_length", "input_tokens", "prompt_len", "prompt_tokens"),
    ("output", "output_length", "output_len", "output_tokens"),
)

# In order of detection: the published ones first.
ROW_FORMATS = (AZURE, BURSTGPT, SERVEGEN, MOONCAKE, TABLE)
