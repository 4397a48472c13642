"""What a call measures, in which order, and what of it a file has already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmark.headline.contenders import Contender
from benchmark.headline.judge import Point
from benchmark.headline.traffic import Mix, mix_name, parse_mix


@dataclass(frozen=True)
class MixRates:
    """rates: requests per second, rising."""

    mix: Mix
    rates: tuple[float, ...]


@dataclass(frozen=True)
class Unit:
    """One point: a contender at a rate of a mix."""

    contender: Contender
    mix: Mix
    seed: int
    rate: float

    @property
    def case_key(self) -> str:
        return f"{mix_name(self.mix)}|{self.seed}"


def parse_mixes(mixes: str, rates: str) -> list[MixRates]:
    """`0.03,weka` and `4,6/1,2`: a list of rates for each mix, or one for all. ValueError where they do not fit each other."""
    lists = [tuple(sorted(float(rate) for rate in part.split(","))) for part in rates.split("/")]
    values = [parse_mix(mix) for mix in mixes.split(",")]
    if len(lists) not in (1, len(values)):
        raise ValueError(f"--rates {rates}: {len(lists)} lists for the {len(values)} mixes of --long {mixes}")
    return [MixRates(mix, lists[index % len(lists)]) for index, mix in enumerate(values)]


def parse_seeds(seeds: str) -> list[int]:
    """`1,2`. ValueError for one that is there twice."""
    found = [int(seed) for seed in seeds.split(",")]
    if len(set(found)) < len(found):
        raise ValueError(f"--seed {seeds}: a seed is there twice")
    return found


def units(group: Sequence[Contender], mixes: Sequence[MixRates], seeds: Sequence[int]) -> list[Unit]:
    """Of one server: all its contenders at a rate before the next rate, so that a run that ends early leaves comparable points."""
    return [Unit(contender, some.mix, seed, rate) for some in mixes for seed in seeds for rate in some.rates for contender in group]


def points_of(cases: Mapping[str, Any], unit: Unit) -> list[Point]:
    """What a file has of the unit's contender, mix and seed."""
    return cases.get(unit.case_key, {}).get(unit.contender.name, {}).get("points", [])


def too_much(found: Point, stop_ms: float, stop_ttft_s: float) -> bool:
    """Higher rates need not be tried."""
    return bool(found["failed"]) or found["p99_ttft_s"] > stop_ttft_s or found["p99_tpot_ms"] > stop_ms


def is_left(cases: Mapping[str, Any], unit: Unit, stop_ms: float, stop_ttft_s: float) -> bool:
    """Neither measured, nor above a rate that was too much for the contender."""
    return not any(
        found["requests_per_s"] == unit.rate or (found["requests_per_s"] < unit.rate and too_much(found, stop_ms, stop_ttft_s))
        for found in points_of(cases, unit)
    )
