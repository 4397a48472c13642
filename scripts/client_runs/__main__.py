"""What do benchmark clients call time per token? Each is run, in an environment of its own, against a server that answers by the clock.

    python scripts/clients.py [--client NAME] [--environments FOLDER] [--out benchmark/results/clients.json]

The server's first token comes after a known time and the others at a known pace, one or several to a chunk, so the truth needs no
measurement. Then each is run against a real server on the CPU that shards every request, beside what that server says itself.
Downloads several GB; not for CI. --environments keeps the environments (FOLDER/NAME), and uses those that are there.
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
from scripts.client_runs.served import MODEL, SERVER, Books
from testing.recall import model_path
from testing.server import Server, running_server

FIRST_S, TOKEN_S = 0.4, 0.02
NUM_REQUESTS, NUM_SERVED, CONCURRENCY = 12, 24, 2
TOKENS_PER_CHUNK = (1, 4)
LIMIT_S = 300


def environment(client: Client, folder: Path) -> Path:
    """The folder with the client's programs; made on first use. Raises FileNotFoundError where no Python is new enough for it."""
    if not client.package:
        return Path(sys.executable).parent
    home = folder / client.name
    if not home.is_dir():
        names = [f"python3.{minor}" for minor in range(client.python, 15)]
        python = sys.executable if sys.version_info[1] >= client.python else next(filter(_runs, names), None)
        if python is None:
            raise FileNotFoundError(f"{client.package} needs Python 3.{client.python} or newer: none of {', '.join(names)} is installed")
        subprocess.run([python, "-m", "venv", str(home)], check=True)
        subprocess.run([str(home / "bin" / "pip"), "-q", "install", client.package], check=True)
    return home / "bin"


def _runs(name: str) -> bool:
    """A name may be found and yet not run: pyenv has one for every version that it could select."""
    path = shutil.which(name)
    return path is not None and subprocess.run([path, "-c", ""], capture_output=True, check=False).returncode == 0


def call(client: Client, bin_folder: Path, url: str, model: str, num_requests: int) -> dict[str, Any]:
    """The client's own figures. A client that does not end in time is stopped; its report counts where it wrote one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # Some clients take a path for the name of a hub's repository, unless it is a relative one.
        shutil.copytree(model_path("qwen3moe"), folder / "tokenizer")
        command = client.command(Load(url, model, Path("./tokenizer"), num_requests, CONCURRENCY), folder, bin_folder)
        try:
            done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, timeout=LIMIT_S, check=False)
            code: int | None = done.returncode
        except subprocess.TimeoutExpired:
            code = None
        return {"exit_code": code, **client.read(folder)}


def paced_run(client: Client, bin_folder: Path, tokens_per_chunk: int) -> dict[str, Any]:
    """Against the server that answers by the clock. sent: requests that reached it."""
    paced = Paced(FIRST_S, TOKEN_S, tokens_per_chunk, "paced")
    server = paced.start()
    try:
        figures = call(client, bin_folder, f"http://127.0.0.1:{server.server_address[1]}", "paced", NUM_REQUESTS)
    finally:
        server.shutdown()
        server.server_close()
    return {"tokens_per_chunk": tokens_per_chunk, "sent": paced.served, **figures}


def served_run(client: Client, bin_folder: Path, server: Server) -> dict[str, Any]:
    """Against a server of ours; what it says itself is in `server`."""
    before = Books.of(server.client)
    figures = call(client, bin_folder, f"http://127.0.0.1:{server.port}", MODEL, NUM_SERVED)
    return {"asked": NUM_SERVED, "server": Books.of(server.client).since(before), **figures}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--client", action="append", choices=[client.name for client in CLIENTS], help="only this one; may be repeated")
    parser.add_argument("--environments", type=Path, help="keep the clients' environments here (default: a temporary folder)")
    parser.add_argument("--out", type=Path, default=Path("benchmark/results/clients.json"))
    args = parser.parse_args()
    wanted = [client for client in CLIENTS if not args.client or client.name in args.client]
    truth = {"ttft_ms": 1000 * FIRST_S, "token_ms": 1000 * TOKEN_S, "requests": NUM_REQUESTS}
    result: dict[str, Any] = provenance("python scripts/clients.py") | {"truth": truth, "clients": {}}
    if args.out.is_file():
        result["clients"] = json.loads(args.out.read_text(encoding="utf-8"))["clients"]
    with tempfile.TemporaryDirectory() as temporary:
        folders = {client.name: environment(client, args.environments or Path(temporary)) for client in wanted}
        for client in wanted:
            runs = [paced_run(client, folders[client.name], count) for count in TOKENS_PER_CHUNK]
            version = client.package.partition("==")[2] or Path("UPSTREAM_VERSION").read_text().strip()
            names = {"version": version, "tpot": client.tpot, "itl": client.itl, "compare": client.compare}
            keep(args.out, result, client.name, names | {"runs": runs})
        with running_server(SERVER) as server:
            for client in wanted:
                keep(args.out, result, client.name, {"served": served_run(client, folders[client.name], server)})
    return 0


def keep(file: Path, result: dict[str, Any], name: str, told: dict[str, Any]) -> None:
    """What is known so far, written at once: a later client may fail."""
    print(json.dumps({name: told}), flush=True)
    result["clients"].setdefault(name, {}).update(told)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
