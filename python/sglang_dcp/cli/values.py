"""Values of flags: one out of range, or that nothing would read, is refused by the flag's name, with the value. Standard library only."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable


def at_least(least: int) -> Callable[[str], int]:
    """A whole number of `least` or more."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, got {text}")
        return value

    return parse


def above_zero(text: str) -> float:
    """A finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def refuse_given(args: argparse.Namespace, names: Iterable[str], where: str) -> None:
    """ValueError for one of these flags that was given although nothing reads it `where`; None is one that was not."""
    for name in names:
        if (value := getattr(args, name)) is not None:
            raise ValueError(f"--{name.replace('_', '-')} {value} has no effect {where}")
