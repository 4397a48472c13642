"""Which attention layers entered our path in a step with sharded rows: all of them, or the server ends.

A layer that SGLang ran past it attended by token ids that lie in another instance's pool: a wrong answer, which nothing else shows.
"""

from __future__ import annotations

from collections.abc import Mapping


class LayerMissedError(RuntimeError):
    """Attention layers of a sharded step ran outside our path; the message names rank, step and layers."""


class LayerRoll:
    """names: of the model's attention layers by layer id, as found at load (`attention_layers`)."""

    def __init__(self, names: Mapping[int, str]) -> None:
        self._names = dict(names)
        self._everybody = set(self._names)
        self._entered: set[int] = set()
        self.is_open = False

    def enter(self, layer_id: int) -> None:
        self._entered.add(layer_id)

    def open(self) -> None:
        """A graph's layers follow: they are recorded once and replayed without us."""
        self.is_open = True

    def close(self, where: str) -> None:
        """Behind the last layer. LayerMissedError unless all have entered since the last close. where: rank and step, for the message."""
        entered, self._entered, self.is_open = self._entered, set(), False
        if entered == self._everybody:
            return
        missed = [self._names[layer_id] for layer_id in sorted(self._everybody - entered)]
        unknown = sorted(entered - self._everybody)
        reasons = (
            [f"{len(missed)} of {len(self._names)} attention layers did not enter the sharded path: {', '.join(missed)}"] if missed else []
        )
        reasons += [f"layers with ids {unknown} entered it, which the model did not have at load"] if unknown else []
        raise LayerMissedError(f"{where}: {'; '.join(reasons)}")
