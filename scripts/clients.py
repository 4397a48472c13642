"""What do benchmark clients call time per token? Each is run, in an environment of its own, against a server that answers by the clock.

    python -m scripts.clients [--client NAME] [--environments FOLDER] [--out benchmark/results/clients.json]

The server's first token comes after a known time and the others at a known pace, one or several to a chunk, so the truth needs no
measurement. Downloads several GB; not for CI. --environments keeps the environments (FOLDER/NAME), and uses those that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmark.serving.provenance import provenance
from scripts.client_runs.clients import CLIENTS, Client, Load
from scripts.client_runs.paced import Paced
from testing.recall import model_path

FIRST_S, TOKEN_S = 0.4, 0.02
NUM_REQUESTS, CONCURRENCY = 12, 2
TOKENS_PER_CHUNK = (1, 4)
LIMIT_S = 300


def environment(client: Client, folder: Path) -> Path:
    """The folder with the client's programs; made on first use. Raises FileNotFoundError where no Python is new enough for it."""
    if not client.package:
        return Path(sys.executable).parent
    home = folder / client.name
    if not home.is_dir():
        names = [f"python3.{minor}" for minor in range(client.python, 15)]
        python = sys.executable if sys.version_info[1] >= client.python else next(filter(None, map(shutil.which, names)), None)
        if python is None:
            raise FileNotFoundError(f"{client.package} needs Python 3.{client.python} or newer: none of {', '.join(names)} is installed")
        subprocess.run([python, "-m", "venv", str(home)], check=True)
        subprocess.run([str(home / "bin" / "pip"), "-q", "install", client.package], check=True)
    return home / "bin"


def run(client: Client, bin_folder: Path, tokens_per_chunk: int) -> dict[str, Any]:
    """The client's own figures, and how many requests reached the server. A client that does not end in time is stopped; its report
    counts where it wrote one."""
    paced = Paced(FIRST_S, TOKEN_S, tokens_per_chunk, "paced")
    server = paced.start()
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            # Some clients take a path for the name of a hub's repository, unless it is a relative one.
            shutil.copytree(model_path("qwen3moe"), folder / "tokenizer")
            load = Load(f"http://127.0.0.1:{server.server_address[1]}", "paced", Path("./tokenizer"), NUM_REQUESTS, CONCURRENCY)
            command = client.command(load, folder, bin_folder)
            try:
                done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, timeout=LIMIT_S, check=False)
                code: int | None = done.returncode
            except subprocess.TimeoutExpired:
                code = None
            figures = client.read(folder)
    finally:
        server.shutdown()
        server.server_close()
    return {"tokens_per_chunk": tokens_per_chunk, "exit_code": code, "sent": paced.served, **figures}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--client", action="append", choices=[client.name for client in CLIENTS], help="only this one; may be repeated")
    parser.add_argument("--environments", type=Path, help="keep the clients' environments here (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=Path("benchmark/results/clients.json"))
    args = parser.parse_args()
    truth = {"ttft_ms": 1000 * FIRST_S, "token_ms": 1000 * TOKEN_S, "requests": NUM_REQUESTS}
    result: dict[str, Any] = provenance("python -m scripts.clients") | {"truth": truth, "clients": {}}
    if args.out.is_file():
        result["clients"] = json.loads(args.out.read_text(encoding="utf-8"))["clients"]
    with tempfile.TemporaryDirectory() as temporary:
        for client in CLIENTS:
            if args.client and client.name not in args.client:
                continue
            bin_folder = environment(client, args.environments or Path(temporary))
            runs = [run(client, bin_folder, count) for count in TOKENS_PER_CHUNK]
            version = client.package.partition("==")[2] or Path("UPSTREAM_VERSION").read_text().strip()
            result["clients"][client.name] = {"version": version, "tpot": client.tpot, "itl": client.itl, "runs": runs}
            print(json.dumps({client.name: runs}), flush=True)
            args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
