"""The OpenAI client (package openai) against a server whose prompts are sharded: models, chats, streams with usage, tools, responses."""

from __future__ import annotations

import openai
import pytest

from testing.recall import recall_prompt
from testing.server import Server

TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}},
}
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def client(contract_server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{contract_server.port}/v1", api_key="none", max_retries=0, timeout=180)


@pytest.fixture(scope="module")
def model(client: openai.OpenAI) -> str:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id
    return model.id


def test_a_prompt_longer_than_a_pool(client: openai.OpenAI, model: str) -> None:
    prompt = recall_prompt(1500, depth=0.3, seed=21)
    whole = client.completions.create(model=model, prompt=prompt.ids, max_tokens=len(prompt.answer), temperature=0)
    assert whole.choices[0].text == prompt.answer
    stream = client.completions.create(
        model=model,
        prompt=prompt.text,
        max_tokens=len(prompt.answer),
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"return_meta_info": True},
    )
    *chunks, last = list(stream)
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == prompt.answer
    assert last.choices == [] and last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (1500, len(prompt.answer))
    assert last.usage.total_tokens == 1500 + len(prompt.answer)


def test_a_chat_and_its_stream(client: openai.OpenAI, model: str) -> None:
    options = {"model": model, "messages": HELLO, "max_tokens": 6, "temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = client.chat.completions.create(**options)
    assert whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 6
    *chunks, last = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert last.usage.model_dump() == whole.usage.model_dump()


def test_tools_are_served_as_stock_serves_them(client: openai.OpenAI, model: str) -> None:
    """Without a --tool-call-parser the answer is text, whether tools are offered or not."""
    options = {"model": model, "messages": HELLO, "max_tokens": 4, "temperature": 0, "extra_body": {"ignore_eos": True}}
    plain = client.chat.completions.create(**options).choices[0]
    offered = client.chat.completions.create(**options, tools=[TOOL], tool_choice="auto").choices[0]
    assert not offered.message.tool_calls and offered.message.content == plain.message.content
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**options, tools=[TOOL], tool_choice={"type": "function", "function": {"name": "subtract"}})


def test_responses(client: openai.OpenAI, model: str) -> None:
    """SGLang keeps two tokens of max_output_tokens back."""
    chat = client.chat.completions.create(model=model, messages=HELLO, max_tokens=6, temperature=0)
    answer = client.responses.create(model=model, input="hello", max_output_tokens=8, temperature=0)
    assert answer.status in ("completed", "incomplete") and answer.output_text == chat.choices[0].message.content
    assert answer.usage is not None and answer.usage.input_tokens == chat.usage.prompt_tokens


def test_errors_arrive_as_the_clients_own(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError, match="exceed 2031 tokens"):
        client.completions.create(model=model, prompt=[9] * 3000, max_tokens=4)
    with pytest.raises(openai.BadRequestError, match=r"custom_params\.dyncp\.degree"):
        client.chat.completions.create(model=model, messages=HELLO, extra_body={"custom_params": {"dyncp": {"degree": 0}}})
