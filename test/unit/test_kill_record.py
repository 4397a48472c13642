"""The kill benchmark without a server: its record can be gone on with, and what a server leaves is told from what libraries keep."""

from __future__ import annotations

import getpass
import json
from pathlib import Path

from benchmark.serving.kill import Record
from benchmark.serving.leftovers import temporary_files

REPOSITORY = Path(__file__).resolve().parents[2]


def test_the_published_record_is_read_and_written_as_it_is() -> None:
    result = json.loads((REPOSITORY / "benchmark" / "results" / "operate.json").read_text())
    written = Record.read(result).as_result()
    assert written == {name: result[name] for name in written}
    assert set(result) - set(written) == {"command", "machine"}


def test_what_is_left_in_a_servers_own_folder(tmp_path: Path) -> None:
    for name in ("tmpabc", "sglang_dcp_x", getpass.getuser()):
        (tmp_path / name).mkdir()
    assert temporary_files(tmp_path) == ["temporary sglang_dcp_x", "temporary tmpabc"]
    assert temporary_files(None) == []
