"""Pruning: what is deleted, what is kept, and that the rest is sound, wherever pruning was interrupted."""

import io
import json
import random
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from freezegun import freeze_time

from dspex_persist import clock
from dspex_persist.audit import HistoryQuery
from dspex_persist.state import commands as c
from dspex_persist.state.commands.executions import Verdict
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import (
    DatabaseInUseError,
    InvalidArgumentError,
    LostCommitsError,
    NotADatabaseError,
    NotInHistoryError,
    VersionNotFoundError,
    VersionPrunedError,
)
from dspex_persist.state.groups import Job
from dspex_persist.state.model import (
    ChangeKind,
    ExecutionStatus,
    Origin,
    PrunePolicy,
    PruneReport,
    RegisteredTool,
    ToolSpec,
    UpdateKind,
    Value,
)
from dspex_persist.state.recording import write_recording
from dspex_persist.state.store import maintenance
from dspex_persist.state.store.chain import GENESIS
from dspex_persist.state.store.engine import open_readers, snapshot
from dspex_persist.state.store.history import prune_plan
from dspex_persist.state.store.log_reader import iter_commits
from dspex_persist.state.store.session_store import FileGroups, StoreOptions, open_groups
from dspex_persist.state.store.variables import find_key, metadata_as_of
from dspex_persist.wiring.recordings import import_session
from tests.asked import entry
from tests.deadline import within
from tests.logs import capture_logs
from tests.store.test_verify import anchor_of, problems_of, random_job

START = datetime(2030, 1, 1, tzinfo=UTC)
LARGE = "large: é漢😀 " * 200
DEADLINE_S = within(30)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "sessions.db"


@pytest.fixture
def provider(path: Path) -> Iterator[EmbeddedState]:
    """A provider with session `s` and its variable `x` at version 0. At the end its file must be sound."""
    with EmbeddedState(path) as provider:
        begin(provider, "s")
        yield provider
    assert problems_of(path, anchor_of(path)) == []


def begin(provider: EmbeddedState, session_id: str, *names: str) -> None:
    provider.initialize_session(session_id)
    for name in names or ("x",):
        provider.register_variable(session_id, name, "integer", 0)


def write(provider: EmbeddedState, times: int, session_id: str = "s", name: str = "x", **metadata: str) -> None:
    for number in range(times):
        provider.set_variable(session_id, name, number, metadata=metadata)


def keep(versions: int, **more: Any) -> PrunePolicy:
    return PrunePolicy(keep_versions=versions, **more)


def numbers(provider: EmbeddedState, session_id: str = "s", name: str = "x") -> list[int]:
    return [version.version for version in provider.get_variable_history(session_id, name, 1000)][::-1]


def rows_of(path: Path, statement: str, *parameters: object) -> list[Any]:
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        return connection.execute(statement, parameters).fetchall()


# Which versions go


def test_the_newest_versions_stay(provider: EmbeddedState) -> None:
    write(provider, 10)
    assert provider.prune(keep(3), confirm=True) == PruneReport(True, 1, 8, 0, 1)
    assert numbers(provider) == [8, 9, 10]
    assert provider.prune(keep(3), confirm=True) == PruneReport(True, 0, 0, 0, 0)
    write(provider, 1)
    assert numbers(provider) == [8, 9, 10, 11]
    provider.prune(keep(1), confirm=True)
    assert numbers(provider) == [11]


def test_unconfirmed_it_only_counts(provider: EmbeddedState, path: Path) -> None:
    write(provider, 10)
    before, counted = rows_of(path, "SELECT * FROM commits"), provider.prune(keep(3), confirm=False)
    assert counted == PruneReport(False, 1, 8, 0, 0)
    assert (rows_of(path, "SELECT * FROM commits"), numbers(provider)) == (before, list(range(11)))


def test_young_versions_stay(path: Path) -> None:
    with freeze_time(START) as clock, EmbeddedState(path) as provider:
        begin(provider, "s")
        for _ in range(10):
            clock.tick(timedelta(days=1))
            write(provider, 1)
        provider.prune(keep(3, before=START + timedelta(days=5)), confirm=True)
        assert numbers(provider) == list(range(5, 11)), "what both allow"
        provider.prune(keep(8, before=START + timedelta(days=90)), confirm=True)
        assert numbers(provider) == list(range(5, 11))
        provider.prune(PrunePolicy(before=START + timedelta(days=7)), confirm=True)
        assert numbers(provider) == [7, 8, 9, 10]
        provider.prune(PrunePolicy(before=START + timedelta(days=90)), confirm=True)
        assert numbers(provider) == [10]
    assert problems_of(path) == []


def test_other_sessions_are_left_alone(provider: EmbeddedState) -> None:
    begin(provider, "t")
    write(provider, 5)
    write(provider, 5, "t")
    provider.prune(keep(2, session_id="t"), confirm=True)
    assert (numbers(provider), numbers(provider, "t")) == ([0, 1, 2, 3, 4, 5], [4, 5])
    assert numbers(provider) == [0, 1, 2, 3, 4, 5]


def test_current_values_metadata_and_locks_stay(provider: EmbeddedState) -> None:
    provider.set_variable("s", "x", 1, metadata={"a": "old", "b": "old"})
    provider.set_variable("s", "x", 2, metadata={"a": "new"})
    provider.set_variable("s", "x", 3, metadata={"c": "only"})
    provider.submit(c.StartOptimization("s", "x", "mipro", {"trials": "3"})).result()
    write(provider, 5, optimizer_id="mipro")
    write(provider, 3, optimizer_id="mipro", c="later")
    before = provider.list_variables("s")
    provider.prune(keep(1), confirm=True)
    assert provider.list_variables("s") == before
    # The entry of version 3 was replaced; those of 1 and 2 were not.
    assert numbers(provider) == [1, 2, 11]


def test_a_reason_keeps_no_version(provider: EmbeddedState) -> None:
    """It says something about its version alone, so pruning removes it with that version."""
    for number in (1, 2, 3):
        provider.set_variable("s", "x", number, reason=f"because of {number}")
    provider.prune(keep(1), confirm=True)
    assert numbers(provider) == [3]


def test_pinned_versions_stay_with_all_that_their_metadata_adds_up_to(provider: EmbeddedState, path: Path) -> None:
    provider.set_variable("s", "x", 1, metadata={"note": "first"})
    provider.set_variable("s", "x", 2, metadata={"note": "second"})
    provider.set_variable("s", "x", 3, metadata={"pinned": "true"})
    provider.set_variable("s", "x", 4, metadata={"note": "third", "pinned": "false"})
    write(provider, 2)
    with snapshot(readers := open_readers(path, 1)) as connection:
        key = find_key(connection, 1, "x") or 0
        assert metadata_as_of(connection, key, 3) == {"note": "second", "pinned": "true"}
    provider.prune(keep(1), confirm=True)
    assert numbers(provider) == [2, 3, 4, 6]
    with snapshot(readers) as connection:
        assert metadata_as_of(connection, key, 3) == {"note": "second", "pinned": "true"}
    readers.dispose()


def test_versions_that_running_tools_may_read_stay(provider: EmbeddedState) -> None:
    write(provider, 5)
    begun = provider.submit(c.BeginExecution("s", "count")).result()
    write(provider, 5)
    provider.register_variable("s", "later", "integer", 0)
    write(provider, 2, name="later")
    provider.prune(keep(1), confirm=True)
    assert numbers(provider) == [5, 6, 7, 8, 9, 10]
    assert numbers(provider, name="later") == [0, 1, 2]
    provider.submit(c.FinishExecution("s", Verdict(begun.execution_id, ExecutionStatus.COMMITTED))).result()
    provider.prune(keep(1), confirm=True)
    assert (numbers(provider), numbers(provider, name="later")) == ([10], [2])


def test_of_deleted_variables_the_deletion_stays_and_what_it_deleted(provider: EmbeddedState) -> None:
    write(provider, 5)
    provider.delete_variable("s", "x")
    provider.register_variable("s", "x", "integer", 0)
    provider.delete_variable("s", "x")
    provider.register_variable("s", "x", "integer", 7)
    assert provider.prune(keep(1), confirm=True).versions == 5
    assert provider.get_variable("s", "x").value == Value("7")


def test_policies_that_cannot_be(provider: EmbeddedState) -> None:
    naive = PrunePolicy(before=datetime(2030, 1, 1))  # noqa: DTZ001
    for policy in (PrunePolicy(), PrunePolicy(session_id="s"), keep(0), keep(1, session_id=""), naive):
        with pytest.raises(InvalidArgumentError):
            provider.prune(policy, confirm=False)


def test_a_session_that_never_was_is_said(provider: EmbeddedState, path: Path) -> None:
    begin(provider, "demo", "x")
    for confirm in (False, True):
        with pytest.raises(NotInHistoryError, match="no session 'dem' in the history; did you mean 'demo'"):
            provider.prune(keep(1, session_id="dem"), confirm=confirm)
    provider.close()
    for confirm in (False, True):
        with pytest.raises(NotInHistoryError, match="did you mean 'demo'"):
            maintenance.prune(path, keep(1, session_id="dem"), confirm=confirm)


# Whole sessions

HANGING = ("variables", "dependencies", "executions", "tools", "versions", "metadata_entries", "lm_calls")


def end_one(provider: EmbeddedState, session_id: str) -> None:
    """A session with a bit of everything, that ends."""
    begin(provider, session_id, "x", "y", "z")
    for number in range(3):
        provider.initialize_session(session_id, {"updated": str(number)})
        provider.set_variables(session_id, {"x": number, "y": number}, metadata={"n": str(number), f"k{number}": ""})
        provider.add_dependency(session_id, "x", ("y", "z")[number % 2])
    provider.register_variable(session_id, "text", "string", LARGE)
    for optimizer in ("mipro", "bootstrap"):
        provider.submit(c.StartOptimization(session_id, "y", optimizer)).result()
        provider.submit(c.StopOptimization(session_id, "y", force=True)).result()
    provider.submit(c.StartOptimization(session_id, "y", "last")).result()
    provider.delete_variable(session_id, "z")
    for worker in ("w1", "w2"):
        tools = tuple(RegisteredTool(ToolSpec(name), worker) for name in ("shared", f"of {worker}"))
        provider.submit(c.RegisterTools(session_id, worker, tools)).result()
    parent = provider.submit(c.BeginExecution(session_id, "outer")).result()
    child = provider.submit(c.BeginExecution(session_id, "inner", parent_id=parent.execution_id)).result()
    recorded = {"lm": [entry()]}
    verdicts = [Verdict(each.execution_id, ExecutionStatus.COMMITTED, recorded=recorded) for each in (parent, child)]
    provider.submit(c.FinishExecution(session_id, verdicts[0], (verdicts[1],))).result()
    provider.submit(c.BeginExecution(session_id, "left")).result()
    provider.cleanup_session(session_id)


def test_sessions_that_have_ended_go_as_a_whole(provider: EmbeddedState, path: Path) -> None:
    end_one(provider, "ended")
    provider.initialize_session("ended", {"life": "second"})
    provider.register_variable("ended", "x", "integer", 5)
    report = provider.prune(PrunePolicy(ended_before=datetime.max.replace(tzinfo=UTC)), confirm=True)
    assert report.sessions == 1
    kinds = {
        kind
        for (kind,) in rows_of(
            path,
            "SELECT kind FROM events JOIN commits USING (sequence) JOIN sessions USING (session_key) "
            "WHERE ended_sequence IS NOT NULL",
        )
    }
    assert kinds == {"session_started", "session_updated", "session_ended", "pruned"}
    for table in ("variables", "dependencies", "executions", "tools"):
        statement = (
            f"SELECT count(*) FROM {table} JOIN sessions USING (session_key) WHERE sessions.ended_sequence IS NOT NULL"
        )
        assert rows_of(path, statement) == [(0,)], table
    assert rows_of(path, "SELECT count(*) FROM blobs") == [(0,)]
    assert (numbers(provider), numbers(provider, "ended")) == ([0], [0])
    assert provider.prune(PrunePolicy(ended_before=datetime.max.replace(tzinfo=UTC)), confirm=True).markers == 0


def test_sessions_that_ended_lately_stay(path: Path) -> None:
    with freeze_time(START) as clock, EmbeddedState(path) as provider:
        for session_id in ("first", "second"):
            clock.tick(timedelta(days=1))
            end_one(provider, session_id)
        assert provider.prune(PrunePolicy(ended_before=START), confirm=True).sessions == 0
        assert provider.prune(PrunePolicy(ended_before=START + timedelta(days=1.5)), confirm=True).sessions == 1
        [(gone,), (left,)] = rows_of(
            path, "SELECT (SELECT count(*) FROM variables v WHERE v.session_key = s.session_key) FROM sessions s"
        )
    assert (gone, left) == (0, 4)
    assert problems_of(path) == []


def test_a_pinned_version_outlives_its_session(provider: EmbeddedState, path: Path) -> None:
    begin(provider, "ended", "x", "y")
    provider.set_variable("ended", "x", 1, metadata={"note": "kept"})
    provider.set_variable("ended", "x", 2, metadata={"pinned": "true"})
    provider.add_dependency("ended", "x", "y")
    write(provider, 3, "ended")
    provider.cleanup_session("ended")
    provider.prune(PrunePolicy(ended_before=datetime.max.replace(tzinfo=UTC)), confirm=True)
    left = rows_of(path, "SELECT name, version FROM versions JOIN variables USING (variable_key) WHERE session_key = 2")
    assert left == [("x", 1), ("x", 2), ("x", 5)]


@pytest.mark.parametrize("rows", [1, 2, 3, 7])
def test_it_can_be_broken_off_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    """After each of its commits the file is sound, opens again, and the rest can be pruned."""
    monkeypatch.setattr(prune_plan, "_BATCH_ROWS", rows)
    path = tmp_path / "sessions.db"
    store = open_groups(path)
    store.close()
    with EmbeddedState(path) as provider:
        end_one(provider, "ended")
        end_one(provider, "again")
    policy = PrunePolicy(keep_versions=1, ended_before=datetime.max.replace(tzinfo=UTC))
    written = 0
    while True:
        store = open_groups(path)
        batches = prune_plan.Planner(store.log.readers, policy).batches()
        batch = next((each for each in batches if each), None)
        if batch is None:
            break
        run(store, *batch)
        store.close()
        assert problems_of(path, anchor_of(path)) == []
        written += 1
    store.close()
    assert written > 30 / rows
    for table in HANGING:
        assert rows_of(path, f"SELECT count(*) FROM {table}") == [(0,)], table


# Queries after pruning


def test_rolling_back_to_what_was_pruned(provider: EmbeddedState) -> None:
    write(provider, 5)
    provider.prune(keep(2), confirm=True)
    with pytest.raises(VersionPrunedError, match=r"version 1 of variable 'x' was pruned"):
        provider.rollback_variable("s", "x", 1)
    assert provider.rollback_variable("s", "x", 4).version == 6


def test_a_watch_that_resumes_before_what_was_pruned(provider: EmbeddedState) -> None:
    provider.register_variable("s", "gone", "integer", 3)
    write(provider, 3, name="gone")
    provider.delete_variable("s", "gone")
    write(provider, 5)
    begun = provider.head_sequence
    provider.prune(keep(2), confirm=True)
    with EmbeddedState.watch(provider, "s", after_sequence=1) as watch:
        updates = []
        while watch.position < begun:
            updates += watch.pull()
    assert [(update.kind, update.variable.name, update.variable.value.json) for update in updates] == [
        (UpdateKind.VALUE_CHANGE, "gone", "2"),
        (UpdateKind.DELETED, "gone", "2"),
        (UpdateKind.VALUE_CHANGE, "x", "3"),
        (UpdateKind.VALUE_CHANGE, "x", "4"),
    ]


@pytest.mark.parametrize("how", ["by age", "ended before"])
def test_a_clock_that_was_wrong_for_a_while_costs_nothing_young(path: Path, how: str) -> None:
    """Twenty versions of today, ten of 1970, as of a machine that booted without a clock, then twenty of today."""
    with EmbeddedState(path) as state:
        for name in ("s", "wrong"):
            state.initialize_session(name)
            state.register_variable(name, "x", "integer", 0)
        first = state.head_sequence
        write(state, 20, "s")
        write(state, 10, "wrong")
        middle = state.head_sequence
        write(state, 20, "s")
        state.cleanup_session("wrong")
    with tampering(path) as connection:
        # The file is from an earlier release: now no commit gets an earlier time than the one before it.
        moved = connection.execute(
            "UPDATE commits SET created_at = created_at - 1700000000000000 WHERE sequence > ? AND sequence <= ?",
            [first + 20, middle],
        )
        assert moved.rowcount == 10
    young = clock.now() - timedelta(days=30)
    with EmbeddedState(path) as state:
        with state.audit() as audit:
            assert audit.resolve("30d") == 0
            assert audit.resolve(clock.now()) == audit.head()
            assert len(list(audit.iterate(HistoryQuery(session="s", since="30d")))) == 41
        policy = PrunePolicy(before=young) if how == "by age" else PrunePolicy(ended_before=young)
        assert state.prune(policy, confirm=True).versions == 0
        assert len(numbers(state, "s")) == 41


def test_old_versions_go_although_a_clock_was_wrong_later(path: Path) -> None:
    with EmbeddedState(path) as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 0)
        write(state, 40, "s")
        head = state.head_sequence
    year = 365 * 86_400 * 10**6
    with tampering(path) as connection:
        # Twenty of long ago, one of today, then some of 1970.
        connection.execute("UPDATE commits SET created_at = created_at - ? WHERE sequence <= ?", [year, head - 20])
        connection.execute("UPDATE commits SET created_at = 0 WHERE sequence > ?", [head - 19])
    with EmbeddedState(path) as state:
        state.prune(PrunePolicy(before=clock.now() - timedelta(days=30)), confirm=True)
        assert numbers(state, "s") == list(range(21, 41))


@contextmanager
def tampering(path: Path) -> Iterator[sqlite3.Connection]:
    """A connection that may change commits, which get the hashes that belong to what they say then."""
    with closing(sqlite3.connect(path)) as connection:
        (sql,) = connection.execute("SELECT sql FROM sqlite_schema WHERE name = 'commits_no_update'").fetchone()
        connection.execute("DROP TRIGGER commits_no_update")
        yield connection
        connection.commit()
        readers = open_readers(path)
        with snapshot(readers) as snapped:
            commits = list(iter_commits(snapped))
        readers.dispose()
        last = GENESIS
        for commit in commits:
            last = commit.link(last)
            connection.execute("UPDATE commits SET hash = ? WHERE sequence = ?", [last, commit.sequence])
        connection.execute(sql)
        connection.commit()
    Path(f"{path}.anchor").unlink()


def test_an_import_does_not_mislead_what_is_old(path: Path, tmp_path: Path) -> None:
    """Its commits have older times than those before them; each session is pruned by its own."""
    recording = io.StringIO()
    with freeze_time("2025-01-01"), EmbeddedState(tmp_path / "old.db") as old:
        old.initialize_session("old")
        old.register_variable("old", "y", "integer", 0)
        write(old, 40, "old", "y")
        write_recording(*old.record("old"), recording)
    with freeze_time("2026-01-01") as frozen:
        with EmbeddedState(path) as state:
            state.initialize_session("new")
            state.register_variable("new", "x", "integer", 0)
            write(state, 3, "new")
            then = state.head_sequence
            frozen.move_to("2026-01-10")
            write(state, 3, "new")
        for copy in ("one", "two"):
            recording.seek(0)
            import_session(path, recording, session_id=copy)
        with EmbeddedState(path) as state:
            with state.audit() as audit:
                assert audit.resolve("2026-01-05T00:00Z") == then
            state.prune(PrunePolicy(before=datetime(2026, 1, 5, tzinfo=UTC)), confirm=True)
            assert numbers(state, "new") == [4, 5, 6]
            assert [numbers(state, copy, "y") for copy in ("one", "two")] == [[40], [40]]
    assert problems_of(path) == []


def test_one_of_two_versions_that_a_commit_wrote_may_go(provider: EmbeddedState, path: Path) -> None:
    """A batch that names a variable by its name and by its id gives it two versions."""
    variable = provider.get_variable("s", "x")
    provider.set_variables("s", {"x": 7, variable.id: 8}, atomic=True)
    written = provider.head_sequence
    provider.prune(keep(1), confirm=True)
    with provider.audit() as audit:
        assert [each.version for each in audit.state("s", str(written))] == [variable.version + 2]
    provider.close()
    assert problems_of(path) == []


def test_the_state_at_a_point_that_was_pruned_is_not_made_up(provider: EmbeddedState) -> None:
    before = provider.head_sequence
    provider.register_variable("s", "y", "integer", 0, metadata={"in force": "for ever"})
    write(provider, 5, name="y")
    middle = provider.head_sequence - 2
    provider.prune(keep(2), confirm=True)
    with provider.audit() as audit:
        assert [each.version for each in audit.state("s", "now")] == [0, 5]
        assert [each.version for each in audit.state("s", str(middle + 1))] == [0, 4]
        with pytest.raises(VersionPrunedError, match="version 1 of variable 'y'"):
            audit.state("s", str(middle))
        assert [each.name for each in audit.state("s", str(before))] == ["x"]


def test_the_state_of_a_session_that_was_pruned_whole_is_not_made_up(provider: EmbeddedState) -> None:
    last = provider.head_sequence
    provider.cleanup_session("s")
    provider.prune(PrunePolicy(ended_before=clock.now() + timedelta(seconds=1)), confirm=True)
    with provider.audit() as audit, pytest.raises(InvalidArgumentError, match=f"at commit {last} was pruned"):
        audit.state("s", str(last))


def test_a_version_that_was_pruned_is_said_to_be(provider: EmbeddedState) -> None:
    write(provider, 5)
    provider.prune(keep(1), confirm=True)
    variable = provider.get_variable("s", "x")
    with provider.audit() as audit:
        assert audit.version("s", variable.id, variable.version).version == variable.version
        with pytest.raises(VersionPrunedError):
            audit.version("s", variable.id, 2)
        with pytest.raises(VersionNotFoundError):
            audit.version("s", variable.id, 99)


def test_a_watch_is_not_disturbed(provider: EmbeddedState) -> None:
    with provider.watch("s") as watch:
        write(provider, 5)
        provider.prune(keep(2), confirm=True)
        write(provider, 1)
        versions: list[int] = []
        while len(versions) < 6:
            versions += [update.variable.version for update in watch.pull()]
    assert versions == [1, 2, 3, 4, 5, 6]


def test_large_contents_go_with_their_last_version(provider: EmbeddedState, path: Path) -> None:
    provider.register_variable("s", "text", "string", LARGE)
    provider.register_variable("s", "same", "string", LARGE)
    for number in range(3):
        provider.set_variable("s", "text", f"{LARGE}{number}")
    provider.prune(keep(1), confirm=True)
    assert rows_of(path, "SELECT count(*) FROM blobs") == [(2,)]
    assert provider.run(c.GetVariable("s", "same", bypass_cache=True)).value.json == json.dumps(
        LARGE, ensure_ascii=False
    )
    provider.set_variable("s", "same", "short")
    provider.prune(keep(1), confirm=True)
    assert rows_of(path, "SELECT count(*) FROM blobs") == [(1,)]


def test_a_content_that_is_written_again_while_it_goes(path: Path) -> None:
    store = open_groups(path)
    text = Value(json.dumps(LARGE, ensure_ascii=False))
    run(
        store,
        c.InitializeSession("s"),
        c.RegisterVariable("s", "x", "string", text),
        c.SetVariable("s", "x", Value('"a"')),
    )
    [[pruning]] = prune_plan.Planner(store.log.readers, keep(1)).batches()
    run(store, pruning, c.SetVariable("s", "x", text))
    store.close()
    assert problems_of(path) == []
    with EmbeddedState(path) as provider:
        assert provider.get_variable("s", "x").value == text


def run(store: FileGroups, *commands: Any) -> None:
    outcomes = store.write_group([Job(command, Origin("ann", command.cause)) for command in commands])
    assert [outcome.error for outcome in outcomes] == [None] * len(commands)


def test_sessions_that_begin_end_or_expire_beside_it(path: Path) -> None:
    """All in one transaction: the planned rows are deleted, and the marker belongs to the session, even if it ends."""
    store = open_groups(path)
    run(store, c.InitializeSession("s"), c.RegisterVariable("s", "x", "integer", Value("0")))
    run(store, *(c.SetVariable("s", "x", Value(str(number))) for number in range(5)))
    [[pruning]] = prune_plan.Planner(store.log.readers, keep(2)).batches()
    first, second = (replace(pruning, versions=half) for half in (pruning.versions[:2], pruning.versions[2:]))
    run(store, c.SetVariable("s", "x", Value("6")), first, c.CleanupSession("s"), c.InitializeSession("s"), second)
    store.close()
    assert problems_of(path) == []
    assert rows_of(path, "SELECT session_key FROM commits WHERE cause = 'PruneHistory'") == [(1,), (1,)]
    assert rows_of(path, "SELECT version FROM versions") == [(4,), (5,), (6,)]


def test_the_end_of_the_log_is_still_checked_at_open(path: Path) -> None:
    with EmbeddedState(path) as provider:
        begin(provider, "s")
        write(provider, 5)
        provider.prune(keep(2), confirm=True)
    EmbeddedState(path).close()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DROP TRIGGER commits_no_update")
        connection.execute("UPDATE commits SET actor = 'mallory' WHERE sequence = 4")
    with pytest.raises(LostCommitsError, match="commit 4"):
        EmbeddedState(path)


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(n, marks=pytest.mark.thorough) for n in range(4, 12))])
def test_random_histories_are_sound_after_pruning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    print(f"seed {seed}")
    randomly = random.Random(seed)
    monkeypatch.setattr(prune_plan, "_BATCH_ROWS", randomly.choice((3, 1000)))
    path = tmp_path / "random.db"
    now = START
    with freeze_time(now) as clock:
        store = open_groups(path)
        for _ in range(12):
            for _ in range(15):
                clock.tick(timedelta(seconds=1))
                store.write_group([random_job(randomly) for _ in range(randomly.randint(1, 8))])
            before, history = states_of(store), history_of(path)
            prune_randomly(store, randomly)
            assert states_of(store) == before
            assert history_of(path).items() <= history.items()
            if randomly.random() < 0.4:
                store.close()
                assert problems_of(path, anchor_of(path)) == []
                store = open_groups(path)
                assert states_of(store) == before
        store.close()
    assert problems_of(path, anchor_of(path)) == []


def states_of(store: FileGroups) -> dict[str, Any]:
    commands = [c.ListVariables(session_id) for session_id in "st"]
    outcomes = store.write_group([Job(command, Origin("ann", "")) for command in commands])
    return {
        command.session_id: [
            (*each[:-2], str(each.updated_at), each.optimization and each.optimization.id)
            for each in outcome.result or ()
        ]
        for command, outcome in zip(commands, outcomes, strict=True)
    }


def history_of(path: Path) -> dict[Any, Any]:
    """Versions, and the metadata that they show in an audit."""
    rows = rows_of(path, "SELECT variable_key, version, sequence, kind, value, metadata FROM versions")
    return {row[:2]: row[2:] for row in rows}


def prune_randomly(store: FileGroups, randomly: random.Random) -> None:
    def ago() -> datetime:
        return datetime.now(UTC) - timedelta(seconds=randomly.randint(0, 60))  # noqa: TID251

    policy = PrunePolicy(
        randomly.choice((None, 1, 2, 5)),
        randomly.choice((None, ago())),
        randomly.choice((None, None, ago())),
        randomly.choice((None, None, "s")),
    )
    if policy == PrunePolicy(session_id=policy.session_id):
        return

    def carry_out(jobs: list[Job]) -> None:
        assert [outcome.error for outcome in store.write_group(jobs)] == [None] * len(jobs)

    counted = prune_plan.run(store.log.readers, policy, None, lambda *_: None)
    done = prune_plan.run(store.log.readers, policy, carry_out, lambda *_: None)
    assert (done.sessions, done.versions, done.events) == (counted.sessions, counted.versions, counted.events)


# While other callers write and read


def wait_for(what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.01)


def test_others_write_and_read_meanwhile(provider: EmbeddedState, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_plan, "_BATCH_ROWS", 50)
    names = [f"v{number}" for number in range(20)]
    begin(provider, "t", *names)
    for number in range(50):
        provider.set_variables("t", dict.fromkeys(names, number))
    written: list[int] = []
    started = threading.Event()

    def write_on() -> None:
        while len(written) < 50:
            written.append(provider.set_variable("s", "x", len(written)))
            assert provider.get_variable_history("t", "v5", 100)[0].version == 50
            started.set()

    writer = threading.Thread(target=write_on)
    writer.start()
    started.wait(DEADLINE_S)
    seen: list[tuple[str, int, int]] = []
    report = provider.prune(keep(1, session_id="t"), confirm=True, progress=lambda *report: seen.append(report))
    writer.join()
    assert (report.versions, report.markers) == (1000, 20)
    assert written == list(range(1, 51))
    assert seen[-1] == ("1,000 versions, 0 events", 20, 21)


def test_settings_have_it_done_by_and_by(path: Path) -> None:
    options = StoreOptions(retention_keep_versions=3, warn_size_bytes=1000)
    with capture_logs() as logs, EmbeddedState(path, options, sweep_interval_s=0.02) as provider:
        begin(provider, "s")
        for _ in range(2):
            write(provider, 10)
            wait_for("retention", lambda: len(numbers(provider)) == 3)
    assert problems_of(path) == []
    warnings = [entry for entry in logs if entry["event"] == "database is large"]
    assert [entry["warn_size_bytes"] for entry in warnings] == [1000]
    assert warnings[0]["size_bytes"] > 1000
    assert [entry for entry in logs if entry["event"] == "history pruned"]
    assert not [entry for entry in logs if entry["event"] == "history not pruned"]


def test_settings_for_sessions_that_have_ended(path: Path) -> None:
    options = StoreOptions(retention_ended_sessions_s=0.001)
    with EmbeddedState(path, options, sweep_interval_s=0.02) as provider:
        begin(provider, "s")
        write(provider, 10)
        end_one(provider, "ended")
        wait_for("retention", lambda: rows_of(path, "SELECT count(*) FROM variables") == [(1,)])
        assert numbers(provider) == list(range(11))
    assert problems_of(path) == []


def test_retention_does_not_keep_an_engine_from_closing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_plan, "_BATCH_ROWS", 1)
    with EmbeddedState(path) as provider:
        begin(provider, "s")
        write(provider, 200)
    options = StoreOptions(retention_keep_versions=1)
    with EmbeddedState(path, options, sweep_interval_s=0.02) as provider:
        wait_for("retention", lambda: len(numbers(provider)) < 195)
    left = rows_of(path, "SELECT count(*) FROM versions")[0][0]
    assert left > 1
    assert problems_of(path, anchor_of(path)) == []


# A file at rest

PRUNE = """
import sys
from pathlib import Path
from dspex_persist.state.model import PrunePolicy
from dspex_persist.state.store import maintenance
from dspex_persist.state.store.history import prune_plan

prune_plan._BATCH_ROWS = 20
print("begun", flush=True)
maintenance.prune(Path(sys.argv[1]), PrunePolicy(keep_versions=2), confirm=True)
"""


@pytest.mark.crash
def test_killed_in_the_middle_it_can_be_run_again(path: Path) -> None:
    with EmbeddedState(path) as provider:
        begin(provider, "s", "x", "y")
        for number in range(1000):
            provider.set_variables("s", {"x": number, "y": number}, metadata={"n": str(number)} if number % 7 else {})
        current = provider.list_variables("s")
    copy = path.with_name("whole.db")
    shutil.copy(path, copy)
    whole = maintenance.prune(copy, keep(2), confirm=True)
    counts = []
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", PRUNE, str(path)], stdout=subprocess.PIPE)
        count = rows_of(path, "SELECT count(*) FROM pruned")[0][0]
        wait_for("some of it", lambda count=count: rows_of(path, "SELECT count(*) FROM pruned")[0][0] > count + 50)
        process.kill()
        process.communicate()
        counts.append(rows_of(path, "SELECT count(*) FROM versions")[0][0])
        report = maintenance.check(path)
        assert (report.problems, report.anchored) == ((), True)
        assert report.pruned_versions == 2002 - counts[-1] > 0
    assert counts[0] > counts[1] > 2002 - whole.versions
    again = maintenance.prune(path, keep(2), confirm=True)
    assert again.versions == counts[1] - (2002 - whole.versions)
    assert maintenance.check(path).problems == ()
    statement = "SELECT variable_key, version, value, metadata FROM versions"
    assert rows_of(path, statement) == rows_of(copy, statement)
    with EmbeddedState(path) as provider:
        assert provider.list_variables("s") == current


def test_a_file_is_pruned_by_its_owner_only(provider: EmbeddedState, path: Path) -> None:
    write(provider, 5)
    assert maintenance.prune(path, keep(2), confirm=False).versions == 4
    with pytest.raises(DatabaseInUseError, match="retention_keep_versions"):
        maintenance.prune(path, keep(2), confirm=True)
    assert numbers(provider) == [0, 1, 2, 3, 4, 5]


def test_a_file_that_is_not_there_is_not_made(path: Path) -> None:
    with pytest.raises(NotADatabaseError, match="no such file"):
        maintenance.prune(path, keep(2), confirm=True)
    assert not path.exists()


def test_check_and_a_backup_of_what_is_left(path: Path) -> None:
    with EmbeddedState(path) as provider:
        begin(provider, "s")
        write(provider, 9)
        end_one(provider, "ended")
    policy = PrunePolicy(keep_versions=4, ended_before=datetime.max.replace(tzinfo=UTC))
    report = maintenance.prune(path, policy, confirm=True)
    checked = maintenance.check(path)
    assert (checked.problems, checked.pruned_versions, checked.pruned_events) == ((), report.versions, report.events)
    assert checked.pruned_commits == rows_of(path, "SELECT count(DISTINCT sequence) FROM pruned")[0][0]
    assert maintenance.backup(path, path.with_name("copy.db")).problems == ()
    assert maintenance.vacuum(path).after_bytes > 0
    assert maintenance.check(path).problems == ()


def test_kinds_of_changes_that_never_merge_go(provider: EmbeddedState) -> None:
    write(provider, 2)
    provider.rollback_variable("s", "x", 0)
    write(provider, 2)
    assert ChangeKind.ROLLED_BACK in {version.kind for version in provider.get_variable_history("s", "x")}
    provider.prune(keep(1), confirm=True)
    assert numbers(provider) == [5]
