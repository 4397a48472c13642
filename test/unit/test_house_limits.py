"""How large files and functions may be, where files may lie, and that the protocol needs no tensors."""

from __future__ import annotations

import ast
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = REPOSITORY / "python" / "sglang_dcp"
LINE_LIMIT, MEDIAN_LIMIT, FUNCTION_LIMIT, DRIVER_METHOD_LIMIT = 300, 90, 50, 15
FOLDERS = ("python", "benchmark", "scripts", "testing", "sgl-kernel-dcp")
KEPT_AS_IT_RAN = {"testing/models/train_recall.py"}
"""How the weights of the test models were made: nothing imports more of it than its prompts, and nothing runs it again."""


def files() -> list[Path]:
    found = (path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*.py"))
    return sorted(path for path in found if "build" not in path.parts)


def name_of(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def num_lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def functions(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Name and lines of every function, wherever it stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.name, (node.end_lineno or node.lineno) - node.lineno + 1


@pytest.mark.parametrize("path", [path for path in files() if name_of(path) not in KEPT_AS_IT_RAN], ids=name_of)
def test_functions_are_short(path: Path) -> None:
    long = [f"{name} has {length} lines" for name, length in functions(ast.parse(path.read_text())) if length > FUNCTION_LIMIT]
    assert long == [], f"{name_of(path)}: the limit is {FUNCTION_LIMIT}"


def test_files_are_short() -> None:
    lengths = {name_of(path): num_lines(path) for path in files()}
    assert len(lengths) > 200
    assert {name for name, lines in lengths.items() if lines > LINE_LIMIT} == KEPT_AS_IT_RAN
    assert statistics.median(num_lines(path) for path in PACKAGE.rglob("*.py") if num_lines(path)) <= MEDIAN_LIMIT


def test_what_touches_sglang_lies_in_a_room() -> None:
    assert [path.name for path in (PACKAGE / "upstream").glob("*.py")] == ["__init__.py"]


def test_the_step_is_read_on_one_screen() -> None:
    """A method of the driver is a few lines that call others, and they stand in the order of a step."""
    tree = ast.parse((PACKAGE / "upstream" / "step" / "driver.py").read_text())
    methods = dict(functions(tree))
    assert list(methods) == ["__init__", "rejoin", "secure", "allocate", "tell", "settle", "launch", "account"]
    assert {name: lines for name, lines in methods.items() if lines > DRIVER_METHOD_LIMIT} == {}


def test_handlers_of_the_step_are_one_call() -> None:
    tree = ast.parse((PACKAGE / "upstream" / "step" / "handlers.py").read_text())
    bodies = {node.name: len(node.body) for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert len(bodies) > 4
    assert {name: statements for name, statements in bodies.items() if statements > 3} == {}, "a docstring and one call or two"


def test_the_counters_count() -> None:
    tree = ast.parse("def f():\n    def g():\n        pass\n    return g")
    assert list(functions(tree)) == [("f", 4), ("g", 2)]


PROTOCOL_ALONE = """
import sys
for name in ("torch", "sglang"):
    sys.modules[name] = None  # importing it raises
from sglang_dcp.ledger.participant import Participant
from sglang_dcp.ledger.cluster import Cluster
from sglang_dcp.policy.cost_model import load_cost_model
from sglang_dcp.policy.split_limits import Layout, SplitLimits

class Pool:
    def __init__(self):
        self.free = list(range(1, 9))
    def num_givable_pages(self):
        return len(self.free)
    def take_pages(self, count):
        if count > len(self.free):
            return None
        taken, self.free = self.free[:count], self.free[count:]
        return taken
    def return_pages(self, pages):
        self.free += pages

cluster = Cluster(SplitLimits(8, 2, 8, Layout(2, 2)), 16, load_cost_model(sys.argv[1], 2))
both = [Participant(cluster, rank, Pool()) for rank in range(2)]

def step():
    columns = [one.build_columns(None, one.pool.num_givable_pages(), 0, 0) for one in both]
    most = [one.read_columns(columns) for one in both]
    words = [one.own_words for one in both] if max(most) else None
    assert both[0].finish_step(words, True) == both[1].finish_step(words, True)

request = both[0].open_request()
both[0].ask_admission(request, [(1, 5), (0, 2)], flexible=False)
for _ in range(3):
    step()
assert request.ready and request.shards == (1, 0)
assert [one.pool.num_givable_pages() for one in both] == [6, 3]
both[0].release(request)
step()
assert [one.pool.num_givable_pages() for one in both] == [8, 8] and not both[1].busy()
assert sys.modules["torch"] is None
"""


def test_the_protocol_runs_without_torch() -> None:
    """A reservation over two instances, its pages, and the way back: where importing torch or sglang raises."""
    from sglang_dcp.policy.cost_model import available_cost_models

    command = [sys.executable, "-c", PROTOCOL_ALONE, available_cost_models()[0]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
