"""What a client over gRPC does by itself."""

import getpass
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import snakepit_bridge_pb2 as pb
import snakepit_bridge_pb2_grpc as stubs

from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.commands import GetVariable, GetVariableHistory
from dspex_persist.state.errors import InternalError, LimitExceededError
from dspex_persist.state.model import Origin
from tests.deadline import within

NOBODY = "127.0.0.1:1"


class Newer(stubs.BridgeServiceServicer):  # type: ignore[misc, unused-ignore]
    """A server that knows kinds of changes and updates that this release does not."""

    def GetVariableHistory(self, request: Any, context: Any) -> Any:
        return pb.GetVariableHistoryResponse(entries=[pb.VariableHistoryEntry(metadata={"dspex.change": "newer"})])

    def WatchVariables(self, request: Any, context: Any) -> Iterator[Any]:
        context.send_initial_metadata((("x-dspex-position", "0"), ("x-dspex-initial-values", "0")))
        yield pb.VariableUpdate(update_type="newer", update_metadata={"commit_sequence": "1"})


@pytest.fixture
def newer(tmp_path: Path) -> Iterator[str]:
    """Where one is."""
    address = f"unix:{tmp_path}/newer"
    with ThreadPoolExecutor(2) as threads:
        server = grpc.server(threads)
        stubs.add_BridgeServiceServicer_to_server(Newer(), server)
        server.add_insecure_port(address)
        server.start()
        yield address
        server.stop(None).wait()


def test_a_user_without_a_name_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr(getpass, "getuser", unknown)
    with BridgedState(NOBODY) as state:
        assert state.default_origin("SetVariable").actor == f"user:{os.getuid()}"


def test_a_header_that_is_too_long_is_called_what_python_calls_it() -> None:
    with BridgedState(NOBODY) as state:
        refused = state.submit(GetVariable("s", "x"), Origin("a" * 256, "read")).exception()
    assert isinstance(refused, LimitExceededError)
    assert "the length of actor" in str(refused)


def test_an_answer_that_cannot_be_read_is_an_error(newer: str) -> None:
    with BridgedState(newer) as state:
        refused = state.submit(GetVariableHistory("s", "x")).exception(within(20))
        assert isinstance(refused, InternalError)
        assert "'newer' is not a valid ChangeKind" in str(refused)


def test_an_update_that_cannot_be_read_ends_the_watch(newer: str) -> None:
    with (
        BridgedState(newer) as state,
        state.watch("s") as watch,
        pytest.raises(InternalError, match="'newer' is not a valid UpdateKind"),
    ):
        watch.next(within(20))
