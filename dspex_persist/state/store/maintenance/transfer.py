"""Export a session from a database file to a recording, and import a recording into a file."""

import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from dspex_persist.state.abilities import Importable, reported
from dspex_persist.state.commands import ImportSession
from dspex_persist.state.errors import (
    InvalidArgumentError,
    OutcomeUnknownError,
    RecordingError,
)
from dspex_persist.state.groups import Job
from dspex_persist.state.imports import IMPORT, CheckedImport
from dspex_persist.state.model import ImportedSession
from dspex_persist.state.provider import Progress, silent
from dspex_persist.state.recording import Header, RecordedCommit, read_recording, write_recording
from dspex_persist.state.store import created
from dspex_persist.state.store.maintenance import open_recording, refuse_files_of, refuse_owned
from dspex_persist.state.store.session_store import FileGroups, StoreOptions, open_groups

# Export


@dataclass(frozen=True, slots=True)
class ExportReport:
    """A recording of a session in the file, or on the server with the URL, `path`.

    `target` is None if it was written to a stream. `masked`: values of sensitive variables were left out.
    """

    path: Path | str
    target: Path | None
    session_id: str
    commits: int
    masked: bool


def export_session(
    path: Path,
    session_id: str,
    target: Path | TextIO,
    *,
    started: int | None = None,
    reveal: bool = False,
    progress: Progress = silent,
) -> ExportReport:
    """Write a session's log to a file or a stream. A server may write to the database meanwhile.

    Args:
        path: The database.
        session_id: The session, live or ended.
        target: A text stream, or the path of a file. It is replaced if it exists, whole or not at all, and only its
            owner can read it.
        started: If several sessions had this id, the commit with which the wanted one began; None for the newest.
        reveal: Whether to include the values of sensitive variables.
        progress: Called with the number of commits written so far.

    Raises:
        InvalidArgumentError: The target cannot be written, or is a file of the database.
        NotInHistoryError: No session ever had this id.
        SessionPrunedError: Part of the session was pruned.
    """
    if isinstance(target, Path):
        refuse_files_of(path, target, "output")
    with open_recording(path, session_id, started=started, reveal=reveal) as (header, commits):
        return export_recording(path, header, commits, target, progress=progress)


def export_recording(
    source: Path | str,
    header: Header,
    commits: Iterable[RecordedCommit],
    target: Path | TextIO,
    *,
    progress: Progress = silent,
) -> ExportReport:
    """Write a recording that was read from `source`, like `export_session`."""
    commits = reported("writing commits", commits, header.commits, progress)
    if isinstance(target, Path):
        with _replacing(target) as file:
            write_recording(header, commits, file)
    else:
        with _translated_errors("the output"):
            write_recording(header, commits, target)
            target.flush()
    file_path = target if isinstance(target, Path) else None
    return ExportReport(source, file_path, header.session_id, header.commits, header.masked)


@contextmanager
def _translated_errors(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidArgumentError("output", f"cannot write {name}: {error.strerror or error}") from error


@contextmanager
def _replacing(target: Path) -> Iterator[TextIO]:
    """Open a private file next to `target` to write to, and rename it to `target` at the end."""
    if target.exists() and not target.is_file():
        raise InvalidArgumentError("output", f"cannot write {target}: it is not a regular file")
    with _translated_errors(str(target)):
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8", newline="\n") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(target)
        finally:
            Path(name).unlink(missing_ok=True)


# Import


@dataclass(frozen=True, slots=True)
class ImportReport:
    """An imported session: its commits in the file, and how many of its executions were still running (`interrupted`).

    Executions that were running when the recording was made are ended as interrupted. `path` is the file, or the
    server's URL.
    """

    path: Path | str
    session_id: str
    commits: int
    first_sequence: int
    last_sequence: int
    interrupted: int


def import_session(
    path: Path,
    lines: Iterable[str],
    *,
    name: str = "the recording",
    session_id: str | None = None,
    options: StoreOptions | None = None,
    progress: Progress = silent,
) -> ImportReport:
    """Append a recorded session with its whole history to a file: all of it or nothing.

    Its commits keep their times and actors, and get new numbers.

    Args:
        path: The database, which no other process may have open. A missing file is created, and removed again if the
            recording is refused.
        lines: The lines of the recording.
        name: What error messages call the recording.
        session_id: The id of the new session; None to keep the recorded one.
        options: The settings of the store.
        progress: Called with the number of commits imported so far.

    Raises:
        RecordingError: The recording is damaged, inconsistent, or lacks values that were masked.
        DatabaseInUseError: Another process owns the file.
    """
    options = options or StoreOptions()
    # Before the recording is read, which may take long.
    refuse_owned(path)
    with _named(name):
        header, commits = read_recording(lines, name)
        with _Offline(path, options, header, session_id) as begun:
            for commit in reported("importing commits", commits, header.commits, progress):
                begun.add(commit)
            return _report(path, begun.finish())


def import_into(
    state: Importable,
    url: str,
    lines: Iterable[str],
    *,
    name: str = "the recording",
    session_id: str | None = None,
    progress: Progress = silent,
) -> ImportReport:
    """Import a recorded session into an open provider at `url`, like `import_session`."""
    with _named(name):
        header, commits = read_recording(lines, name)
        return _report(url, state.import_session(header, commits, session_id=session_id, progress=progress))


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Have errors call the recording by its name."""
    try:
        yield
    except RecordingError as error:
        raise RecordingError(name, error.line, error.reason).advising(error.advice) from error


def _report(path: Path | str, session: ImportedSession) -> ImportReport:
    facts = (session.session_id, session.commits, session.first_sequence, session.last_sequence, session.interrupted)
    return ImportReport(path, *facts)


class _Offline(CheckedImport):
    """An import into a file that is only opened to write what has been checked."""

    def __init__(self, path: Path, options: StoreOptions, header: Header, session_id: str | None) -> None:
        super().__init__(header, options, session_id, self._write)
        self._path, self._store_options = path, options

    def write_ahead(self) -> None:
        """Do nothing: the file is only opened at the end."""

    def _write(self, command: ImportSession) -> Future[ImportedSession]:
        with _opened(self._path, self._store_options) as groups:
            (outcome,) = groups.write_group([Job(command, IMPORT)])
            if outcome.error is not None:
                raise outcome.error
            future = Future[ImportedSession]()
            future.set_result(outcome.result)
            return future


@contextmanager
def _opened(path: Path, options: StoreOptions | None) -> Iterator[FileGroups]:
    """Open the store on a file. Files that this creates are removed if the block fails."""
    made = created.missing(path)
    groups = open_groups(path, options)
    try:
        yield groups
    except OutcomeUnknownError:
        groups.abandon()
        raise
    except BaseException:
        groups.close()
        created.remove(path, made)
        raise
    groups.close()
