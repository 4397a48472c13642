"""How many instances, and slices of each: --tp N alone says N of one slice, every other width follows or must agree."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Collection
from typing import Any

from sglang_dcp.config import DynCpConfig
from sglang_dcp.upstream.attach.cuda_settings import BACKEND, BACKEND_FIELDS, has_slices

logger = logging.getLogger(__name__)

SLICED_KV = ("auto", "bf16", "bfloat16")
"""K/V that instances of several slices had on a GPU. What a checkpoint decides under auto is judged with the pool (layers/backends.py)."""
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


def find_slices_refusal(values: Callable[[str], Any], config: DynCpConfig) -> str | None:
    """The message for instances of several slices beside what they were not run with, or None. `values(field)`: as resolved."""
    if not has_slices(values):
        return None
    tp_size, instances = values("tp_size"), values("attn_dp_size")
    server = {
        "--disaggregation-mode decode": values("disaggregation_mode") == "decode",
        f"--nnodes {values('nnodes')}": values("nnodes") > 1,
    }
    judged = [(server, "")] + ([(_beside_on_gpu(values, config), " on a GPU")] if values("device") == "cuda" else [])
    for flags, where in judged:
        for flag in (flag for flag, is_given in flags.items() if is_given):
            return (
                f"--attn-dp-size {instances} with --tp {tp_size} does not work with --enable-dyncp and {flag}: "
                f"attention TP {tp_size // instances} was not run with it{where} yet"
            )
    return None


def _beside_on_gpu(values: Callable[[str], Any], config: DynCpConfig) -> dict[str, bool]:
    """Flags that slices were not run with on a GPU, and whether they are given: they ran FlashInfer over bfloat16 K/V, decode graphs over
    peer memory, one node, no expert all-to-all. Behind find_cuda_refusal."""
    backends = {f"--{field.replace('_', '-')} {values(field)}": values(field) not in (None, BACKEND) for field in BACKEND_FIELDS}
    graphs = values("cuda_graph_config")
    decode = "full" if graphs is None else graphs.decode.backend
    return backends | {
        f"--kv-cache-dtype {values('kv_cache_dtype')}": values("kv_cache_dtype") not in SLICED_KV,
        f"--cuda-graph-backend-decode {decode}": decode != "full",
        f"--moe-a2a-backend {values('moe_a2a_backend')}": values("moe_a2a_backend") not in (None, "none"),
        f"--dyncp-transport {config.transport}": config.transport not in ("auto", "peer"),
        f"--dyncp-node-size {config.node_size}": config.node_size not in (None, values("attn_dp_size")),
    }
