"""How many instances: --tp N says it, every other width follows or must agree."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Collection
from typing import Any

logger = logging.getLogger(__name__)

WIDTHS = ("attn_dp_size", "ep_size", "dp_size")
GIVEN = "dyncp_given_widths"
"""Name on the parsed arguments: the widths that the command line names. Their values alone do not tell, 1 is SGLang's default of each."""


class SettingError(ValueError):
    """A setting that cannot work with --enable-dyncp; the message names flag, value and reason."""


def note_given_widths(parser: argparse.ArgumentParser) -> None:
    """Lets the parser tell which of WIDTHS a command line names."""
    for action in parser._actions:
        if action.dest in WIDTHS:
            action.__class__ = _noting(type(action))


def _noting(stock: type[argparse.Action]) -> type[argparse.Action]:
    class Noting(stock):  # type: ignore[valid-type, misc]
        def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None) -> None:
            setattr(namespace, GIVEN, getattr(namespace, GIVEN, frozenset()) | {self.dest})
            super().__call__(parser, namespace, values, option_string)

    return Noting


def complete_widths(tp_size: int, attn_dp_size: int, ep_size: int, dp_size: int, given: Collection[str] = ()) -> dict[str, int]:
    """--tp N means N instances: attention data parallelism and expert parallelism of N.

    SGLang has turned `--dp-size N --enable-dp-attention` into attn_dp_size already, so a dp_size above 1 means replicas. given: the widths
    that the command line names. Raises SettingError for another explicit width, an explicit 1 too, for replicas, and for N = 1.
    """
    if tp_size < 2:
        raise SettingError(f"--tp {tp_size} does not work with --enable-dyncp: a request is spread over at least 2 instances")
    if dp_size != 1:
        raise SettingError(
            f"--dp-size {dp_size} does not work with --enable-dyncp: replicas do not share requests; --tp {tp_size} alone means {tp_size} "
            f"instances, and so does --dp-size {tp_size} with --enable-dp-attention"
        )
    for name, value in (("attn_dp_size", attn_dp_size), ("ep_size", ep_size)):
        # --dp-size 1 with --enable-dp-attention is the deprecated way to say nothing.
        if value != tp_size and (value != 1 or name in given):
            flag = "--" + name.replace("_", "-")
            raise SettingError(f"{flag} {value} does not work with --enable-dyncp: it must equal --tp {tp_size} (attention TP is 1)")
    if (attn_dp_size, ep_size) != (tp_size, tp_size):
        logger.info("dyncp: --attn-dp-size %d --ep-size %d (as many instances as --tp says)", tp_size, tp_size)
    return {"attn_dp_size": tp_size, "ep_size": tp_size}
