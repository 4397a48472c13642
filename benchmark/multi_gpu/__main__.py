"""One call on a machine with 2, 4 or 8 GPUs measures everything that needs several, and writes one JSON and a table.

    python scripts/multi_gpu_report.py [--parts a,b,c,d,e,f] [--out FILE] [--limit e=2400]
    python scripts/multi_gpu_report.py --dry [--servers]      on the CPU with gloo and 4 ranks (--num-gpus 8: as many as a node has)

Parts: (a) transports, (b) served tokens of degrees 1 to N against stock, (c) DeepEP and dyncp together, (d) step time by degree, (e) stock
data parallelism against dyncp, (f) the cost model beside every figure. docs/multi_gpu.md describes them. The JSON is written after each
part. Exit code 1 when a part failed; a part that cannot run here is skipped with the reason.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmark.multi_gpu.run import build_settings, run_report
from benchmark.multi_gpu.settings import ROOT


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("multi_gpu_report.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="a,b,c,d,e,f", help="letters, in this order; (f) reads what is there")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmark" / "results" / "multi_gpu.json")
    parser.add_argument("--work", type=Path, help="folder for server logs and models (default: a new one under the temporary folder)")
    parser.add_argument("--num-gpus", type=int, help="use so many of the GPUs (default: all; with --dry so many processes, default 4)")
    models = ["qwen3-235b-a22b", "deepseek-v3"]
    parser.add_argument("--model", default=models[0], choices=models, help="layer shapes of (d), (e)")
    parser.add_argument("--layers", type=int, default=4, help="layers of that model (default: 4)")
    parser.add_argument("--cost-model", help="--dyncp-cost-model of our servers of (c), (d), (e) (default: none, as users start them)")
    parser.add_argument("--tpot-ms", type=float, default=50.0, help="limit of the P99 time per output token in (e)")
    modes = ["auto", "normal", "own-batch"]
    parser.add_argument("--deepep-mode", choices=modes, help="the only one of (c) (default: auto, then normal if that fails)")
    parser.add_argument("--limit", action="append", default=[], metavar="PART=SECONDS", help="time limit of one part")
    parser.add_argument("--quick", action="store_true", help="shorter limits and arrivals: everything in 9 minutes")
    parser.add_argument("--total", type=float, metavar="SECONDS", help="end of the whole report (default with --quick: 540)")
    parser.add_argument("--commit", help="commit to record where the tree has no git history")
    parser.add_argument("--dry", action="store_true", help="on the CPU: part (a) over gloo, and (f)")
    parser.add_argument("--servers", action="store_true", help="with --dry: also start servers of the tiny test model (minutes)")
    parser.add_argument("--kill-rank", type=int, help="rank of part (a) that ends itself: for the test of this report")
    return parser.parse_args(argv)


def main() -> int:
    arguments = parse()
    work = arguments.work or Path(tempfile.mkdtemp(prefix="dyncp_multi_gpu_"))
    return run_report(build_settings(arguments, work.resolve()), arguments.parts.split(","), arguments.commit)


if __name__ == "__main__":
    sys.exit(main())
