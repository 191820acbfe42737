"""Sessions out of database files and into them: export to a recording, import of one."""

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TextIO

from dspex_persist.state.commands import ExpireSession, FinishImport, ImportCommit
from dspex_persist.state.errors import (
    DatabaseInUseError,
    Hint,
    InvalidArgumentError,
    OutcomeUnknownError,
    RecordingError,
)
from dspex_persist.state.groups import Job
from dspex_persist.state.model import Origin
from dspex_persist.state.provider import Progress, silent
from dspex_persist.state.recording import Header, RecordedCommit, read_recording, write_recording
from dspex_persist.state.store import log_reader
from dspex_persist.state.store.engine import OwnershipLock, open_readers, snapshot
from dspex_persist.state.store.maintenance import open_recording, refuse_files_of
from dspex_persist.state.store.session_store import FileGroups, StoreOptions, open_groups

_IMPORT: Final = Origin("dspex-persist", "import")
_TELL_AFTER: Final = 100


def _told(step: str, commits: Iterable[RecordedCommit], in_all: int, progress: Progress) -> Iterator[RecordedCommit]:
    for commit in commits:
        if commit.number % _TELL_AFTER == 1:
            progress(step, commit.number - 1, in_all)
        yield commit
    progress(step, in_all, in_all)


# Export


@dataclass(frozen=True, slots=True)
class ExportReport:
    """A recording that was made of a session in the file `path`, or on the server whose URL that is.

    `masked`: values of sensitive variables were left out. `target` None: a stream.
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
    """Write a session's log to a file, which appears whole or not at all, readable by its owner; or to a stream.

    A server may go on writing meanwhile. A file of that name is replaced. Raises `InvalidArgumentError` where it cannot
    be written, or is a file of the database.
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
    """Write a recording, which is from `source`, as `export_session` does."""
    told = _told("writing commits", commits, header.commits, progress)
    if isinstance(target, Path):
        with _replacing(target) as file:
            write_recording(header, told, file)
    else:
        with _explained("the output"):
            write_recording(header, told, target)
            target.flush()
    made = target if isinstance(target, Path) else None
    return ExportReport(source, made, header.session_id, header.commits, header.masked)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidArgumentError("output", f"cannot write {name}: {error.strerror or error}") from error


@contextmanager
def _replacing(target: Path) -> Iterator[TextIO]:
    """A private file beside `target` to write to, which takes its name at the end."""
    if target.exists() and not target.is_file():
        raise InvalidArgumentError("output", f"cannot write {target}: it is not a regular file")
    with _explained(str(target)):
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
    """A session that was imported: its commits in the file, and how many executions of it were interrupted."""

    path: Path
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
    """Append a recorded session, with its whole history, to a file that nobody else has open: all of it or nothing.

    Its commits keep their times and actors, and get new numbers. `session_id` None: it keeps its id. The file is made
    where it is missing, and is not left behind where the recording is refused.
    """
    header, commits = read_recording(lines, name)
    if header.masked:
        reason = "values of sensitive variables were left out of it, and an import would have to invent them"
        raise RecordingError(name, 1, reason).advising(Hint.EXPORT_REVEALED)
    told = _told("importing commits", commits, header.commits, progress)
    with _opened(path, options) as groups:
        try:
            return _append(path, groups, header.session_id if session_id is None else session_id, told)
        except RecordingError as error:
            raise RecordingError(name, error.line, error.reason) from error


@contextmanager
def _opened(path: Path, options: StoreOptions | None) -> Iterator[FileGroups]:
    """The store on a file. What this makes is gone again if the block fails."""
    made = _missing(path)
    groups = open_groups(path, options)
    try:
        yield groups
    except OutcomeUnknownError:
        groups.abandon()
        raise
    except BaseException:
        groups.close()
        _remove_empty(path, made)
        raise
    groups.close()


def _missing(path: Path) -> list[Path]:
    """What opening a database would make: nothing where it is there, else the file and its side files."""
    if os.path.lexists(path):
        return []
    files = [path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm", ".anchor", ".lock")]
    return [file for file in files if not file.exists()]


def _remove_empty(path: Path, made: Sequence[Path]) -> None:
    """Remove what was made for nothing, unless somebody else has begun to use it."""
    if not made:
        return
    with suppress(DatabaseInUseError):
        lock = OwnershipLock(path)
        try:
            if _is_empty(path):
                for each in made:
                    each.unlink(missing_ok=True)
        finally:
            lock.release()


def _is_empty(path: Path) -> bool:
    readers = open_readers(path, size=1)
    try:
        with snapshot(readers) as connection:
            return log_reader.head(connection).sequence == 0
    finally:
        readers.dispose()


def _append(path: Path, groups: FileGroups, session_id: str, commits: Iterable[RecordedCommit]) -> ImportReport:
    store = groups.log
    # One whose time is over is not live, but nobody has said so yet.
    groups.write_group([Job(ExpireSession(session_id), _IMPORT)])
    first = store.head.sequence + 1
    interrupted = store.write_whole(_jobs(session_id, commits))
    last = store.head.sequence
    return ImportReport(path, session_id, last - first + 1, first, last, sum(interrupted))


def _jobs(session_id: str, commits: Iterable[RecordedCommit]) -> Iterator[Job]:
    for commit in commits:
        yield Job(ImportCommit(session_id, commit), _IMPORT)
    yield Job(FinishImport(session_id), _IMPORT)
