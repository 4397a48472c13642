"""What is compared, on the same GPUs with the same pools, one server at a time. Contenders of equal flags share a server and differ in the
fields of their requests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from benchmark.headline.client import Fields

FA3, FLASHINFER = ("--attention-backend", "fa3"), ("--attention-backend", "flashinfer")
FAKE_PREFILL = {"bootstrap_host": "2.2.2.2"}
"""SGLang's name for a prefill server that is not there: K/V are what the pool holds."""
DECODE_ONLY = ("--disaggregation-mode", "decode", "--disaggregation-transfer-backend", "fake")
"""SGLang's own way to decode without prefills, for all of them."""
NO_PREFILL, REAL_PREFILL = "none", "real"


@dataclass(frozen=True)
class Contender:
    """name: in results and on the command line. flags: beside what all have. fields: of every request."""

    name: str
    what: str
    dyncp: bool
    flags: tuple[str, ...] = ()
    fields: Fields = field(default_factory=dict)


def pinned(degree: int) -> dict[str, Any]:
    """Fields that pin a request to this degree, or to its pages where it has fewer."""
    return {"sampling_params": {"custom_params": {"dyncp": {"degree": degree, "at_most": True}}}}


def _runtime(num_gpus: int) -> list[Contender]:
    """Those on our runtime, without what all of them have."""
    whole = ("--dyncp-max-degree", "1")
    every = f"every request over {num_gpus} instances, a prompt of fewer pages over those: static degree on our runtime"
    return [
        Contender("local", "SGLang's balancing, our runtime", True, ("--dyncp-policy", "local")),
        # Placed as with --dyncp-max-degree 1; a tail whose pool is full may go on in another, which that flag forbids.
        Contender("whole", "every request whole (pinned on the server of `ours`), placed by our policy", True, (), pinned(1)),
        Contender("whole-only", "every request whole: a server with --dyncp-max-degree 1, without graphs for guest rows", True, whole),
        Contender("whole-stock-split", "the same, the kernel's own split of long rows", True, (*whole, "--dyncp-split-budget", "stock")),
        Contender(f"fixed-{num_gpus}", every, True, (), pinned(num_gpus)),
        Contender("length-buckets", "degree by prompt length, as NanoCP's release", True, ("--dyncp-policy", "length-buckets")),
        Contender("ours", "dual-balance as users start it, with SGLang's default kernel", True),
        Contender("ours-flashinfer", "dual-balance with FlashInfer's kernels in every step", True, FLASHINFER),
    ]


def contenders(num_gpus: int, prefill: str = NO_PREFILL) -> dict[str, Contender]:
    """By name, for one instance per GPU, all with SGLang's default kernel on Hopper where it is not named. prefill: "none": K/V are what
    the pools hold, or "real": prompts are computed."""
    n = str(num_gpus)
    decode_only: tuple[str, ...] = ()
    fake: dict[str, Any] = {}
    stock_only = FA3
    if prefill != REAL_PREFILL:
        decode_only, fake = DECODE_ONLY, FAKE_PREFILL
        stock_only = (*DECODE_ONLY, *FA3, "--disaggregation-decode-retraction-backup", "cpu_tensor")
    data_parallel = ("--attn-dp-size", n, "--ep-size", n, "--load-balance-method", "total_tokens")
    static = ("--dcp-size", n, "--ep-size", n)
    found = [
        Contender("stock", "SGLang's data parallelism with its defaults", False, (*data_parallel, *stock_only), fake),
        Contender("static-dcp", "SGLang's static context parallelism", False, (*static, *stock_only), fake),
    ]
    for one in _runtime(num_gpus):
        kernel = () if FA3[0] in one.flags else FA3
        assert not callable(one.fields)
        found.append(Contender(one.name, one.what, True, (*one.flags, *kernel, *decode_only), {**fake, **one.fields}))
    return {contender.name: contender for contender in found}


def by_server(chosen: Iterable[Contender]) -> list[list[Contender]]:
    """Contenders that one started server serves, in the order in which the servers are first needed."""
    groups: dict[tuple[bool, tuple[str, ...]], list[Contender]] = {}
    for one in chosen:
        groups.setdefault((one.dyncp, one.flags), []).append(one)
    return list(groups.values())
