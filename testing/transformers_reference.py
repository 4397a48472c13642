"""Models of the tests in Hugging Face transformers: the reference that knows nothing of SGLang."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from testing.models import train_recall
from testing.recall import EOS, model_path


def load_reference(name: str) -> Any:
    """The model in float32 on one thread, ready for inference."""
    return train_recall.load(model_path(name)).eval()


def load_checkpoint(folder: Path) -> Any:
    """Of any folder, in float32. Its attention is written out: some others leave out sinks."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


@torch.no_grad()
def score(model: Any, ids: Sequence[int]) -> list[float]:
    """Natural log-probabilities of ids[1:], each given what stands before it."""
    logits = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0, :-1]
    scores = torch.log_softmax(logits.float(), dim=-1)
    return scores.gather(1, torch.tensor(list(ids[1:])).unsqueeze(1)).squeeze(1).tolist()


@torch.no_grad()
def generate_greedily(model: Any, ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """Argmax tokens until the end-of-sequence token (included) or `max_new_tokens`. Recomputes the prefix: no cache to trust."""
    sequence = list(ids)
    for _ in range(max_new_tokens):
        logits = model(input_ids=torch.tensor([sequence]), use_cache=False, logits_to_keep=1).logits[0, -1]
        sequence.append(int(logits.argmax()))
        if sequence[-1] == EOS:
            break
    return sequence[len(ids) :]
