"""Any changed recording is either refused without effect, or can be loaded, audited and reported."""

import io
import json
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dspex_persist import open_audit
from dspex_persist.audit import CommitQuery, ExecutionQuery, HistoryQuery, SessionQuery, document
from dspex_persist.audit.report import gather, render
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import RecordingError
from dspex_persist.state.recording import write_recording
from dspex_persist.state.store import maintenance
from dspex_persist.wiring.recordings import import_session
from tests.store.audit_history import make

JUNK: tuple[Any, ...] = (
    *(None, True, 0, -1, 1, 2**31, 2**63, 10**30, 0.5, "", "x", "\0", "\ud800", "exec_1_\x1b[2J", "NaN", "1e999"),
    *([], [1], ["x", "y", "z"], [[]], {}, {"a": 1}, {"json": "{"}, {"json": "1", "binary": "?"}),
    *("0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59.999999-23:59", "1969-12-31T23:59:59Z", "2026-01-01", "now"),
)
TOKENS = ("NaN", "Infinity", "-Infinity", "1e999", '"\\ud800"', "[" * 2000 + "]" * 2000)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """An empty database, and the lines of a recording with all kinds of events."""
    folder = tmp_path_factory.mktemp("recordings")
    make(folder / "history.db")
    stream = io.StringIO()
    with EmbeddedState(folder / "history.db") as state:
        write_recording(*state.record("main", reveal=True), stream)
    EmbeddedState(folder / "empty.db").close()
    return folder / "empty.db", stream.getvalue().splitlines()


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a document, as its container and key."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, entry in list(entries):
        yield node, key
        yield from places(entry)


def mutated(lines: list[str], random: Random) -> str:
    changed = list(lines)
    number = random.randrange(len(changed))
    document = json.loads(changed[number])
    # Documents inside texts, such as values, count as well.
    holder, key = random.choice(list(places(document)))
    way = random.randrange(4)
    if way == 0:
        del holder[key]
    elif way == 1:
        holder[key] = "@token@"
    else:
        holder[key] = random.choice(JUNK)
    changed[number] = json.dumps(document).replace('"@token@"', random.choice(TOKENS))
    return "\n".join(changed) + "\n"


@pytest.mark.parametrize("seed", [*range(4), *(pytest.param(n, marks=pytest.mark.thorough) for n in range(4, 16))])
def test_accepted_recordings_can_be_used(files: tuple[Path, list[str]], tmp_path: Path, seed: int) -> None:
    empty, lines = files
    random = Random(seed)
    accepted = 0
    for number in range(20):
        path = tmp_path / f"{number}.db"
        shutil.copy(empty, path)
        shutil.copy(f"{empty}.anchor", f"{path}.anchor")
        text = mutated(lines, random)
        try:
            import_session(path, text.splitlines(keepends=True))
        except RecordingError:
            assert maintenance.check(path).commits == 0, "a refusal changes nothing"
            continue
        accepted += 1
        use(path)
    assert accepted, "some of it is of no matter"


def use(path: Path) -> None:
    assert maintenance.check(path).problems == ()
    with EmbeddedState(path) as state:
        with state.audit() as audit:
            (session,) = [each.session_id for each in audit.iterate(SessionQuery())]
        state.get_session(session)
        for variable in state.list_variables(session):
            state.get_variable_history(session, variable.name, 100)
        state.list_tools(session)
    with open_audit(path, reveal=True) as audit:
        answers = [*audit.iterate(HistoryQuery()), *audit.iterate(CommitQuery()), *audit.iterate(SessionQuery())]
        answers += [audit.execution(each.execution_id) for each in audit.iterate(ExecutionQuery())]
        answers += [*audit.state(session), *audit.blame(session, depth=9)]
        json.dumps([document(each) for each in answers], allow_nan=False, ensure_ascii=False).encode()
        assert all(isinstance(each.created_at.astimezone(), datetime) for each in audit.iterate(CommitQuery()))
        assert render(gather(audit, session))


@pytest.mark.parametrize(
    "at", ["9999-12-31T23:59:59.999999-23:59", "0001-01-01T00:00:00+23:59", "9999-12-31T00:00:00Z", "0001-01-01T00:00Z"]
)
def test_a_time_that_some_time_zones_cannot_represent_is_refused(
    files: tuple[Path, list[str]], tmp_path: Path, at: str
) -> None:
    _, lines = files
    first = json.dumps(json.loads(lines[1]) | {"at": at})
    with pytest.raises(RecordingError, match=r"line 2: .*not in the years 1 to 9999"):
        import_session(tmp_path / "new.db", [f"{line}\n" for line in (lines[0], first, *lines[2:])])
    assert not (tmp_path / "new.db").exists()


@pytest.mark.parametrize("token", ["NaN", "Infinity", "1e999"])
@pytest.mark.parametrize("key", ["commits", "commit"])
def test_invalid_numbers_are_refused(files: tuple[Path, list[str]], tmp_path: Path, key: str, token: str) -> None:
    _, lines = files
    number = 0 if key == "commits" else 1
    lines = list(lines)
    lines[number] = json.dumps(json.loads(lines[number]) | {key: "@"}).replace('"@"', token)
    with pytest.raises(RecordingError, match=f"line {number + 1}: "):
        import_session(tmp_path / "new.db", [f"{line}\n" for line in lines])
