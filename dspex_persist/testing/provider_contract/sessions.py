"""Sessions begin, resume, stay alive and end."""

import time
import uuid
from collections.abc import Callable
from datetime import UTC
from typing import Any

import pytest

from dspex_persist.state import commands, errors
from dspex_persist.state.commands import Command
from dspex_persist.state.model import Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.checks import let_pass, refused
from dspex_persist.testing.provider_contract.base import Contract


class SessionContract(Contract):
    """Sessions begin, resume, stay alive and end."""

    def test_begins_and_resumes(self, provider: StateProvider) -> None:
        session = uuid.uuid4().hex
        begun = provider.initialize_session(session)
        assert not begun.resumed
        assert begun.variables == ()
        provider.register_variable(session, "b", "integer", 1)
        provider.register_variable(session, "a", "integer", 2)
        resumed = provider.initialize_session(session)
        assert resumed.resumed
        variables = {variable.name: variable for variable in resumed.variables}
        assert variables == {name: provider.get_variable(session, name) for name in ("a", "b")}

    def test_tells_its_own_facts(self, provider: StateProvider, session: str) -> None:
        provider.initialize_session(session, {"user": "ada", "\U0001f600": ""})
        provider.register_variable(session, "x", "integer", 1)
        summary = provider.get_session(session)
        assert (summary.id, summary.variable_count, summary.tool_count) == (session, 1, 0)
        assert summary.metadata == {"user": "ada", "\U0001f600": ""}
        assert summary.created_at.tzinfo is UTC

    def test_resuming_merges_metadata_and_keeps_the_beginning(self, provider: StateProvider, session: str) -> None:
        begun = provider.get_session(session).created_at
        provider.initialize_session(session, {"a": "1", "b": "1"})
        provider.initialize_session(session, {"b": "2", "c": "2"})
        summary = provider.get_session(session)
        assert summary.metadata == {"a": "1", "b": "2", "c": "2"}
        assert summary.created_at == begun

    def test_every_request_for_an_unknown_session_fails(self, provider: StateProvider) -> None:
        unknown = uuid.uuid4().hex
        requests: list[Command[Any]] = [
            commands.GetSession(unknown),
            commands.RegisterVariable(unknown, "x", "integer", Value("1")),
            commands.GetVariable(unknown, "x"),
            commands.GetVariables(unknown, ("x",)),
            commands.SetVariable(unknown, "x", Value("1")),
            commands.SetVariables(unknown, {"x": Value("1")}),
            commands.SetVariables(unknown, {"x": Value("1")}, atomic=True),
            commands.ListVariables(unknown),
            commands.DeleteVariable(unknown, "x"),
            commands.GetVariableHistory(unknown, "x"),
            commands.RollbackVariable(unknown, "x", 0),
            commands.AddDependency(unknown, "x", "y"),
            commands.StartOptimization(unknown, "x", "optimizer"),
            commands.StopOptimization(unknown, "x"),
        ]
        for command in requests:
            error = refused(provider.submit(command))
            assert isinstance(error, errors.SessionNotFoundError), command
            assert "not found" in str(error)
            assert error.session_id == unknown
        with pytest.raises(errors.SessionNotFoundError):
            provider.watch(unknown)

    def test_a_heartbeat_tells_whether_it_lives(self, provider: StateProvider, session: str) -> None:
        assert provider.heartbeat(session) is True
        assert provider.heartbeat(uuid.uuid4().hex) is False

    def test_cleaning_up_counts_what_went_and_may_be_repeated(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 1)
        provider.register_variable(session, "y", "integer", 1)
        assert provider.cleanup_session(session) == 2
        assert provider.cleanup_session(session) == 0
        assert provider.heartbeat(session) is False
        with pytest.raises(errors.SessionNotFoundError):
            provider.get_session(session)

    def test_the_same_id_begins_a_session_with_a_history_of_its_own(
        self, provider: StateProvider, session: str
    ) -> None:
        provider.initialize_session(session, {"old": "yes"})
        old = provider.register_variable(session, "x", "integer", 1)
        provider.register_variable(session, "only before", "integer", 1)
        provider.set_variable(session, "x", 2)
        provider.cleanup_session(session)
        assert not provider.initialize_session(session, {"new": "yes"}).resumed
        assert provider.get_session(session).metadata == {"new": "yes"}
        assert provider.list_variables(session) == ()
        new = provider.register_variable(session, "x", "string", "other type")
        assert new != old
        assert [version.version for version in provider.get_variable_history(session, "x")] == [0]
        for gone in (old, "only before"):
            with pytest.raises(errors.VariableNotFoundError):
                provider.get_variable_history(session, gone)

    def test_expires_when_unused_for_its_ttl(self, provider: StateProvider) -> None:
        session = uuid.uuid4().hex
        provider.initialize_session(session, {"ttl_seconds": "0.3"})
        provider.register_variable(session, "x", "integer", 1)
        let_pass(0.33)
        assert provider.heartbeat(session) is False
        for ask in (provider.get_session, provider.list_variables):
            with pytest.raises(errors.SessionNotFoundError):
                ask(session)
        with pytest.raises(errors.SessionNotFoundError):
            provider.set_variable(session, "x", 2)
        assert provider.cleanup_session(session) == 0
        assert not provider.initialize_session(session).resumed
        assert provider.list_variables(session) == ()

    def test_every_use_restarts_its_ttl(self, provider: StateProvider) -> None:
        session = uuid.uuid4().hex
        ttl_s = 0.5
        provider.initialize_session(session, {"ttl_seconds": str(ttl_s)})
        provider.register_variable(session, "x", "integer", 1)
        touches: list[Callable[[], object]] = [
            lambda: provider.heartbeat(session),
            lambda: provider.get_variable(session, "x"),
            lambda: provider.set_variable(session, "x", 1),
        ]
        begun = touched = time.monotonic()
        while time.monotonic() - begun < 1.5 * ttl_s:
            now, last = time.monotonic(), touched
            touches[0]()
            touched = time.monotonic()
            touches.append(touches.pop(0))
            if touched - last < ttl_s:
                assert provider.heartbeat(session), f"ended {touched - last:.3f} s after a touch ({now - begun:.3f})"
            let_pass(0.05)
        assert provider.heartbeat(session)

    def test_a_ttl_of_zero_is_for_ever(self, provider: StateProvider) -> None:
        session = uuid.uuid4().hex
        provider.initialize_session(session, {"ttl_seconds": "0.2"})
        provider.initialize_session(session, {"ttl_seconds": "0"})
        let_pass(0.25)
        assert provider.heartbeat(session)

    @pytest.mark.parametrize("text", ["soon", "-1", "nan", "inf", "", "1e300"])
    def test_an_invalid_ttl_is_refused(self, provider: StateProvider, session: str, text: str) -> None:
        with pytest.raises(errors.InvalidArgumentError, match="ttl_seconds"):
            provider.initialize_session(session, {"ttl_seconds": text})
        assert "ttl_seconds" not in provider.get_session(session).metadata
