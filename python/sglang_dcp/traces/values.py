"""Values as trace files spell them: lengths that were floats once, times in seconds, milliseconds or as a date."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime
from typing import Any

from sglang_dcp.traces.records import RowError

LARGEST_LENGTH = 2**31 - 1
LARGEST_TIME_S = 1e15
# A date with more digits of a second than `datetime` keeps, as in Azure's traces.
FRACTION = re.compile(r"(\.\d{6})\d+")


def length(value: Any, name: str) -> int:
    """Tokens: a whole number from 1 on; `10`, `"10"` and `10.0` are the same length. Raises RowError naming field and value."""
    number = _number(value, name)
    if number != int(number):
        raise RowError(f"{name} is not a whole number")
    if number < 0:
        raise RowError(f"{name} is negative")
    if number > LARGEST_LENGTH:
        raise RowError(f"{name} is beyond {LARGEST_LENGTH} tokens")
    if number == 0:
        raise RowError(f"{name} is 0")
    return int(number)


def seconds(value: Any, name: str) -> float:
    """A number of seconds; traces may count from any moment, so it may be negative. Raises RowError."""
    number = _number(value, name)
    if abs(number) > LARGEST_TIME_S:
        raise RowError(f"{name} is beyond {LARGEST_TIME_S:g} s")
    return float(number)


def milliseconds(value: Any, name: str) -> float:
    """The same, from a number of milliseconds."""
    return seconds(value, name) / 1000


def date(value: Any, name: str) -> float:
    """Seconds since 1970 of an ISO date with or without zone (without one: UTC), or of a `datetime`. Raises RowError."""
    moment = value
    if not isinstance(value, datetime):
        text = FRACTION.sub(r"\1", str(value).strip())
        try:
            moment = datetime.fromisoformat(text)
        except ValueError as error:
            raise RowError(f"{name} is not a date") from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def seconds_or_date(value: Any, name: str) -> float:
    """A number of seconds, or else a date."""
    try:
        return seconds(value, name)
    except RowError:
        if isinstance(value, datetime) or (isinstance(value, str) and "-" in value[1:] and ":" in value):
            return date(value, name)
        raise


def block_ids(value: Any, name: str) -> tuple[int, ...]:
    """Ids of a prompt's blocks; none where the row has none. Raises RowError."""
    if value is None:
        return ()
    if not isinstance(value, list | tuple) or not all(isinstance(item, int) and not isinstance(item, bool) for item in value):
        raise RowError(f"{name} is not a list of whole numbers")
    return tuple(value)


def _number(value: Any, name: str) -> int | float:
    """Exact for whole numbers of any size: a huge one must not become a neighbour or an infinity on the way."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise RowError(f"{name} is missing")
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    text = str(value).strip()
    if re.fullmatch(r"[+-]?\d{1,400}", text):
        return int(text)
    try:
        number = math.nan if isinstance(value, bool) or "_" in text else float(text)
    except ValueError:
        raise RowError(f"{name} is not a number") from None
    if not math.isfinite(number):
        raise RowError(f"{name} is not a number")
    return number
