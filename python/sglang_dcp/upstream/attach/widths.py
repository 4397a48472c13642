"""How many instances, and slices of each: --tp N alone says N of one slice, every other width follows or must agree."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Collection
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
    """--tp N means N instances: attention data parallelism and expert parallelism of N. With --attn-dp-size M they are M, of N / M slices
    each (attention tensor parallelism).

    SGLang has turned `--dp-size N --enable-dp-attention` into attn_dp_size already, so a dp_size above 1 means replicas. given: the widths
    that the command line names. Raises SettingError for widths that do not divide so, for replicas, and for a single instance.
    """
    if tp_size < 2:
        raise SettingError(f"--tp {tp_size} does not work with --enable-dyncp: a request is spread over at least 2 instances")
    if dp_size != 1:
        raise SettingError(
            f"--dp-size {dp_size} does not work with --enable-dyncp: replicas do not share requests; --tp {tp_size} alone means {tp_size} "
            f"instances, and so does --dp-size {tp_size} with --enable-dp-attention"
        )
    # --dp-size 1 with --enable-dp-attention is the deprecated way to say nothing.
    instances = tp_size if attn_dp_size == 1 and "attn_dp_size" not in given else attn_dp_size
    if instances < 2 or tp_size % instances:
        raise SettingError(
            f"--attn-dp-size {instances} does not work with --enable-dyncp: it is the number of instances, at least 2, and divides "
            f"--tp {tp_size}; each has --tp / --attn-dp-size slices (attention tensor parallelism)"
        )
    if ep_size != tp_size and (ep_size != 1 or "ep_size" in given):
        raise SettingError(f"--ep-size {ep_size} does not work with --enable-dyncp: it must equal --tp {tp_size}")
    if (attn_dp_size, ep_size) != (instances, tp_size):
        logger.info("dyncp: --attn-dp-size %d --ep-size %d (experts are spread over all ranks)", instances, tp_size)
    return {"attn_dp_size": instances, "ep_size": tp_size}


def find_slices_refusal(values: Callable[[str], Any]) -> str | None:
    """The message for instances of several slices where they were not run, or None. `values(field)`: as resolved."""
    tp_size, instances = values("tp_size"), values("attn_dp_size")
    if tp_size == instances:
        return None
    server = {
        f"--device {values('device')}": values("device") != "cpu",
        "--disaggregation-mode decode": values("disaggregation_mode") == "decode",
        f"--nnodes {values('nnodes')}": values("nnodes") > 1,
    }
    refused = next((name for name, is_so in server.items() if is_so), None)
    if refused is None:
        return None
    where = "a GPU" if refused.startswith("--device") else "such a server"
    return (
        f"--attn-dp-size {instances} with --tp {tp_size} does not work with --enable-dyncp and {refused}: "
        f"attention TP {tp_size // instances} was not run on {where} yet"
    )
