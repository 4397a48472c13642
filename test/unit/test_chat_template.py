"""The chat templates of the test models render, with and without a generation prompt."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from testing.recall import MODELS

transformers = pytest.importorskip("transformers")

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
RENDERED = "system: Be brief.\nuser: hello\n"


@pytest.mark.parametrize("name", ["qwen3moe", "deepseek_v2"])
def test_template(name: str) -> None:
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(MODELS / name)
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == RENDERED
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False)
    assert len(ids) == len(RENDERED + "assistant: "), "a byte is a token, and nothing is added"
    assert tokenizer.decode(ids) == RENDERED + "assistant: "


def test_the_training_script_writes_the_same_tokenizer(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("train_recall", MODELS / "train_recall.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.write_tokenizer(tmp_path)
    assert not (tmp_path / "chat_template.jinja").exists()
    written = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert written.chat_template == transformers.AutoTokenizer.from_pretrained(MODELS / "qwen3moe").chat_template
