"""Runs the engine again and again while its files fail: `python -m tests.faults.io_child FOLDER [BUG]` under the shim.

Each line on stdin is a case, `KIND NUMBER MODE on|once`: which operation of which kind fails, how, and whether later
ones fail, too (with NUMBER 0, none does). Each case runs in a separate fork, on a fresh database in a folder named
after the case, and writes a line for each request and each answer to `acks` there. This process answers with a line:
the exit code, and the numbers of operations by the shim's kinds (none if the case did not get that far).

With the bug `error-is-abort` the engine treats every error as a certain abort of the group, and goes on; with
`import-in-parts` an import uses many transactions.

The process forks before it has any threads, because imports take ten times as long as a case.
"""

import ctypes
import json
import os
import signal
import sqlite3
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import alembic.command  # noqa: F401  (imported before the fork, so that no case has to)

from dspex_persist.errors import DspexError
from dspex_persist.state.commands import (
    Command,
    GetVariable,
    GetVariableHistory,
    ImportSession,
    InitializeSession,
    RegisterVariable,
    SetVariable,
    SetVariables,
)
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import OutcomeUnknownError, StateError
from dspex_persist.state.groups import Groups, Job, Outcome
from dspex_persist.state.imports import IMPORT
from dspex_persist.state.model import ImportedSession, PrunePolicy, Value
from dspex_persist.state.recording import write_recording
from dspex_persist.state.store import maintenance, session_store
from dspex_persist.state.store.session_store import FileGroups
from dspex_persist.wiring.recordings import import_session
from tests.deadline import within

KINDS = ("open", "read", "write", "sync", "truncate", "lock", "unlink", "rename")
DATABASE, BACKUP, ACKS = "case.db", "backup.db", "acks"
SESSION, PRUNED, IMPORTED = "session", "pruned", "imported"
IMPORTED_VERSIONS = 30
VARIABLES = 3
THREADS = 3
TIMES = 6
ANSWER_S, CASE_S = within(20), round(within(60))
EXIT_STORAGE_FAILED, EXIT_NOT_OPENED, EXIT_NOT_CLOSED, EXIT_CRASHED, EXIT_HUNG = 70, 71, 72, 98, 99


class Case:
    """One run of the engine."""

    def __init__(self, folder: Path, recording: list[str]) -> None:
        self._folder = folder
        self._database = folder / DATABASE
        self._recording = recording
        self._acks = os.open(folder / ACKS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._fatal = threading.Event()
        self._hung = False
        self._ids: list[str] = []

    def run(self) -> int:
        """Run the case; returns the exit code for the process."""
        try:
            state = EmbeddedState(self._database, on_fatal=lambda _: self._fatal.set())
        except StateError as error:
            self._note(event="not opened", error=type(error).__name__, text=str(error))
            return EXIT_NOT_OPENED
        if self._set_up(state):
            threads = [threading.Thread(target=self._work, args=(state, number)) for number in range(THREADS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            policy = PrunePolicy(keep_versions=2, session_id=PRUNED)
            self._attempt("prune", lambda: state.prune(policy, confirm=True))
            self._attempt("backup", self._back_up)
        if self._hung:
            return EXIT_HUNG
        if self._fatal.is_set():
            # Like a server, end at once, without touching the files again.
            return EXIT_STORAGE_FAILED
        return self._close(state)

    def _close(self, state: EmbeddedState) -> int:
        try:
            state.close()
        except StateError as error:
            self._note(event="not closed", error=type(error).__name__, text=str(error))
            return EXIT_NOT_CLOSED
        self._attempt("import", lambda: import_session(self._database, self._recording, session_id=IMPORTED))
        self._attempt("restore", self._restore)
        return 0

    def _set_up(self, state: EmbeddedState) -> bool:
        for _ in range(3):  # a group that fails on a full disk may be repeated
            if self._ask(state, InitializeSession(SESSION), "", ()) is not None:
                break
        for index in range(VARIABLES):
            token = f"register {index}"
            command = RegisterVariable(SESSION, f"v{index}", "string", _value(token), "", {"token": token})
            variable_id = self._ask(state, command, token, ())
            if variable_id is None:
                return False
            self._ids.append(str(variable_id))
        for command in _plain_session(PRUNED, 6):
            self._ask(state, command, "", ())
        return True

    def _work(self, state: EmbeddedState, number: int) -> None:
        for count in range(TIMES):
            token = f"{number}-{count}"
            metadata = {"token": token}
            command: Command[Any]
            if count % 2:
                targets = [self._ids[number], self._ids[(number + 1) % VARIABLES]]
                updates = {target: _value(token) for target in targets}
                command = SetVariables(SESSION, updates, metadata, atomic=True)
            else:
                targets = [self._ids[count % VARIABLES]]
                command = SetVariable(SESSION, targets[0], _value(token), metadata)
            self._ask(state, command, token, tuple(targets))
            self._ask(state, GetVariableHistory(SESSION, targets[0]), "", ())
            self._ask(state, GetVariable(SESSION, targets[0], bypass_cache=True), "", ())

    def _ask(self, state: EmbeddedState, command: Command[Any], token: str, targets: tuple[str, ...]) -> Any:
        """Run a command and note the answer; returns its result, or None after any error."""
        self._note(event="ask", token=token, targets=targets)
        try:
            future: Future[Any] = state.submit(command)
            result = future.result(ANSWER_S)
        except TimeoutError as error:
            # It may also be a TimeoutError of the driver's pool.
            self._hung = self._hung or not future.done()
            self._note(event="hung" if not future.done() else "raw", token=token, text=repr(error))
        except OutcomeUnknownError as error:
            self._note(event="unknown", token=token, error=type(error).__name__)
        except StateError as error:
            self._note(event="refused", token=token, error=type(error).__name__)
        except Exception as error:  # noqa: BLE001  (errors that callers should never see)
            self._note(event="raw", token=token, text=f"{type(command).__name__}: {error!r}")
        else:
            self._note(event="ok", token=token, versions=_versions(result, targets))
            return result
        return None

    def _back_up(self) -> None:
        report = maintenance.backup(self._database, self._folder / BACKUP)
        if report.problems:
            raise StateError(f"the copy has problems: {report.problems[0]}")

    def _restore(self) -> None:
        report = maintenance.restore(self._folder / BACKUP, self._database)
        if report.problems:
            raise StateError(f"the backup has problems: {report.problems[0]}")

    def _attempt(self, what: str, do: Callable[[], object]) -> None:
        try:
            do()
        except DspexError as error:
            self._note(event="failed", what=what, error=type(error).__name__)
        except Exception as error:  # noqa: BLE001  (errors that callers should never see)
            self._note(event="raw", text=f"{what}: {error!r}")
        else:
            self._note(event="done", what=what)

    def _note(self, **what: Any) -> None:
        os.write(self._acks, json.dumps(what).encode() + b"\n")


def _value(token: str) -> Value:
    return Value(json.dumps(token))


def _plain_session(session_id: str, versions: int) -> list[Command[Any]]:
    """The commands that make a session with one variable."""
    return [
        InitializeSession(session_id),
        RegisterVariable(session_id, "plain", "string", _value("0")),
        *(SetVariable(session_id, "plain", _value(f"{count}" + "x" * 900)) for count in range(1, versions)),
    ]


def _versions(result: Any, targets: tuple[str, ...]) -> dict[str, int]:
    if isinstance(result, str):
        return {result: 0}
    if isinstance(result, int):
        return {targets[0]: result} if targets else {}
    versions = getattr(result, "versions", {})
    return dict(versions) if isinstance(versions, dict) else {}


def _record_session(folder: Path) -> list[str]:
    """A recording of a session in another file."""
    with EmbeddedState(folder / "other.db") as state:
        for command in _plain_session("other", IMPORTED_VERSIONS):
            state.run(command)
        header, commits = state.record("other", reveal=True)
        path = folder / "other.jsonl"
        with path.open("w") as file:
            write_recording(header, commits, file)
    return path.read_text().splitlines(keepends=True)


def _load_shim() -> Any:
    """The functions of the preloaded library."""
    library = ctypes.CDLL(None)
    library.fault_seen.restype = ctypes.c_long
    library.fault_seen.argtypes = (ctypes.c_char_p,)
    library.fault_arm.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_char_p, ctypes.c_int)
    return library


def _run_forked(library: Any, place: Path, recording: list[str], case: list[str]) -> tuple[int, str]:
    """Run one case in a fork; returns its exit code and its numbers of operations."""
    kind, number, mode, goes_on = case
    place.mkdir(parents=True)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = EXIT_CRASHED
        # In case everything else hangs.
        signal.alarm(CASE_S)
        try:
            # To count without a fault, arm an operation that no case reaches.
            kinds = kind if int(number) else " ".join(KINDS)
            library.fault_arm(kinds.encode(), int(number) or 1 << 40, mode.encode(), goes_on == "on")
            code = Case(place, recording).run()
            counts = [library.fault_seen(each.encode()) for each in KINDS]
            os.write(writer, " ".join(map(str, counts)).encode())
        except BaseException as error:  # noqa: BLE001  (the end of the process: every error is reported)
            (place / "crash").write_text(repr(error))
        finally:
            os._exit(code)
    os.close(writer)
    seen = os.read(reader, 256)
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), seen.decode()


def _take_error_for_abort() -> None:
    session_store._CERTAIN_ABORTS |= {sqlite3.SQLITE_IOERR}


def _import_in_parts() -> None:
    def write_import(self: FileGroups, command: ImportSession, _wait: bool) -> Outcome:
        steps = [Job(step, IMPORT) for page in command.steps() for step in page]
        outcomes = [outcome for step in steps for outcome in self.write_group([step])]
        failed = [outcome for outcome in outcomes if outcome.error is not None]
        return failed[0] if failed else Outcome(ImportedSession(command.session_id, len(steps), 1, len(steps)))

    Groups._write_import = write_import  # type: ignore[assignment,method-assign]


BUGS = {"error-is-abort": _take_error_for_abort, "import-in-parts": _import_in_parts}


def main() -> None:
    folder = Path(sys.argv[1])
    library = _load_shim()
    recording = _record_session(folder)
    for bug in sys.argv[2:]:
        BUGS[bug]()
    for line in sys.stdin:
        case = line.split()
        code, seen = _run_forked(library, folder / "-".join(case), recording, case)
        print(code, seen, flush=True)


if __name__ == "__main__":
    main()
