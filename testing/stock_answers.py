"""What stock SGLang with one large pool answers: asked once per model and test run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from testing.client import Answer, Client
from testing.conversations import Conversation, hold_all
from testing.dyncp_grid import GROWING, PROMPTS, stock_server
from testing.server import Server, ServerConfig

FOREVER = {"ignore_eos": True}


@dataclass(frozen=True)
class Reference:
    """Answers to PROMPTS and to GROWING, and conversations, with log-probabilities."""

    prompts: list[Answer]
    growing: list[Answer]
    conversations: list[Conversation]


class StockAnswers:
    """of(model) -> Reference. Starts a stock server, unless `collect` was called while one was up."""

    def __init__(self, serve: Callable[[ServerConfig], Server]) -> None:
        self._serve = serve
        self._references: dict[str, Reference] = {}

    def collect(self, model: str, client: Client) -> None:
        """Asks a running stock server of the model."""
        if model in self._references:
            return
        prompts = [client.generate(p.text, max_new_tokens=p.max_new_tokens, logprobs=True) for p in PROMPTS]
        growing = [client.generate(p.text, max_new_tokens=count, logprobs=True, sampling=FOREVER) for p, count in GROWING]
        self._references[model] = Reference(prompts, growing, hold_all(client))

    def of(self, model: str) -> Reference:
        if model not in self._references:
            self.collect(model, self._serve(stock_server(model)).client)
        return self._references[model]
