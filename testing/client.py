"""A small client of SGLang's HTTP endpoints: standard library only, one connection per request, safe to use from threads."""

from __future__ import annotations

import http.client
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from testing.recall import VOCABULARY_SIZE


class RequestFailed(RuntimeError):
    """The server answered with an error. `status` is the HTTP code, `message` the server's text."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"HTTP {status}: {message[:500]}")
        self.status = status
        self.message = message


@dataclass(frozen=True)
class Token:
    """One scored token. `top_gap`: log-probability of the best minus the second best at this place, None when not asked for."""

    id: int
    logprob: float
    top_gap: float | None = None


@dataclass(frozen=True)
class Answer:
    """Result of /generate. prompt_tokens holds scored tokens from the second prompt token on, when asked for."""

    text: str
    ids: tuple[int, ...]
    meta: dict[str, Any]
    prompt_tokens: tuple[Token, ...] = ()
    output_tokens: tuple[Token, ...] = ()

    @property
    def finish_reason(self) -> str:
        return str(self.meta["finish_reason"]["type"])


@dataclass
class Stream:
    """An open streaming answer. `close` before the end is what a client's disconnect looks like to the server."""

    connection: http.client.HTTPConnection
    response: http.client.HTTPResponse
    _closed: bool = field(default=False)

    def events(self) -> Iterator[dict[str, Any]]:
        """The JSON of every event until [DONE]. Raises RequestFailed on an error event."""
        for line in self.response:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                error = event["error"]
                raise RequestFailed(int(error.get("code") or self.response.status), str(error.get("message", error)))
            yield event

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self.response.close()
            self.connection.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


@dataclass(frozen=True)
class Client:
    """host, port: of the server. timeout_s bounds every wait for bytes."""

    port: int
    host: str = "127.0.0.1"
    timeout_s: float = 180.0

    def request(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> tuple[int, str]:
        """Status and body, whatever they are. headers: beside the content type."""
        connection, response = self._open(method, path, body, headers)
        try:
            return response.status, response.read().decode()
        finally:
            connection.close()

    def json(self, method: str, path: str, body: Any = None) -> Any:
        """The parsed body; RequestFailed unless the status is 200."""
        status, text = self.request(method, path, body)
        if status != 200:
            raise RequestFailed(status, text)
        return json.loads(text)

    def is_healthy(self) -> bool:
        try:
            return self.request("GET", "/health")[0] == 200
        except (OSError, http.client.HTTPException):
            return False

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = 8,
        logprobs: bool = False,
        sampling: dict[str, Any] | None = None,
        **fields: Any,
    ) -> Answer:
        """Greedy generation on /generate. logprobs: score all prompt and output tokens, with the gap between the best two.

        sampling: further sampling parameters (custom_params, ignore_eos ...); fields: further fields of the body (rid ...).
        """
        body = self._generate_body(prompt, max_new_tokens, sampling, fields)
        if logprobs:
            body |= {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}
        return _read_answer(self.json("POST", "/generate", body))

    def stream(
        self, prompt: str | Sequence[int], *, max_new_tokens: int = 8, sampling: dict[str, Any] | None = None, **fields: Any
    ) -> Stream:
        """Opens a streaming /generate. RequestFailed when the server refuses before the stream starts."""
        body = self._generate_body(prompt, max_new_tokens, sampling, fields) | {"stream": True}
        return self._open_stream("/generate", body)

    def chat(self, text: str, *, max_tokens: int = 8, **fields: Any) -> dict[str, Any]:
        """The OpenAI chat endpoint, without streaming. Needs a chat template at the server."""
        message = {"role": "user", "content": _checked_text(text)}
        body = {"model": "default", "messages": [message], "max_tokens": max_tokens, "temperature": 0}
        return dict(self.json("POST", "/v1/chat/completions", body | fields))

    def complete(self, text: str, *, max_tokens: int = 8, **fields: Any) -> dict[str, Any]:
        """The OpenAI completions endpoint, without streaming."""
        return dict(self.json("POST", "/v1/completions", _completion_body(text, max_tokens) | fields))

    def complete_stream(self, text: str, *, max_tokens: int = 8, **fields: Any) -> Stream:
        """The OpenAI completions endpoint, streaming."""
        return self._open_stream("/v1/completions", _completion_body(text, max_tokens) | fields | {"stream": True})

    def abort(self, rid: str) -> None:
        status, text = self.request("POST", "/abort_request", {"rid": rid})
        if status != 200:
            raise RequestFailed(status, text)

    def flush_cache(self) -> bool:
        """True when the server was idle and has dropped its cache."""
        return self.request("POST", "/flush_cache")[0] == 200

    def server_info(self) -> dict[str, Any]:
        return dict(self.json("GET", "/server_info"))

    def metrics(self) -> str:
        status, text = self.request("GET", "/metrics")
        if status not in (200, 307):
            raise RequestFailed(status, text)
        return text if status == 200 else self.request("GET", "/metrics/")[1]

    def _generate_body(
        self, prompt: str | Sequence[int], max_new_tokens: int, sampling: dict[str, Any] | None, fields: dict[str, Any]
    ) -> dict[str, Any]:
        key, value = ("text", _checked_text(prompt)) if isinstance(prompt, str) else ("input_ids", checked_ids(prompt))
        parameters = {"temperature": 0, "max_new_tokens": max_new_tokens} | (sampling or {})
        return {key: value, "sampling_params": parameters} | fields

    def _open(
        self, method: str, path: str, body: Any, headers: Mapping[str, str] | None = None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self.timeout_s)
        data = None if body is None else json.dumps(body)
        try:
            connection.request(method, path, data, ({"Content-Type": "application/json"} if data else {}) | dict(headers or {}))
            return connection, connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def _open_stream(self, path: str, body: dict[str, Any]) -> Stream:
        connection, response = self._open("POST", path, body)
        if response.status != 200:
            text = response.read().decode()
            connection.close()
            raise RequestFailed(response.status, text)
        return Stream(connection, response)


def checked_ids(ids: Sequence[int]) -> list[int]:
    """Ids that the model can embed. An id outside would not fail alone: it takes the whole server down."""
    values = list(ids)
    if not values:
        raise ValueError("input_ids is empty")
    wrong = [value for value in values if not 0 <= value < VOCABULARY_SIZE]
    if wrong:
        raise ValueError(f"input_ids outside [0, {VOCABULARY_SIZE}): {wrong[:5]}")
    return values


def _checked_text(text: str) -> str:
    if not text:
        raise ValueError("the prompt is empty")
    return text


def _completion_body(text: str, max_tokens: int) -> dict[str, Any]:
    return {"model": "default", "prompt": _checked_text(text), "max_tokens": max_tokens, "temperature": 0}


def _read_answer(reply: dict[str, Any]) -> Answer:
    meta = reply["meta_info"]
    return Answer(
        text=reply["text"],
        ids=tuple(reply.get("output_ids") or ()),
        meta=meta,
        prompt_tokens=_read_tokens(meta.get("input_token_logprobs"), meta.get("input_top_logprobs")),
        output_tokens=_read_tokens(meta.get("output_token_logprobs"), meta.get("output_top_logprobs")),
    )


def _read_tokens(scored: list[Any] | None, tops: list[Any] | None) -> tuple[Token, ...]:
    """SGLang's triples (logprob, id, text); the first prompt token has logprob None and is left out."""
    if not scored:
        return ()
    tokens = []
    for (logprob, token_id, *_), best in zip(scored, tops or [None] * len(scored), strict=True):
        if logprob is None:
            continue
        gap = best[0][0] - best[1][0] if best and len(best) > 1 else None
        tokens.append(Token(int(token_id), float(logprob), gap))
    return tuple(tokens)
