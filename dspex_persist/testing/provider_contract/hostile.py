"""Hostile ids, names and texts are plain strings or refused: they are never interpreted and affect nothing else."""

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

from dspex_persist.state import commands, errors
from dspex_persist.state.commands import Command
from dspex_persist.state.model import Origin, Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.checks import NOT_THERE, REFUSALS, names_of, refused, shown, take
from dspex_persist.testing.provider_contract.base import Contract

HOSTILE_TEXTS = [
    "'; DROP TABLE sessions; --",
    '" OR 1=1 --',
    "../../../etc/passwd",
    "/dev/null",
    ".",
    "a\0b",
    "line\nfeed\r\ttab",
    "\x7f",
    "\x1b[31mred",
    "x" * 10_000,
    "\U0001f4a9\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u202eright to left\u200b",
    "e\u0301 is not \u00e9",
    "\ud800",
    "trailing\udfff",
    "%s%n{0}{session}",
    "$(reboot) `reboot` ${HOME}",
    "<script>alert(1)</script>",
    "*",
    "?",
    "[a-z]*",
    "%",
    "_",
    "\\",
    " ",
    "null",
    "NaN",
    "0",
    "-1",
    ":memory:",
    "__class__",
    "main.sqlite_master",
    "\u65e5\u672c\u8a9e",
]


class HostileInputContract(Contract):
    """Hostile ids, names and texts are plain strings or refused: they are never interpreted and affect nothing else."""

    @pytest.fixture
    def bystander(self, provider: StateProvider) -> Iterator[None]:
        """Another session, which must be unchanged afterwards."""
        provider.initialize_session(bystander := uuid.uuid4().hex, {"by": "stander"})
        provider.register_variable(bystander, "x", "integer", 1)
        before = provider.get_session(bystander), provider.list_variables(bystander)
        yield
        assert (provider.get_session(bystander), provider.list_variables(bystander)) == before
        assert provider.set_variable(bystander, "x", 2) == 1

    @pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=shown)
    def test_as_the_id_of_a_session(self, provider: StateProvider, text: str) -> None:
        for command in _everything_about(text, "x"):
            error = refused(provider.submit(command))
            assert error is None or isinstance(error, NOT_THERE), (command, error)
        with pytest.raises(NOT_THERE):
            provider.watch(text)
        error = refused(provider.submit(commands.InitializeSession(text)))
        if error is not None:
            assert isinstance(error, REFUSALS)
            return
        assert provider.get_session(text).id == text
        provider.register_variable(text, "x", "integer", 1)
        assert provider.set_variable(text, "x", 2) == 1
        assert len(provider.get_variable_history(text, "x")) == 2
        assert provider.cleanup_session(text) == 1
        assert provider.heartbeat(text) is False

    @pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=shown)
    def test_as_the_name_of_a_variable(self, provider: StateProvider, session: str, text: str) -> None:
        provider.register_variable(session, "other", "integer", 1)
        for command in _everything_about(session, text):
            error = refused(provider.submit(command))
            assert error is None or isinstance(error, NOT_THERE), (command, error)
        with pytest.raises(NOT_THERE):
            provider.watch(session, [text])
        error = refused(provider.submit(commands.RegisterVariable(session, text, "integer", Value("1"))))
        if error is not None:
            assert isinstance(error, REFUSALS)
            assert names_of(provider.list_variables(session)) == ["other"]
            return
        variable_id = provider.get_variable(session, text).id
        assert provider.get_variable(session, variable_id).name == text
        with provider.watch(session, [text]) as watch:
            assert provider.set_variables(session, {text: 2, "other": 2}).versions[text] == 1
            provider.add_dependency(session, text, "other")
            assert names_of(take(watch, 1)) == [text]
        assert text in names_of(provider.list_variables(session, text))
        assert provider.rollback_variable(session, text, 0).version == 2
        assert [version.version for version in provider.get_variable_history(session, text)] == [2, 1, 0]
        provider.delete_variable(session, text)
        assert names_of(provider.list_variables(session)) == ["other"]

    @pytest.mark.parametrize("text", HOSTILE_TEXTS, ids=shown)
    def test_as_metadata_and_in_every_other_field(self, provider: StateProvider, session: str, text: str) -> None:
        provider.register_variable(session, "x", "integer", 1)
        provider.register_variable(session, "y", "integer", 1)
        actor = Origin(text, "SetVariable")
        keyed = Origin("ada", "SetVariable", idempotency_key=text)
        requests: list[tuple[Command[Any], Origin | None]] = [
            (commands.InitializeSession(session, {text: text}), None),
            (commands.SetVariable(session, "x", Value("2"), {text: text}), None),
            (commands.SetVariable(session, "x", Value("3")), actor),
            (commands.SetVariable(session, "x", Value("4")), keyed),
            (commands.AddDependency(session, "x", "y", text), None),
            (commands.StartOptimization(session, "x", text, {text: text}), None),
            (commands.RegisterVariable(session, "z", "integer", Value("1"), text), None),
            (commands.RegisterVariable(session, "z", text, Value("1")), None),
            (commands.SetVariable(session, "y", Value(text)), None),
            (commands.ListVariables(session, text), None),
        ]
        possible = (
            *REFUSALS,
            errors.InvalidValueError,
            errors.InvalidConstraintsError,
            errors.UnknownTypeError,
        )
        for command, origin in requests:
            error = refused(provider.submit(command, origin))
            assert error is None or isinstance(error, possible), (command, error)
        metadata = provider.get_session(session).metadata
        assert metadata in ({}, {text: text})
        for version in provider.get_variable_history(session, "x"):
            assert version.metadata in ({}, {text: text})

    @pytest.mark.parametrize("number", [2**31, 2**63, 2**70, -(2**31), -(2**70)])
    def test_numbers_out_of_all_bounds(self, provider: StateProvider, session: str, number: int) -> None:
        provider.register_variable(session, "x", "integer", 1)
        requests: list[Command[Any]] = [
            commands.SetVariable(session, "x", Value("1"), expected_version=number),
            commands.GetVariableHistory(session, "x", limit=number),
            commands.RollbackVariable(session, "x", number),
        ]
        for command in requests:
            error = refused(provider.submit(command))
            assert isinstance(error, (*REFUSALS, errors.VersionConflictError, errors.VersionNotFoundError)), error
        with pytest.raises(errors.InvalidArgumentError):
            provider.watch(session, after_sequence=number)
        paged = provider.submit(commands.GetVariableHistory(session, "x", before=number))
        error = refused(paged)
        assert error is None or isinstance(error, (*REFUSALS, errors.UnsupportedError)), error


def _everything_about(session: str, variable: str) -> list[Command[Any]]:
    """Return every command that fails, or finds nothing, if the session or the variable does not exist."""
    return [
        commands.GetSession(session),
        commands.Heartbeat(session),
        commands.GetVariable(session, variable),
        commands.GetVariable(session, variable, bypass_cache=True),
        commands.GetVariables(session, (variable,)),
        commands.SetVariable(session, variable, Value("1")),
        commands.SetVariables(session, {variable: Value("1")}),
        commands.DeleteVariable(session, variable),
        commands.GetVariableHistory(session, variable),
        commands.RollbackVariable(session, variable, 0),
        commands.AddDependency(session, variable, variable),
        commands.StartOptimization(session, variable, "optimizer"),
        commands.StopOptimization(session, variable),
        commands.ListVariables(session, variable),
    ]
