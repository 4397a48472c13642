"""What a field of a request may hold: kinds of values, each with its range. Pure; a refusal names the field, the value and the limit.

A value travels to the router and to the schedulers as a typed message. One of another type does not fail alone: decoding it ends the
process that reads it. So kinds are exact (True is no integer, 16.0 is none either), as SGLang's message types are.
"""

from __future__ import annotations

import math
import re
import reprlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

INT32, INT64 = 2**31 - 1, 2**63 - 1
SMALLEST_FLOAT32, LARGEST_FLOAT32 = 2.0**-126, (2 - 2.0**-23) * 2.0**127
LARGEST_BIAS = 1e30
"""A biased logit is divided by temperatures down to 1e-6, and must stay a finite float32."""

MOST_NESTED = 32
"""Levels of a JSON value in a pickled message: pickling recurses."""

SizeName = Literal["vocabulary", "prompt"]


class RangeError(ValueError):
    """A value outside its range; SGLang's endpoints answer HTTP 400 with the message."""


@dataclass(frozen=True)
class Sizes:
    """What ranges depend on. vocabulary: token ids are 0 .. vocabulary - 1. prompt: tokens of the prompt. typed: messages between processes
    have types (SGLANG_USE_PICKLE_IPC=0), else they are pickled and carry any JSON value."""

    vocabulary: int
    prompt: int = 0
    typed: bool = True


class Kind(Protocol):
    def check(self, name: str, value: Any, sizes: Sizes) -> None:
        """Raises RangeError unless `value` may stand in the field `name`. None, a field that is not given, is never asked about."""


def refuse(name: str, expected: str, value: Any) -> RangeError:
    return RangeError(f"{name} must be {expected}, got {reprlib.repr(value)}")


@dataclass(frozen=True)
class Integer:
    """An integer in low..high, or one of `also`. high: a number, or what it is bounded by."""

    low: int
    high: int | SizeName
    also: tuple[int, ...] = ()

    def check(self, name: str, value: Any, sizes: Sizes) -> None:
        bound = "" if isinstance(self.high, int) else f" ({self.high})"
        high = self.high if isinstance(self.high, int) else getattr(sizes, self.high)
        if type(value) is not int or not (self.low <= value <= high or value in self.also):
            others = "".join(f" or {other}" for other in self.also)
            raise refuse(name, f"an integer in {self.low}..{high}{bound}{others}", value)


@dataclass(frozen=True)
class Real:
    """A finite number in low..high."""

    low: float
    high: float

    def check(self, name: str, value: Any, sizes: Sizes) -> None:
        if type(value) not in (int, float) or not self.low <= value <= self.high:
            raise refuse(name, f"a number in {self.low:g}..{self.high:g}", value)
        if type(value) is int and abs(value) > INT64:
            raise refuse(name, "an integer of 64 bits or a float", value)


@dataclass(frozen=True)
class Flag:
    def check(self, name: str, value: Any, sizes: Sizes) -> None:
        if type(value) is not bool:
            raise refuse(name, "true or false", value)


@dataclass(frozen=True)
class Text:
    def check(self, name: str, value: Any, sizes: Sizes) -> None:
        if not isinstance(value, str):
            raise refuse(name, "a string", value)


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    words: tuple[str, ...]

    def check(self, name: str, value: Any, sizes: Sizes) -> None:
        if value not in self.words:
            raise refuse(name, " or ".join(self.words), value)


@dataclass(frozen=True)
class Texts:
    """A string or a list of strings. patterns: they are regular expressions."""

    patterns: bool = False

    def check(self, name: str, value: Any, sizes: Sizes) -> None:
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise refuse(name, "a string or a list of strings", value)
        for text in texts if self.patterns else ():
            try:
                re.compile(text)
            except (re.error, RecursionError, OverflowError) as error:
                raise RangeError(f"{name} must be a regular expression, got {reprlib.repr(text)}: {error}") from None


@dataclass(frozen=True)
class TokenIds:
    """Token ids of the vocabulary; Nones among them are left out, as SGLang does, where `holes` are allowed."""

    holes: bool = False

    def check(self, name: str, value: Any, sizes: Sizes) -> None:
        _check_numbers(name, value, "token ids", sizes.vocabulary, "vocabulary", holes=self.holes)


@dataclass(frozen=True)
class Positions:
    """Positions in the prompt."""

    def check(self, name: str, value: Any, sizes: Sizes) -> None:
        _check_numbers(name, value, "positions", sizes.prompt, "prompt")


def _check_numbers(name: str, value: Any, what: str, count: int, bound: SizeName, *, holes: bool = False) -> None:
    """A prompt may have a million of them: where all is well, nothing here runs per element in Python."""
    if not isinstance(value, list | tuple | set | frozenset | array):
        raise refuse(name, f"a list of {what}", value)
    numbers = [number for number in value if number is not None] if holes else value
    if not len(numbers):
        return
    if set(map(type, numbers)) == {int} and min(numbers) >= 0 and max(numbers) < count:
        return
    index, wrong = next((index, number) for index, number in enumerate(numbers) if type(number) is not int or not 0 <= number < count)
    raise refuse(f"{name}[{index}]", f"an integer in 0..{count - 1} ({bound})", wrong)


@dataclass(frozen=True)
class Biases:
    """An object from token ids, written as strings, to what is added to their logits."""

    def check(self, name: str, value: Any, sizes: Sizes) -> None:
        if not isinstance(value, dict):
            raise refuse(name, "an object of token ids", value)
        for key, bias in value.items():
            if not isinstance(key, str) or not re.fullmatch(r"[0-9]{1,18}", key, re.ASCII) or int(key) >= sizes.vocabulary:
                raise refuse(f"a key of {name}", f"a token id in 0..{sizes.vocabulary - 1} (vocabulary)", key)
            Real(-LARGEST_BIAS, LARGEST_BIAS).check(f"{name}[{key}]", bias, sizes)


@dataclass(frozen=True)
class Strings:
    """An object of strings."""

    def check(self, name: str, value: Any, sizes: Sizes) -> None:
        if not isinstance(value, dict) or not all(isinstance(text, str) for pair in value.items() for text in pair):
            raise refuse(name, "an object of strings", value)


@dataclass(frozen=True)
class Parameters:
    """custom_params: an object. In typed messages it holds numbers, strings, true, false and null, lists of those and objects of those; in
    pickled ones whatever a custom logit processor reads, MOST_NESTED levels deep."""

    def check(self, name: str, value: Any, sizes: Sizes) -> None:
        if not isinstance(value, dict):
            raise refuse(name, "an object", value)
        if not sizes.typed:
            _check_depth(name, value, MOST_NESTED)
            return
        for key, item in _items(name, value):
            if isinstance(item, dict):
                for inner_key, inner in _items(key, item):
                    _check_scalar(inner_key, inner)
            elif isinstance(item, list | tuple):
                for index, inner in enumerate(item):
                    _check_scalar(f"{key}[{index}]", inner)
            else:
                _check_scalar(key, item)


def _items(name: str, value: dict[Any, Any]) -> Iterable[tuple[str, Any]]:
    for key, item in value.items():
        if not isinstance(key, str):
            raise refuse(f"a key of {name}", "a string", key)
        yield f"{name}.{key}", item


def _check_depth(name: str, value: Any, levels: int) -> None:
    if not isinstance(value, dict | list | tuple):
        return
    if not levels:
        raise RangeError(f"{name} must be nested at most {MOST_NESTED} levels deep")
    for item in value.values() if isinstance(value, dict) else value:
        _check_depth(name, item, levels - 1)


def _check_scalar(name: str, value: Any) -> None:
    if value is None or isinstance(value, str | bool):
        return
    if type(value) is int and -INT64 - 1 <= value <= INT64 or type(value) is float and math.isfinite(value):
        return
    raise refuse(name, "a string, true, false, null, an integer of 64 bits or a finite number", value)


@dataclass(frozen=True)
class Elsewhere:
    """A field that is not looked at here; `reason` says who does, or why nobody has to."""

    reason: str

    def check(self, name: str, value: Any, sizes: Sizes) -> None:
        return
