"""Rules and constraints in a file: after a restart, as of a point, exported and imported, and pruned."""

import io
import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dspex_persist.clock import now
from dspex_persist.replay.state import replay_state
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import InvalidValueError, RecordingError, RuleViolatedError
from dspex_persist.state.model import PrunePolicy, Rule
from dspex_persist.state.recording import write_recording
from dspex_persist.state.store import maintenance
from dspex_persist.testing.checks import take
from dspex_persist.wiring.recordings import import_session

OLD: dict[str, Any] = {"schema": {"type": "object", "required": ["name"]}, "schema_version": 1}
NEW: dict[str, Any] = {"schema": {"type": "object", "required": ["first"]}, "schema_version": 2}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Commits: 1 begins, 2 and 3 register, 4 adds a rule, 5 writes, 6 removes it, 7 writes, 8 adds one, 9 migrates."""
    path = tmp_path_factory.mktemp("filled") / "sessions.db"
    with EmbeddedState(path) as state:
        state.initialize_session("s")
        state.register_variable("s", "profile", "map", {"name": "Ada"}, constraints=OLD)
        state.register_variable("s", "x", "integer", 1)
        state.add_rule("s", "small", "x < 5", "why")
        state.set_variable("s", "x", 2)
        state.remove_rule("s", "small")
        state.set_variable("s", "x", 9)
        state.add_rule("s", "large", "x > 5")
        state.constrain_variable("s", "profile", NEW, {"first": "Ada"})
    return path


@pytest.fixture
def path(filled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(filled, tmp_path / "sessions.db"))


@pytest.fixture
def state(path: Path) -> Iterator[EmbeddedState]:
    with EmbeddedState(path) as state:
        yield state


def exported(state: EmbeddedState, session: str = "s") -> str:
    stream = io.StringIO()
    write_recording(*state.record(session), stream)
    return stream.getvalue()


def test_they_hold_after_a_restart(state: EmbeddedState, path: Path) -> None:
    state.close()
    with EmbeddedState(path) as again:
        assert again.list_rules("s") == (Rule("large", "x > 5"),)
        with pytest.raises(RuleViolatedError):
            again.set_variable("s", "x", 1)
        with pytest.raises(InvalidValueError, match='"first" is a required property'):
            again.set_variable("s", "profile", {"name": "Ada"})
    assert maintenance.check(path).problems == ()


def test_constraints_as_of_a_point(state: EmbeddedState) -> None:
    with state.audit() as audit:
        stated = [
            [json.loads(each.constraints) for each in audit.state("s", str(point)) if each.name == "profile"]
            for point in (2, 8, 9)
        ]
    assert stated == [[OLD], [OLD], [NEW]]


def test_watchers_that_are_behind_see_the_constraints_of_each_version(state: EmbeddedState) -> None:
    state.constrain_variable("s", "profile", None, {})
    state.set_variable("s", "profile", {"any": 1})
    for number in range(300):
        state.set_variable("s", "x", 10 + number)
    with state.watch("s", ["profile"], after_sequence=1) as watch:
        updates = take(watch, 4)
    assert [json.loads(each.variable.constraints or "{}") for each in updates] == [OLD, NEW, {}, {}]


def test_they_survive_export_and_import(state: EmbeddedState, tmp_path: Path) -> None:
    text, other = exported(state), tmp_path / "other.db"
    source = tmp_path / "recording.jsonl"
    source.write_text(text, encoding="utf-8")
    with state.audit() as audit:
        assert replay_state(source, audit.state("s")).divergences == ()
    import_session(other, text.splitlines(keepends=True))
    with EmbeddedState(other) as imported:
        assert imported.list_rules("s") == (Rule("large", "x > 5"),)
        assert imported.get_variable_history("s", "profile")[0].cause == "migration profile 1->2"
        assert exported(imported) == text
        with pytest.raises(RuleViolatedError):
            imported.set_variable("s", "x", 1)
    assert maintenance.check(other).problems == ()


def test_an_import_takes_recorded_commits_as_they_were(state: EmbeddedState, tmp_path: Path) -> None:
    """An older release may have checked a rule in another way."""
    lines = exported(state).splitlines(keepends=True)
    lines[-2] = lines[-2].replace("x > 5", "x > 50")
    import_session(tmp_path / "other.db", lines)
    with EmbeddedState(tmp_path / "other.db") as imported:
        assert imported.list_rules("s") == (Rule("large", "x > 50"),)
        with pytest.raises(RuleViolatedError):
            imported.set_variable("s", "x", 10)
        imported.set_variable("s", "x", 51)


@pytest.mark.parametrize(
    ("written", "instead", "reason"),
    [
        ("x > 5", "x >", "is not CEL"),
        ('_removed", "body": {"name": "small"', '_removed", "body": {"name": "other"', "there is no rule 'other'"),
        ('"version": 1}}]}', '"version": 2}}]}', "line 10: "),
        ('\\"schema_version\\":2}', '\\"schema_version\\": 2}', "are not in the form in which a store writes them"),
    ],
)
def test_malformed_recordings(state: EmbeddedState, tmp_path: Path, written: str, instead: str, reason: str) -> None:
    text = exported(state)
    assert written in text
    with pytest.raises(RecordingError, match=reason):
        import_session(tmp_path / "other.db", text.replace(written, instead).splitlines(keepends=True))


def test_pruning_removes_them_with_their_session(state: EmbeddedState, path: Path) -> None:
    state.prune(PrunePolicy(keep_versions=1), confirm=True)
    assert maintenance_problems(state, path) == ()
    assert state.list_rules("s") == (Rule("large", "x > 5"),)
    state.cleanup_session("s")
    state.prune(PrunePolicy(ended_before=now()), confirm=True)
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
        for table in ("rules", "variable_constraints", "variables"):
            assert connection.execute(f"SELECT count(*) FROM {table}").fetchone() == (0,)
    assert maintenance_problems(state, path) == ()


def maintenance_problems(state: EmbeddedState, path: Path) -> tuple[object, ...]:
    return tuple(maintenance.check(path).problems)
