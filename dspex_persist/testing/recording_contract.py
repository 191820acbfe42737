"""The contract of every provider that is `Recordable`, as tests. A backend subclasses `RecordingContract`, and
`EndedRecordingContract` if it keeps ended sessions.

The tests record values of sensitive variables, so a server under test needs `audit_reveal`.
"""

import io
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from dspex_persist.state import commands, errors
from dspex_persist.state.abilities import Recordable
from dspex_persist.state.model import REASON, ChangeKind, EventKind, Origin, Source, Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.recording import Header, RecordedCommit, RecordedVersion, read_recording, write_recording
from dspex_persist.testing.checks import check_invalid, shown
from dspex_persist.testing.provider_contract.arguments import WRONG_TEXTS
from dspex_persist.testing.provider_contract.base import Contract
from dspex_persist.testing.provider_contract.values import BINARY_VALUES, EXACT_VALUES

SENSITIVE = {"sensitive": "true"}


def recorded(provider: StateProvider, session: str, **options: Any) -> tuple[Header, tuple[RecordedCommit, ...]]:
    """Return a recording with all its commits."""
    header, commits = Recordable.of(provider).record(session, **options)
    return header, tuple(commits)


def versions_in(commits: Sequence[RecordedCommit]) -> list[RecordedVersion]:
    return [version for commit in commits for version in commit.versions]


class RecordingContract(Contract):
    """The whole log of a live session."""

    def test_it_claims_to_record(self, provider: StateProvider) -> None:
        assert isinstance(provider, Recordable)

    def test_every_commit_is_there_in_its_order(self, provider: StateProvider, session: str) -> None:
        ada = Origin("ada", "SetVariable", Source.ELIXIR)
        provider.register_variable(session, "x", "integer", 1, metadata={"unit": "m"}, constraints={"min": 0})
        provider.submit(commands.SetVariable(session, "x", Value("2"), {"why": "so"}), ada).result()
        provider.register_variable(session, "y", "integer", 0)
        provider.set_variables(session, {"x": 3, "y": 4})
        provider.add_dependency(session, "y", "x", "uses")
        provider.rollback_variable(session, "x", 0)
        provider.delete_variable(session, "y")
        header, commits = recorded(provider, session)
        assert header == Header(session, len(commits), masked=False)
        assert [commit.number for commit in commits] == list(range(1, 9))
        assert [commit.cause for commit in commits] == [
            "InitializeSession",
            "RegisterVariable",
            "SetVariable",
            "RegisterVariable",
            "SetVariables",
            "AddDependency",
            "RollbackVariable",
            "DeleteVariable",
        ]
        assert commits[2].actor == "ada"
        assert all(one.at <= other.at and one.sequence < other.sequence for one, other in pairwise(commits))
        versions = versions_in(commits)
        assert [(each.name, each.version, each.kind, each.value and each.value.json) for each in versions] == [
            ("x", 0, ChangeKind.REGISTERED, "1"),
            ("x", 1, ChangeKind.SET, "2"),
            ("y", 0, ChangeKind.REGISTERED, "0"),
            ("x", 2, ChangeKind.SET, "3"),
            ("y", 1, ChangeKind.SET, "4"),
            ("x", 3, ChangeKind.ROLLED_BACK, "1"),
            ("y", 2, ChangeKind.DELETED, None),
        ]
        second = versions_in(commits)[1]
        assert (second.source, second.metadata) == (Source.ELIXIR, {"why": "so"})
        kinds = [event.kind for commit in commits for event in commit.events]
        assert kinds == [
            EventKind.SESSION_STARTED,
            EventKind.VARIABLE_REGISTERED,
            EventKind.VARIABLE_REGISTERED,
            EventKind.DEPENDENCY_ADDED,
        ]

    def test_the_reasons_are_in_it(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0, metadata={"unit": "m"}, reason="begin")
        provider.set_variable(session, "x", 1, reason="because\nß")
        provider.delete_variable(session, "x", reason="enough")
        _, commits = recorded(provider, session)
        assert [each.metadata for each in versions_in(commits)] == [
            {"unit": "m", REASON: "begin"},
            {REASON: "because\nß"},
            {REASON: "enough"},
        ]

    def test_its_commits_are_those_of_the_history(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        for number in range(1, 6):
            provider.set_variable(session, "x", number)
        _, commits = recorded(provider, session)
        history = provider.get_variable_history(session, "x")[::-1]
        assert [commit.sequence for commit in commits[1:]] == [version.sequence for version in history]
        assert [commit.at for commit in commits[1:]] == [version.created_at for version in history]
        assert [each.value for each in versions_in(commits)] == [version.value for version in history]

    def test_recorded_values_of_all_types_are_exact(self, provider: StateProvider, session: str) -> None:
        for number, (type_name, value) in enumerate(EXACT_VALUES):
            provider.register_variable(session, f"v{number}", type_name, value)
        for number, (type_name, binary) in enumerate(BINARY_VALUES):
            provider.run(commands.RegisterVariable(session, f"b{number}", type_name, binary))
        _, commits = recorded(provider, session)
        kept = {variable.name: variable.value for variable in provider.list_variables(session)}
        assert {each.name: each.value for each in versions_in(commits)} == kept

    def test_written_to_a_file_and_read_again_it_is_the_same(self, provider: StateProvider, session: str) -> None:
        provider.initialize_session(session, {"user": "ada \U0001f600"})
        provider.register_variable(session, "x", "string", "a\nb\u2028\U0001f600")
        provider.start_optimization(session, "x", "optimizer", {"trials": "5"})
        header, commits = recorded(provider, session)
        file = io.StringIO()
        write_recording(header, commits, file)
        file.seek(0)
        again, read = read_recording(file)
        assert (again, tuple(read)) == (header, commits)

    def test_what_is_sensitive_by_now_is_left_out_unless_it_is_asked_for(
        self, provider: StateProvider, session: str
    ) -> None:
        provider.register_variable(session, "open", "integer", 1)
        provider.register_variable(session, "secret", "integer", 1)
        provider.set_variable(session, "secret", 2, metadata=SENSITIVE)
        header, commits = recorded(provider, session)
        assert header.masked
        assert [(each.name, each.value, each.masked) for each in versions_in(commits)] == [
            ("open", Value("1"), False),
            ("secret", None, True),
            ("secret", None, True),
        ]
        revealed, shown_commits = recorded(provider, session, reveal=True)
        assert revealed == replace(header, masked=False)
        assert [each.value for each in versions_in(shown_commits)] == [Value("1"), Value("1"), Value("2")]

    def test_what_comes_later_is_not_in_it(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        header, commits = Recordable.of(provider).record(session)
        provider.set_variable(session, "x", 1)
        assert [commit.number for commit in commits] == list(range(1, header.commits + 1)) == [1, 2]

    def test_without_those_that_are_known(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        for number in range(3):
            provider.set_variable(session, "x", number, idempotency_key=f"key-{number}")
        header, commits = recorded(provider, session, reveal=True)
        for after in range(len(commits) + 2):
            assert recorded(provider, session, reveal=True, after=after) == (header, commits[after:])

    def test_many_commits(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "string", "")
        pending = [provider.submit(commands.SetVariable(session, "x", Value(f'"{"x" * 1000}"'))) for _ in range(700)]
        for future in pending:
            future.result()
        header, commits = recorded(provider, session)
        assert header.commits == len(commits) == 702
        assert versions_in(commits)[-1].version == 700

    def test_leaving_it_half_read_does_no_harm(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        for _ in range(3):
            _, commits = Recordable.of(provider).record(session)
            assert next(commits).number == 1
            del commits
        assert provider.set_variable(session, "x", 1) == 1

    def test_a_session_that_never_was_has_no_recording(self, provider: StateProvider) -> None:
        with pytest.raises(errors.NotInHistoryError):
            recorded(provider, "unknown")

    def test_the_session_that_began_with_a_commit(self, provider: StateProvider, session: str) -> None:
        began = recorded(provider, session)[1][0].sequence
        assert recorded(provider, session, started=began) == recorded(provider, session)
        with pytest.raises(errors.InvalidArgumentError, match=f"began with commit {began}, not {began + 1}"):
            recorded(provider, session, started=began + 1)

    @pytest.mark.parametrize(("wrong", "reason"), WRONG_TEXTS, ids=shown)
    def test_a_session_id_of_a_wrong_type(self, provider: StateProvider, wrong: Any, reason: str) -> None:
        check_invalid(lambda: Recordable.of(provider).record(wrong), "session_id", reason)

    def test_other_arguments_of_a_wrong_type(self, provider: StateProvider, session: str) -> None:
        wrong: Any
        for wrong in ("1", 1.0, True, -1, 2**63):
            with pytest.raises(errors.InvalidArgumentError, match=r"^invalid started: "):
                Recordable.of(provider).record(session, started=wrong)
            with pytest.raises(errors.InvalidArgumentError, match=r"^invalid after: "):
                Recordable.of(provider).record(session, after=wrong)
        for wrong in (1, "yes", None):
            with pytest.raises(errors.InvalidArgumentError, match=r"^invalid reveal: "):
                Recordable.of(provider).record(session, reveal=wrong)


class EndedRecordingContract(Contract):
    """The whole log of an ended session."""

    def test_a_session_that_has_ended(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        provider.cleanup_session(session)
        header, commits = recorded(provider, session)
        assert header.commits == len(commits) == 3
        assert [event.kind for event in commits[-1].events] == [EventKind.SESSION_ENDED]

    def test_of_those_that_had_one_id_the_newest_or_the_one_that_is_named(
        self, provider: StateProvider, session: str
    ) -> None:
        provider.register_variable(session, "x", "integer", 0)
        provider.cleanup_session(session)
        ended = recorded(provider, session)
        provider.initialize_session(session)
        assert recorded(provider, session)[0].commits == 1
        assert recorded(provider, session, started=ended[1][0].sequence) == ended
