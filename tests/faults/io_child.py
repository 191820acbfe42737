"""Runs the engine again and again while its files fail: `python -m tests.faults.io_child FOLDER [BUG]` under the shim.

Each line on stdin is a case: `NUMBER MODE on|once`, the operation that fails, how, and whether those after it do so
too. Each case runs in a fork of its own on a fresh database in `FOLDER/NUMBER-MODE-on`, and writes what it asked for
and what it was told, one line each, to `acks` there. This process answers with a line: the exit code, and how many
operations there were (0: the case was not counted).

With the bug `error-is-abort` the engine takes every error for the certain end of a group, and goes on.

It forks before there is any thread: importing takes ten times as long as a case.
"""

import ctypes
import json
import os
import sqlite3
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import alembic.command  # noqa: F401  (a case should not pay for it)
import structlog

from dspex_persist.state.commands import Command, InitializeSession, RegisterVariable, SetVariable, SetVariables
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.errors import OutcomeUnknownError, StateError
from dspex_persist.state.model import Value
from dspex_persist.state.store import session_store
from tests.deadline import within

SESSION = "session"
VARIABLES = 3
THREADS = 3
TIMES = 6
ANSWER_S = within(20)
EXIT_STORAGE_FAILED, EXIT_NOT_OPENED, EXIT_NOT_CLOSED, EXIT_CRASHED, EXIT_HUNG = 70, 71, 72, 98, 99


class Case:
    """One run of the engine."""

    def __init__(self, folder: Path) -> None:
        self._database = folder / "case.db"
        self._acks = os.open(folder / "acks", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._fatal = threading.Event()
        self._hung = False
        self._ids: list[str] = []

    def run(self) -> int:
        """The exit code with which the process should end."""
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
        if self._hung:
            return EXIT_HUNG
        if self._fatal.is_set():
            # As a server ends: at once, without touching the files again.
            return EXIT_STORAGE_FAILED
        return self._close(state)

    def _close(self, state: EmbeddedState) -> int:
        try:
            state.close()
        except StateError as error:
            self._note(event="not closed", error=type(error).__name__, text=str(error))
            return EXIT_NOT_CLOSED
        return 0

    def _set_up(self, state: EmbeddedState) -> bool:
        for _ in range(3):  # a group that fails for want of room may be repeated
            if self._ask(state, InitializeSession(SESSION), "", ()) is not None:
                break
        for index in range(VARIABLES):
            token = f"register {index}"
            command = RegisterVariable(SESSION, f"v{index}", "string", _value(token), "", {"token": token})
            found = self._ask(state, command, token, ())
            if found is None:
                return False
            self._ids.append(str(found))
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

    def _ask(self, state: EmbeddedState, command: Command[Any], token: str, targets: tuple[str, ...]) -> Any:
        """The result; None if there is none, for whatever reason."""
        self._note(event="ask", token=token, targets=targets)
        future: Future[Any] = state.submit(command)
        try:
            result = future.result(ANSWER_S)
        except TimeoutError:
            self._hung = True
            self._note(event="hung", token=token)
        except OutcomeUnknownError as error:
            self._note(event="unknown", token=token, error=type(error).__name__)
        except StateError as error:
            self._note(event="refused", token=token, error=type(error).__name__)
        else:
            self._note(event="ok", token=token, versions=_versions(result, targets))
            return result
        return None

    def _note(self, **what: Any) -> None:
        os.write(self._acks, json.dumps(what).encode() + b"\n")


def _value(token: str) -> Value:
    return Value(json.dumps(token))


def _versions(result: Any, targets: tuple[str, ...]) -> dict[str, int]:
    if isinstance(result, str):
        return {result: 0}
    if isinstance(result, int):
        return {targets[0]: result}
    return dict(getattr(result, "versions", {}))


def _load_shim() -> Any:
    """The preloaded library's own functions."""
    library = ctypes.CDLL(None)
    library.fault_seen.restype = ctypes.c_long
    library.fault_arm.argtypes = (ctypes.c_long, ctypes.c_char_p, ctypes.c_int)
    return library


def _run_forked(library: Any, folder: Path, number: int, mode: str, goes_on: str) -> tuple[int, int]:
    """Exit code and number of operations of one case."""
    place = folder / f"{number}-{mode}-{goes_on}"
    place.mkdir(parents=True)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = EXIT_CRASHED
        try:
            # 0 would not count; so far no case gets.
            library.fault_arm(number or 1 << 40, mode.encode(), goes_on == "on")
            code = Case(place).run()
            os.write(writer, str(library.fault_seen()).encode())
        except BaseException as error:  # noqa: BLE001  (the end of a process: it is told, whatever it was)
            (place / "crash").write_text(repr(error))
        finally:
            os._exit(code)
    os.close(writer)
    seen = os.read(reader, 32)
    os.close(reader)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), int(seen or b"0")


def main() -> None:
    # stdout is for the answers.
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    folder = Path(sys.argv[1])
    library = _load_shim()
    if sys.argv[2:] == ["error-is-abort"]:
        session_store._CERTAIN_ABORTS |= {sqlite3.SQLITE_IOERR}
    for line in sys.stdin:
        number, mode, goes_on = line.split()
        code, seen = _run_forked(library, folder, int(number), mode, goes_on)
        print(code, seen, flush=True)


if __name__ == "__main__":
    main()
