"""`make demo`: four instances of a tiny model with 1,024-token pools serve a 3,500-token prompt, on the CPU.

Real SGLang, real HTTP, real processes. Short requests run beside the long one; at the end the answer, the load of every instance
while the long request ran, and where that request lived. Exit code 0 if every answer is right.

`make watch` (--keep) goes on with such requests until it is interrupted, to be looked at in a browser.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from testing.client import Client
from testing.metrics import LoadSampler, format_loads
from testing.recall import RecallPrompt, recall_prompt
from testing.server import Server, ServerConfig, server_pool

REPOSITORY = Path(__file__).resolve().parents[1]

INSTANCES = 4
POOL_TOKENS = 1024
LONG_PROMPT = 3500
SHORT_REQUESTS = 8
TIME_LIMIT_S = 240.0
USERS = 6


@dataclass(frozen=True)
class Outcome:
    """One request's end. `text` is what the client saw."""

    prompt: RecallPrompt
    request_id: str
    text: str
    seconds: float

    @property
    def is_right(self) -> bool:
        return self.text == self.prompt.answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="go on with requests until Ctrl-C")
    keep = parser.parse_args().keep
    started = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then too
    config = ServerConfig(
        "qwen3moe", INSTANCES, pool_tokens=POOL_TOKENS, page_size=16, chunk_tokens=256, dyncp=True, flags=("--enable-metrics",)
    )
    with server_pool(REPOSITORY / "logs") as servers:  # waits, and says so, while another test run has a server
        print(f"Starting SGLang: {INSTANCES} instances, {POOL_TOKENS:,} KV tokens each. Log: logs/", flush=True)
        with ticking("starting"):
            server = servers.get(config)
        print(f"Up after {server.start_s:.0f} s. Watch it: http://127.0.0.1:{server.port}/dyncp/live")
        print(f"or in another terminal: {typed('top', server)}\n", flush=True)
        is_right = show(server)
        if keep:
            print("\nGoing on with requests. Ctrl-C ends it.", flush=True)
            go_on(server.client)
    print(f"\nServer stopped. {time.monotonic() - started:.0f} s in all.")
    return 0 if is_right else 1


def show(server: Server) -> bool:
    """Sends the load, prints what came of it, returns whether every answer is right."""
    long_prompt = recall_prompt(LONG_PROMPT, 0.3, seed=11)
    shorts = [recall_prompt(60 + 10 * i, 0.5, seed=100 + i) for i in range(SHORT_REQUESTS)]
    print(f"Sending a prompt of {LONG_PROMPT:,} tokens with a pass key in it and {SHORT_REQUESTS} short ones (OpenAI endpoint, streaming).")
    with LoadSampler(server.client) as sampler, ThreadPoolExecutor(SHORT_REQUESTS + 1) as executor:
        long_future = executor.submit(ask, server.client, long_prompt)
        short_futures = [executor.submit(ask, server.client, prompt) for prompt in shorts]
        long_outcome = long_future.result(timeout=TIME_LIMIT_S)
        short_outcomes = [future.result(timeout=TIME_LIMIT_S) for future in short_futures]
    right = sum(outcome.is_right for outcome in short_outcomes)
    verdict = "right" if long_outcome.is_right else f"WRONG, the key was {long_prompt.answer!r}"
    print(f"\nLong prompt:   ...{long_prompt.text[-12:]!r} -> {long_outcome.text!r} after {long_outcome.seconds:.1f} s: {verdict}")
    print(f"Short prompts: {right} of {SHORT_REQUESTS} right\n")
    print("Instances while the long request ran:")
    print(format_loads(sampler.fullest(), POOL_TOKENS))
    print(f"\n{typed(f'requests {long_outcome.request_id}', server)}")
    shown = show_request(server, long_outcome.request_id)
    return long_outcome.is_right and right == SHORT_REQUESTS and shown


def go_on(client: Client) -> None:
    """Requests of mixed lengths, some longer than a pool, a few at a time, until Ctrl-C."""
    lengths = random.Random(0)

    def user(number: int) -> None:
        while not over.is_set():
            length = lengths.choice((60, 120, 200, 400, 900, 1600) if number else (1600, 2400))
            with client.complete_stream(random_text(length, lengths), max_tokens=lengths.randint(100, 300), ignore_eos=True) as stream:
                for _ in stream.events():
                    if over.is_set():
                        return

    over = threading.Event()
    with ThreadPoolExecutor(USERS) as executor:
        users = [executor.submit(user, number) for number in range(USERS)]
        try:
            for task in users:
                task.result()
        except KeyboardInterrupt:
            pass
        finally:
            over.set()


def random_text(length: int, source: random.Random) -> str:
    """A byte is a token."""
    return "".join(source.choices("abcdefghijklmnopqrstuvwxyz ", k=length))


def ask(client: Client, prompt: RecallPrompt) -> Outcome:
    """One streaming request on the OpenAI completions endpoint."""
    started, text, request_id = time.monotonic(), "", ""
    with client.complete_stream(prompt.text, max_tokens=8) as stream:
        for event in stream.events():
            request_id = event["id"]
            text += "".join(choice["text"] for choice in event["choices"])
    return Outcome(prompt, request_id, text, time.monotonic() - started)


def show_request(server: Server, request_id: str) -> bool:
    """Home, shards and degree, by the command that a user would type."""
    command = [sys.executable, "-m", "sglang_dcp.cli.commands", "requests", request_id, "--port", str(server.port)]
    return subprocess.run(command, check=False).returncode == 0


def typed(words: str, server: Server) -> str:
    """A command of ours as one would type it here: its environment may not be the active one, and the port is not the default."""
    program = Path(sys.executable).parent / "sglang-dcp"
    shown = program.relative_to(Path.cwd()) if program.is_relative_to(Path.cwd()) else program
    return f"{shown} {words} --port {server.port}"


@contextmanager
def ticking(what: str) -> Iterator[None]:
    """Prints the seconds every 10 s, so that nobody takes the wait for a hang."""
    done = threading.Event()

    def tick() -> None:
        started = time.monotonic()
        while not done.wait(10.0):
            print(f"  {what}, {time.monotonic() - started:.0f} s (one to two minutes on 2 cores)", flush=True)

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; the server is stopped.")
