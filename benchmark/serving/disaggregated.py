"""Answers of a decode server behind prefill servers beside those of one large pool, by degree, on this machine's CPU.

    python -m benchmark.serving.disaggregated [--models qwen3moe deepseek_v2] [--go-on] [--out FILE]

Two prefill servers feed one decode server of four instances: one with this package, which sends each page of a request once, and stock
SGLang, which sends all of them to each of its shards. Every prompt is asked through both, several at once.
Exit code 1, with the figures written: an answer is another one, or a page was sent more or less often than that.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmark.serving.provenance import ROOT, provenance
from testing.client import Answer
from testing.comparison import TIE_GAP, compare_output
from testing.disaggregation import Pair, decode_server, prefill_server, running_pairs
from testing.dyncp_grid import INSTANCES, POOL_TOKENS, PROMPTS, PinnedPrompt, stock_server
from testing.recall import MODEL_NAMES
from testing.server import ServerConfig, server_pool
from testing.stock_answers import FOREVER
from testing.transfers import pages_sent, probed

AT_ONCE = 8
NEW_TOKENS = 24
"""Far beyond a prompt's answer, of which the model is sure: its log-probabilities are 0 to the last bit, whatever attention rounds."""
UNSURE = -0.01
"""Log-probability of a token that shows a difference."""
TOLERANCE = 1e-4
WITH, STOCK = "with this package", "stock"


def ask_all(pair: Pair, prompts: Sequence[PinnedPrompt]) -> list[Answer]:
    """Several at once, each on its shards."""

    def ask(prompt: PinnedPrompt) -> Answer:
        pin = {"custom_params": {"dyncp": {"degree": prompt.degree, "home": prompt.home}}}
        answer = pair.generate(prompt.text, max_new_tokens=NEW_TOKENS, logprobs=True, sampling=FOREVER | pin)
        found = answer.meta["dyncp"]
        assert (found["degree_start"], found["home"]) == (prompt.degree, prompt.home), found
        return answer

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(ask, prompts))


def figures(references: Sequence[Answer], answers: Sequence[Answer], pages: float) -> dict[str, Any]:
    """What is kept of the answers of a degree. worst: largest difference of log-probabilities, of output tokens before the first near tie.
    unsure: those of them that can show one. other_outputs: what differs before it. pages: sent for them all; as copies of their K/V."""
    compared, others, unsure = [], [], 0
    for reference, answer in zip(references, answers, strict=True):
        try:
            compared.append(compare_output(reference, answer))
            unsure += sum(token.logprob < UNSURE for token in reference.output_tokens[: compared[-1].num_compared])
        except (AssertionError, ValueError) as error:  # another token, or fewer of them
            others.append(str(error))
    lengths = [answer.meta["prompt_tokens"] for answer in answers]
    return {
        "requests": len(answers),
        "longest_prompt": max(lengths),
        "tokens_compared": sum(one.num_compared for one in compared),
        "tokens_unsure": unsure,
        "tokens_behind_a_tie": sum(one.num_skipped for one in compared),
        "worst": max((one.worst for one in compared), default=None),
        "other_outputs": others,
        "copies": pages / sum(-(-length // ServerConfig.page_size) for length in lengths),
    }


def find_faults(case: dict[str, Any]) -> list[str]:
    """One line for each degree whose answers are not those of one pool, or whose pages were not sent as often as they should be."""
    faults = []
    for degree, found in case["degrees"].items():
        copies = 1 if case["prefill"] == WITH else int(degree)
        where = f"{case['model']}, prefill server {case['prefill']}, degree {degree}"
        if found["other_outputs"]:
            faults.append(f"{where}: {found['other_outputs']}")
        if not found["tokens_unsure"] or found["worst"] is None or not found["worst"] < TOLERANCE:
            faults.append(f"{where}: {found['tokens_unsure']} tokens that can differ, worst difference {found['worst']}, limit {TOLERANCE}")
        if found["copies"] != copies:
            faults.append(f"{where}: {found['copies']} copies sent, not {copies}")
    return faults


def run_model(model: str, folder: Path) -> Iterator[dict[str, Any]]:
    """A case per prefill server. folder: for their probes."""
    with server_pool(ROOT / "logs") as servers:
        client = servers.get(stock_server(model)).client
        references = [client.generate(prompt.text, max_new_tokens=NEW_TOKENS, logprobs=True, sampling=FOREVER) for prompt in PROMPTS]
        folders = {name: folder / name for name in (WITH, STOCK)}
        for one in folders.values():
            one.mkdir()
        prefills = [probed(prefill_server(model), one, stock=name == STOCK) for name, one in folders.items()]
        with running_pairs(servers, prefills, decode_server(model, INSTANCES, POOL_TOKENS)) as pairs:
            for (name, one), pair in zip(folders.items(), pairs, strict=True):
                degrees = {str(degree): run_degree(pair, one, references, degree) for degree in range(1, INSTANCES + 1)}
                yield {"model": model, "prefill": name, "degrees": degrees}


def run_degree(pair: Pair, folder: Path, references: Sequence[Answer], degree: int) -> dict[str, Any]:
    jobs = [(prompt, reference) for prompt, reference in zip(PROMPTS, references, strict=True) if prompt.degree == degree]
    before = pages_sent(folder)
    answers = ask_all(pair, [prompt for prompt, _ in jobs])
    return figures([reference for _, reference in jobs], answers, pages_sent(folder) - before)


def as_report(head: dict[str, Any], cases: list[dict[str, Any]], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """The cases, and those of other models in an earlier report, with the commands and commits of all. head: of this command."""
    if earlier is not None:
        models = {case["model"] for case in cases}
        if kept := [case for case in earlier["cases"] if case["model"] not in models]:
            cases = [*kept, *cases]
            head = head | {name: "; ".join(dict.fromkeys([*earlier[name].split("; "), head[name]])) for name in ("command", "commit")}
    asked = {"instances": INSTANCES, "pool_tokens": POOL_TOKENS, "at_once": AT_ONCE, "new_tokens": NEW_TOKENS, "tie_gap": TIE_GAP}
    return head | asked | {"cases": cases}


def require_mooncake() -> None:
    try:
        importlib.import_module("mooncake.engine")
    except ImportError as error:
        raise SystemExit(f"{error}: install mooncake-transfer-engine-non-cuda, and Debian's libibverbs1 that it loads") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODEL_NAMES, default=list(MODEL_NAMES))
    parser.add_argument("--go-on", action="store_true", help="keep what FILE has of other models")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark" / "results" / "disaggregated.json")
    arguments = parser.parse_args()
    require_mooncake()
    head = provenance(f"python -m benchmark.serving.disaggregated --models {' '.join(arguments.models)}{' --go-on' * arguments.go_on}")
    cases: list[dict[str, Any]] = []
    for model in arguments.models:  # others on this machine get their servers in between
        with TemporaryDirectory() as folder:
            for case in run_model(model, Path(folder)):
                print(json.dumps(case), flush=True)
                cases.append(case)
        earlier = json.loads(arguments.out.read_text()) if arguments.go_on else None
        arguments.out.write_text(json.dumps(as_report(head, cases, earlier), indent=1) + "\n")
    faults = [fault for case in cases for fault in find_faults(case)]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
