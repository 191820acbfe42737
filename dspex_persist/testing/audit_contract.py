"""The contract of every provider that is `Auditable`, as tests. A backend subclasses `AuditContract`.

The tests read values of sensitive variables, so a server under test needs `audit_reveal`.
"""

from typing import Any

import pytest

from dspex_persist.state import commands, errors
from dspex_persist.state.abilities import Auditable
from dspex_persist.state.audit import CommitQuery, ExecutionQuery, HistoryQuery, SessionQuery
from dspex_persist.state.model import REASON, ChangeKind, Origin, Source, Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.checks import check_invalid
from dspex_persist.testing.provider_contract.base import Contract


def write_x(provider: StateProvider, session: str) -> None:
    """Have `ada` register x (1), and write 2 and 3."""
    ada = Origin("ada", "RegisterVariable", Source.ELIXIR)
    provider.submit(commands.RegisterVariable(session, "x", "integer", Value("1")), ada).result()
    for number in (2, 3):
        write = commands.SetVariable(session, "x", Value(str(number)), {"n": str(number)})
        provider.submit(write, Origin("ada", "SetVariable", Source.ELIXIR)).result()


class AuditContract(Contract):
    """Queries of the history."""

    @pytest.fixture
    def audited(self, provider: StateProvider, session: str) -> str:
        """A session in which `ada` has registered x (1), and written 2 and 3."""
        write_x(provider, session)
        return session

    def test_it_claims_to_be_audited(self, provider: StateProvider) -> None:
        assert isinstance(provider, Auditable)

    def test_the_versions_of_a_variable(self, provider: StateProvider, audited: str) -> None:
        with Auditable.of(provider).audit() as audit:
            entries = list(audit.iterate(HistoryQuery(session=audited, variable="x")))
            versions = provider.get_variable_history(audited, "x")
            assert [(each.version, each.value, each.sequence) for each in entries] == [
                (each.version, each.value, each.sequence) for each in versions
            ]
            assert [(each.kind, each.actor, each.source) for each in entries] == [
                (kind, "ada", Source.ELIXIR) for kind in (ChangeKind.SET, ChangeKind.SET, ChangeKind.REGISTERED)
            ]
            (third,) = audit.iterate(HistoryQuery(session=audited, where=("= 3",)))
            assert audit.version(audited, third.variable_id, 2) == third
            oldest = audit.iterate(HistoryQuery(session=audited, newest_first=False, limit=1))
            assert [each.version for each in oldest] == [0]

    def test_who_and_why(self, provider: StateProvider, session: str) -> None:
        why = "ticket 1201:\ntoo high, naïvely"
        provider.register_variable(session, "x", "integer", 1, metadata={"unit": "s"}, actor="ada", reason="begin")
        provider.set_variable(session, "x", 2, metadata={"n": "2"}, actor="bob", reason=why)
        with Auditable.of(provider).audit() as audit:
            newest, first = audit.iterate(HistoryQuery(session=session, variable="x"))
            assert (newest.actor, newest.reason, newest.metadata) == ("bob", why, {"n": "2"})
            assert (first.actor, first.reason, first.metadata) == ("ada", "begin", {"unit": "s"})
            (state,) = audit.state(session)
            assert (state.actor, state.reason, state.metadata) == ("bob", why, {"unit": "s", "n": "2"})
            assert list(audit.iterate(HistoryQuery(session=session, metadata={REASON: why}))) == [newest]
            provider.set_variable(session, "x", 3)
            assert audit.state(session)[0].reason is None

    def test_why_a_commit_was_made(self, provider: StateProvider, session: str) -> None:
        for name in ("x", "y"):
            provider.register_variable(session, name, "integer", 1, reason="begin")
        provider.set_variables(session, {"x": 2, "y": 2}, reason="both\nat once")
        provider.set_variable(session, "x", 3)
        provider.delete_variable(session, "y", reason="done")
        with Auditable.of(provider).audit() as audit:
            commits = audit.iterate(CommitQuery(session=session, newest_first=False))
            assert [each.reason for each in commits] == [None, "begin", "begin", "both\nat once", None, "done"]

    def test_page_by_page(self, provider: StateProvider, audited: str) -> None:
        with Auditable.of(provider).audit() as audit:
            query, after, versions = HistoryQuery(session=audited), None, list[int]()
            while True:
                page = audit.page(query, after, 1)
                versions += [each.version for each in page.rows]
                after = page.after
                if after is None:
                    break
            assert versions == [2, 1, 0]

    def test_commits_and_sessions(self, provider: StateProvider, audited: str) -> None:
        provider.cleanup_session(audited)
        with Auditable.of(provider).audit() as audit:
            commits = list(audit.iterate(CommitQuery(session=audited, newest_first=False)))
            assert [each.cause for each in commits] == [
                "InitializeSession",
                "RegisterVariable",
                *["SetVariable"] * 2,
                "CleanupSession",
            ]
            assert audit.head() >= commits[-1].sequence
            (entry,) = audit.iterate(SessionQuery(session=audited))
            assert (entry.variables, entry.commits, entry.executions) == (1, 5, 0)
            assert (entry.started_sequence, entry.ended_sequence) == (commits[0].sequence, commits[-1].sequence)
            assert list(audit.iterate(SessionQuery(session=audited, live=True))) == []
            assert list(audit.iterate(ExecutionQuery(session=audited))) == []

    def test_a_glob_has_stars_and_question_marks_alone(self, provider: StateProvider, session: str) -> None:
        marks = "[0-9].^$+(){}|\\"
        for name in ("n7", f"n{marks}", f"n{marks}8", f"N{marks}8"):
            provider.register_variable(session, name, "integer", 1)
        with Auditable.of(provider).audit() as audit:
            for glob, wanted in {
                f"n{marks}*": [f"n{marks}", f"n{marks}8"],
                f"?{marks}?": [f"n{marks}8", f"N{marks}8"],
                "n[0-9]?*": [f"n{marks}", f"n{marks}8"],
                "*[0-9]": [],
            }.items():
                query = HistoryQuery(session=session, variable=glob, newest_first=False)
                assert [each.name for each in audit.iterate(query)] == wanted

    def test_the_state_as_of_a_point(self, provider: StateProvider, audited: str) -> None:
        second = provider.get_variable_history(audited, "x")[1].sequence
        with Auditable.of(provider).audit() as audit:
            assert [each.value for each in audit.state(audited)] == [Value("3")]
            assert [each.value for each in audit.state(audited, str(second))] == [Value("2")]
            assert [each.value for each in audit.state(audited, f"{second}^")] == [Value("1")]
            assert audit.resolve(f"{second}^") == second - 1
            (difference,) = audit.diff(audited, f"{second}^", "now")
            assert difference.name == "x"

    def test_sensitive_values_are_masked_unless_revealed_on_request(
        self, provider: StateProvider, audited: str
    ) -> None:
        provider.set_variable(audited, "x", 4, metadata={"sensitive": "true"})
        with Auditable.of(provider).audit() as audit:
            history = audit.iterate(HistoryQuery(session=audited))
            assert {(each.value, each.masked) for each in history} == {(None, True)}
            assert [(each.value, each.masked) for each in audit.state(audited)] == [(None, True)]
        with Auditable.of(provider).audit(reveal=True) as audit:
            assert [each.value for each in audit.state(audited)] == [Value("4")]
            newest = next(audit.iterate(HistoryQuery(session=audited)))
            assert (newest.value, newest.masked) == (Value("4"), False)

    def test_it_sees_what_was_acknowledged_before_it_is_asked(self, provider: StateProvider, audited: str) -> None:
        with Auditable.of(provider).audit() as audit:
            for number in range(4, 8):
                version = provider.set_variable(audited, "x", number)
                assert next(audit.iterate(HistoryQuery(session=audited))).version == version

    def test_what_never_was(self, provider: StateProvider, session: str) -> None:
        with Auditable.of(provider).audit() as audit:
            for ask in (
                lambda: audit.state("unknown"),
                lambda: audit.execution("exec_1_none"),
                lambda: audit.version(session, "nothing", 0),
            ):
                with pytest.raises(errors.NotInHistoryError):
                    ask()
            with pytest.raises(errors.InvalidArgumentError):
                audit.resolve("soon")

    @pytest.mark.parametrize("wrong", ["yes", 1, None])
    def test_a_flag_of_a_wrong_type(self, provider: StateProvider, wrong: Any) -> None:
        reason = f"it must be True or False, not {'None' if wrong is None else type(wrong).__name__}"
        check_invalid(lambda: Auditable.of(provider).audit(reveal=wrong), "reveal", reason)
