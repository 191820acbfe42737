"""The contract of every provider that is `Prunable`, as tests. A backend subclasses `PruneContract`.

A server under test needs `audit_prune`.
"""

from datetime import UTC, datetime, timedelta

import pytest

from dspex_persist.state import errors
from dspex_persist.state.abilities import Prunable
from dspex_persist.state.model import PrunePolicy, PruneReport
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.provider_contract.base import Contract


class PruneContract(Contract):
    """Old history is deleted permanently."""

    @pytest.fixture
    def grown(self, provider: StateProvider, session: str) -> str:
        """A session with the versions 0 to 9 of x, and 0 of y."""
        for name in ("x", "y"):
            provider.register_variable(session, name, "integer", 0)
        for number in range(1, 10):
            provider.set_variable(session, "x", number)
        return session

    def versions(self, provider: StateProvider, session: str, name: str = "x") -> list[int]:
        return [version.version for version in provider.get_variable_history(session, name)]

    def test_it_claims_to_prune(self, provider: StateProvider) -> None:
        assert isinstance(provider, Prunable)

    def test_the_newest_versions_stay(self, provider: StateProvider, grown: str) -> None:
        policy, before = PrunePolicy(keep_versions=3, session_id=grown), provider.list_variables(grown)
        report = Prunable.of(provider).prune(policy, confirm=True)
        assert (report.confirmed, report.sessions, report.versions) == (True, 1, 7)
        assert self.versions(provider, grown) == [9, 8, 7]
        assert self.versions(provider, grown, "y") == [0]
        assert provider.list_variables(grown) == before
        assert Prunable.of(provider).prune(policy, confirm=True) == PruneReport(True, 0, 0, 0, 0)

    def test_without_confirmation_it_only_counts(self, provider: StateProvider, grown: str) -> None:
        report = Prunable.of(provider).prune(PrunePolicy(keep_versions=3, session_id=grown), confirm=False)
        assert (report.confirmed, report.sessions, report.versions) == (False, 1, 7)
        assert len(self.versions(provider, grown)) == 10

    def test_what_is_young_enough_stays(self, provider: StateProvider, grown: str) -> None:
        written = provider.get_variable_history(grown, "x")[-1].created_at
        policy = PrunePolicy(keep_versions=1, before=written - timedelta(days=1), session_id=grown)
        assert Prunable.of(provider).prune(policy, confirm=True).versions == 0
        assert len(self.versions(provider, grown)) == 10

    def test_other_sessions_keep_theirs(self, provider: StateProvider, grown: str) -> None:
        other = f"{grown}-other"
        provider.initialize_session(other)
        provider.register_variable(other, "x", "integer", 0)
        provider.set_variable(other, "x", 1)
        Prunable.of(provider).prune(PrunePolicy(keep_versions=1, session_id=grown), confirm=True)
        assert self.versions(provider, grown) == [9]
        assert self.versions(provider, other) == [1, 0]

    def test_writing_goes_on_where_it_was(self, provider: StateProvider, grown: str) -> None:
        Prunable.of(provider).prune(PrunePolicy(keep_versions=1, session_id=grown), confirm=True)
        assert provider.set_variable(grown, "x", 10) == 10
        assert self.versions(provider, grown) == [10, 9]
        with pytest.raises(errors.StateError):
            provider.rollback_variable(grown, "x", 0)

    def test_an_ended_session_goes_as_a_whole(self, provider: StateProvider, grown: str) -> None:
        policy = PrunePolicy(ended_before=datetime.max.replace(tzinfo=UTC), session_id=grown)
        assert Prunable.of(provider).prune(policy, confirm=True).sessions == 0
        provider.cleanup_session(grown)
        assert Prunable.of(provider).prune(policy, confirm=True).versions == 11
        assert Prunable.of(provider).prune(policy, confirm=True).versions == 0

    def test_it_tells_how_far_it_has_come(self, provider: StateProvider, grown: str) -> None:
        reports: list[tuple[str, int, int]] = []
        policy = PrunePolicy(keep_versions=1, session_id=grown)
        Prunable.of(provider).prune(policy, confirm=True, progress=lambda *each: reports.append(each))
        assert all(what and 0 <= done <= in_all for what, done, in_all in reports)

    def test_what_progress_raises_ends_it(self, provider: StateProvider, grown: str) -> None:
        class EnoughError(Exception):
            pass

        reports: list[int] = []

        def leave(_what: str, done: int, _in_all: int) -> None:
            reports.append(done)
            raise EnoughError

        try:
            Prunable.of(provider).prune(PrunePolicy(keep_versions=1, session_id=grown), confirm=True, progress=leave)
        except EnoughError:
            assert reports
        assert provider.get_value(grown, "x") == 9

    def test_a_session_that_never_was_cannot_be_pruned(self, provider: StateProvider) -> None:
        with pytest.raises(errors.StateError):
            Prunable.of(provider).prune(PrunePolicy(keep_versions=1, session_id="unknown"), confirm=False)

    def test_nothing_said(self, provider: StateProvider) -> None:
        with pytest.raises(errors.InvalidArgumentError):
            Prunable.of(provider).prune(PrunePolicy(), confirm=True)
