"""How many live sessions, and stored bytes in them, an identity may have."""

from pathlib import Path
from typing import Any

import pytest

import dspex_persist
from dspex_persist.audit import ExecutionQuery
from dspex_persist.infra.access.tokens import Allowance
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import QuotaExceededError, StorageError, VersionConflictError
from dspex_persist.state.model import PrunePolicy
from dspex_persist.state.store import maintenance

TEXT = "x" * 98
"""100 bytes as JSON."""


class Allowances(dict[str, Allowance]):
    def __missing__(self, _: str) -> Allowance:
        return Allowance()


@pytest.fixture
def allowances() -> Allowances:
    return Allowances()


def opened(path: Path, allowances: Allowances, **options: Any) -> EmbeddedState:
    state = EmbeddedState(path, actor="ada", **options)
    state.engine.limit_storage(allowances.__getitem__)
    return state


def test_live_sessions(tmp_path: Path, allowances: Allowances) -> None:
    with opened(tmp_path / "a.db", allowances) as state:
        state.initialize_session("before")
        allowances["ada"] = Allowance(sessions=2)
        state.initialize_session("one", actor="ada for user:bob")
        state.initialize_session("one")
        with pytest.raises(QuotaExceededError) as refused:
            state.initialize_session("two")
        assert str(refused.value).startswith(
            "ada may have 2 live sessions, and would have 3; nothing was done; end some"
        )
        with pytest.raises(QuotaExceededError):
            state.fork_session("one", "two")
        state.initialize_session("of another", actor="adam")
        state.initialize_session("and", actor="adam for user:bob")
        state.cleanup_session("before")
        state.initialize_session("two")
        allowances["ada"] = Allowance(sessions=1)
        state.cleanup_session("one")
        with pytest.raises(QuotaExceededError):
            state.initialize_session("three")
    # A restart counts what is in the file.
    with opened(tmp_path / "a.db", allowances) as state:
        with pytest.raises(QuotaExceededError):
            state.initialize_session("three")
        state.cleanup_session("two")
        state.initialize_session("three")


def test_stored_bytes_are_those_of_the_history_and_of_whoever_began_the_session(
    tmp_path: Path, allowances: Allowances
) -> None:
    path = tmp_path / "a.db"
    allowances["ada"] = Allowance(bytes=1_000)
    with opened(path, allowances) as state:
        state.initialize_session("s")
        state.register_variable("s", "text", "string", TEXT)
        for _ in range(9):
            state.set_variable("s", "text", TEXT, actor="bob")
        with pytest.raises(QuotaExceededError) as refused:
            state.set_variable("s", "text", TEXT, actor="bob")
        assert (refused.value.identity, refused.value.what, refused.value.actual) == ("ada", "stored bytes", 1_100)
        assert list(state.set_variables("s", {"text": "x"}).errors) == ["text"]
        state.delete_variable("s", "text")
        state.initialize_session("of bob", actor="bob")
        state.register_variable("of bob", "text", "string", TEXT)
        assert state.engine._store.stored_by("ada") == {1: 1_000}
    stats = maintenance.stats(path)
    assert [each.size_bytes for each in stats.largest_sessions] == [1_000, 100]
    with opened(path, allowances) as state:
        with pytest.raises(QuotaExceededError):
            state.register_variable("s", "flag", "boolean", True)
        state.prune(PrunePolicy(keep_versions=3), confirm=True)
        state.register_variable("s", "text", "string", TEXT * 5)
        state.cleanup_session("s")
        state.initialize_session("s")
        state.register_variable("s", "text", "string", TEXT * 8)


def test_what_is_not_written_is_not_counted(tmp_path: Path, allowances: Allowances) -> None:
    allowances["ada"] = Allowance(bytes=10_000, sessions=2)
    with opened(tmp_path / "a.db", allowances) as state:
        state.initialize_session("s")
        state.register_variable("s", "text", "string", "")

        def limit_pages(count: int) -> None:
            connection: Any = state.engine._store._connection.connection.driver_connection
            connection.execute(f"PRAGMA max_page_count = {count}")

        state.engine._on_writer(lambda: limit_pages(1))
        for _ in range(3):
            with pytest.raises(StorageError):
                state.set_variable("s", "text", "y" * 9_000)
            with pytest.raises(StorageError):
                state.initialize_session("t", metadata={"why": "y" * 9_000})
        state.engine._on_writer(lambda: limit_pages(1_000_000))
        # A conflict takes back what the unit had staged.
        with pytest.raises(VersionConflictError):
            state.set_variable("s", "text", "y" * 9_000, expected_version=7)
        state.set_variable("s", "text", "y" * 9_000)
        state.initialize_session("t")


def test_a_tool_that_would_store_too_much_fails_and_the_journal_says_why(
    tmp_path: Path, allowances: Allowances
) -> None:
    @dspex_persist.tool
    def fill(ctx: dspex_persist.ToolContext, length: int) -> None:
        ctx.variables["text"] = "x" * length

    allowances["ada"] = Allowance(bytes=1_000)
    with opened(tmp_path / "a.db", allowances, tools=dspex_persist.Toolbox.of(fill)) as state:
        state.initialize_session("s")
        state.register_variable("s", "text", "string", TEXT)
        state.execute_tool("s", "fill", {"length": 700})
        refused = state.execute_tool("s", "fill", {"length": 700})
        assert refused.status == "failed"
        assert "ada may have 1,000 stored bytes" in str(refused.error)
        assert state.execute_tool("s", "fill", {"length": 100}).status == "committed"
        with state.audit() as audit:
            failed, *_ = audit.iterate(ExecutionQuery(status="failed"))
    assert "ada may have 1,000 stored bytes" in failed.error
