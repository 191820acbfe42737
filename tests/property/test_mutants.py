"""Randomly changed recordings: every one that an import accepts can be loaded, audited, reported and exported."""

import contextlib
import copy
import io
import json
import os
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dspex_persist.audit import CommitQuery, ExecutionQuery, HistoryQuery, SessionQuery
from dspex_persist.audit.report import gather, render
from dspex_persist.errors import DspexError
from dspex_persist.state.bridge.rpcs.audit import GET_EXECUTION, GET_STATE, LISTS
from dspex_persist.state.commands import recordings as commands
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import RecordingError, SessionPrunedError
from dspex_persist.state.model import Value
from dspex_persist.state.recording import RecordedVersion, read_recording, write_recording
from dspex_persist.state.store import maintenance
from dspex_persist.state.store.session_store import open_groups
from dspex_persist.wiring.connecting import open_audit
from dspex_persist.wiring.recordings import import_session, open_recording

ASSET = Path(__file__).parents[1] / "assets" / "0003.db"
MUTANTS = int(os.environ.get("MUTANTS", "150"))
_MOST_LINES = 60
_WORDS: Sequence[Any] = (
    None,
    True,
    0,
    -1,
    2**63,
    10**400,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "\0",
    "\ud800",
    "x" * 300,
    [],
    {},
    [[]],
    {"a": 1},
    "exec_1_ab",
    "exec_999999999999999999_ab",
    "2026-01-01T00:00:00+00:00",
    "0001-01-01T00:00:00+23:59",
    "9999-12-31T23:59:59.999999-23:59",
    "set",
    "deleted",
    '{"a":1}',
)


def _recordings(folder: Path) -> list[list[str]]:
    """Recordings of all sessions in the asset."""
    path = folder / "asset.db"
    shutil.copyfile(ASSET, path)
    open_groups(path).close()
    with open_audit(path) as audit:
        sessions = sorted({each.session_id for each in audit.iterate(SessionQuery())})
    recordings = []
    for session_id in sessions:
        with contextlib.suppress(SessionPrunedError):
            recordings.append(_export(path, session_id)[: _MOST_LINES + 1])
    assert len(recordings) > 1
    return recordings


def _export(path: Path, session_id: str) -> list[str]:
    file = io.StringIO()
    with open_recording(path, session_id, reveal=True) as recording:
        write_recording(*recording, file)
    return file.getvalue().splitlines(keepends=True)


def _mutant(lines: list[str], random: Random) -> list[str]:
    """Change one or a few places in one line."""
    lines = list(lines)
    lines[0] = json.dumps(json.loads(lines[0]) | {"commits": len(lines) - 1}) + "\n"
    for _ in range(random.choice((1, 1, 1, 2))):
        at = random.randrange(len(lines))
        document = json.loads(lines[at])
        place = random.choice([place for place in _places(document) if place])
        parent = document
        for step in place[:-1]:
            parent = parent[step]
        change = random.randrange(3)
        if change == 0:
            del parent[place[-1]]
        elif change == 1:
            parent[place[-1]] = random.choice(_WORDS)
        else:
            parent[place[-1]] = copy.deepcopy(_at(document, random.choice(list(_places(document)))))
        lines[at] = json.dumps(document) + "\n"
    return lines


def _places(document: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield place
    steps = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for step in steps:
        yield from _places(document[step], (*place, step))


def _at(document: Any, place: tuple[Any, ...]) -> Any:
    for step in place:
        document = document[step]
    return document


def _use(path: Path, session_id: str) -> None:
    """Run every query on an imported session."""
    with EmbeddedState(path) as state:
        try:
            state.get_session(session_id)
        except DspexError:
            pass  # it had ended
        else:
            for variable in state.list_variables(session_id):
                state.get_variable_history(session_id, variable.name)
    with open_audit(path) as audit:
        # The results have to fit into a server's messages, too.
        for query in (HistoryQuery, CommitQuery, ExecutionQuery, SessionQuery):
            for row in audit.iterate(query(session=session_id)):
                LISTS[query].row.message_of(row)
        for execution in audit.iterate(ExecutionQuery(session=session_id)):
            GET_EXECUTION.response_of(audit.execution(execution.execution_id))
        [session] = audit.iterate(SessionQuery(session=session_id))
        at = f"{session.ended_sequence}^" if session.ended_sequence else ""
        GET_STATE.response_of(audit.state(session_id, at))
        render(gather(audit, session_id))
    list(read_recording(iter(_export(path, session_id)), "the mutant")[1])


def _try_mutants(folder: Path, number: int, seed: int) -> None:
    """Import `number` mutants, and use the accepted ones."""
    random, recordings = Random(seed), _recordings(folder)
    counts: Counter[str] = Counter()
    path = folder / "mutants.db"
    for each in range(number):
        lines, session_id = _mutant(random.choice(recordings), random), f"mutant-{each}"
        try:
            import_session(path, iter(lines), session_id=session_id)
        except DspexError as error:
            counts[type(error).__name__] += 1
            continue
        counts["imported"] += 1
        try:
            _use(path, session_id)
        except Exception as error:
            raise AssertionError(f"seed {seed}: mutant {each} was imported, and cannot be used") from error
    print(f"seed {seed}: {counts}")
    assert maintenance.check(path).problems == (), f"seed {seed}"
    # If none or all of the mutants were accepted, the test would prove nothing.
    assert min(counts["imported"], counts["RecordingError"]) > number / 20, counts


@pytest.mark.slow
@pytest.mark.timeout(300 + MUTANTS)
def test_accepted_mutants_can_be_used(tmp_path: Path) -> None:
    _try_mutants(tmp_path, MUTANTS, secrets.randbelow(1_000_000))


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_import_without_checks_of_values_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unchecked(_: object, recorded: RecordedVersion, *_more: object) -> Value:
        return recorded.value or Value("null")

    monkeypatch.setattr(commands._Repetition, "_value_of", unchecked)
    with pytest.raises(AssertionError, match=r"seed 1: mutant|Problem"):
        _try_mutants(tmp_path, 150, seed=1)


def test_an_execution_that_retries_itself_is_refused(tmp_path: Path) -> None:
    """Following the attempts of a request back to the first would never end."""
    lines = max(_recordings(tmp_path), key=len)
    documents = [json.loads(line) for line in lines]
    documents[0]["commits"] = len(lines) - 1
    bodies = [event["body"] for each in documents for event in each.get("events", [])]
    for body in (each for each in bodies if "retry_of" in each):
        body["retry_of"] = body["execution_id"]
    circle = (json.dumps(each) + "\n" for each in documents)
    with pytest.raises(RecordingError, match="which did not begin before it"):
        import_session(tmp_path / "circle.db", circle, session_id="circle")


@pytest.mark.parametrize(
    ("key", "number", "message"),
    [
        ("attempt", 2**63, "cannot be attempt"),
        ("attempt", 10**9, "cannot be attempt"),
        ("attempt", 0, "cannot be attempt"),
        ("duration_us", 2**63, "more than 64 bits"),
        ("writes", [["x", 2**63]], "more than 64 bits"),
        ("published", [["x", -(2**63) - 1]], "more than 64 bits"),
        ("reads", {"x": ["x", "var_x", 2**63]}, "more than 64 bits"),
        ("conflicts", [{"name": "x", "expected": None, "actual": 2**63}], "more than 64 bits"),
    ],
)
def test_impossible_numbers_are_refused(tmp_path: Path, key: str, number: object, message: str) -> None:
    """Neither columns nor messages could hold them."""
    lines = max(_recordings(tmp_path), key=len)
    documents = [json.loads(line) for line in lines]
    documents[0]["commits"] = len(lines) - 1
    bodies = [event["body"] for each in documents for event in each.get("events", [])]
    # An end with a reason has no further fields.
    [*_, body] = (each for each in bodies if key in each and "reason" not in each)
    body[key] = number
    changed = (json.dumps(each) + "\n" for each in documents)
    path = tmp_path / "changed.db"
    with pytest.raises(RecordingError, match=message):
        import_session(path, changed, session_id="changed")
    assert not path.exists()
