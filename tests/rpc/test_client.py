"""What a client over gRPC does without asking its server."""

import getpass
import os

import pytest

from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.commands import GetVariable
from dspex_persist.state.errors import LimitExceededError
from dspex_persist.state.model import Origin

NOBODY = "127.0.0.1:1"


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
