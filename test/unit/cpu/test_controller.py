"""The waiting router loop hands on every request in order and keeps its watchdog fed while nothing comes."""

from __future__ import annotations

import sys
import types

import pytest

from sglang_dcp.cpu.controller import POLL_MILLISECONDS, event_loop


class EndOfTest(Exception):
    pass


class FakeSocket:
    """Yields scripted polls: a request, None for "nothing came", or "gone" for a message that is not there after all."""

    def __init__(self, script: list[str | None]) -> None:
        self.script = script
        self.waits: list[int] = []

    def poll(self, milliseconds: int) -> int:
        self.waits.append(milliseconds)
        if not self.script:
            raise EndOfTest
        if self.script[0] is None:
            self.script.pop(0)
            return 0
        return 1


@pytest.fixture
def fake_receive(monkeypatch: pytest.MonkeyPatch) -> None:
    import zmq

    def sock_recv(socket: FakeSocket, flags: int) -> str:
        assert flags == zmq.NOBLOCK
        request = socket.script.pop(0)
        assert request is not None
        if request == "gone":
            raise zmq.ZMQError
        return request

    module = types.ModuleType("sglang.srt.managers.io_struct")
    module.sock_recv = sock_recv
    for name in ("sglang", "sglang.srt", "sglang.srt.managers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "sglang.srt.managers.io_struct", module)


@pytest.mark.usefixtures("fake_receive")
def test_requests_are_handed_on_in_order() -> None:
    fed: list[int] = []
    handed_on: list[str] = []
    socket = FakeSocket(["a", None, "gone", "b", None, "c"])
    controller = types.SimpleNamespace(
        soft_watchdog=types.SimpleNamespace(feed=lambda: fed.append(1)), recv_from_tokenizer=socket, _request_dispatcher=handed_on.append
    )
    with pytest.raises(EndOfTest):
        event_loop(controller)
    assert handed_on == ["a", "b", "c"]
    assert len(fed) == 7
    assert set(socket.waits) == {POLL_MILLISECONDS}
