"""Verifies a history, also against heads of its hash chain that are kept elsewhere.

Anyone who can rewrite the database can rewrite the .anchor file next to it, too, but not a file on another machine.
Such a file has JSON Lines, one for each head: {"sequence": 120, "hash": "9f...", "time": "2026-03-01T12:00:00+00:00"}.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from dspex_persist.addresses import DatabaseUrl, database_url
from dspex_persist.extras import lack_of
from dspex_persist.state.audit import AuditSource, CommitEntry, CommitQuery
from dspex_persist.state.errors import InvalidArgumentError, UnsupportedError
from dspex_persist.state.provider import Progress, silent

if TYPE_CHECKING:
    from dspex_persist.state.store.maintenance import CheckReport
    from dspex_persist.state.store.verify import Problem


@dataclass(frozen=True, slots=True)
class KeptHead:
    """A commit that was the newest at some time.

    Attributes:
        sequence: The number of the commit.
        hash: Its hash in hexadecimal.
        time: When it was committed, in ISO 8601.
    """

    sequence: int
    hash: str
    time: str


@dataclass(frozen=True, slots=True)
class Verification:
    """The result of verifying a history.

    Attributes:
        report: What was checked, with all problems, including those that the kept heads revealed.
        compared: How many kept heads the history was compared with.
        written: The head that was added to the kept ones, if any.
        last_compared: The newest commit among the heads that the history was compared with; None without any. Of the
            commits after it, these heads cannot tell whether some are missing from the end.
    """

    report: "CheckReport"
    compared: int
    written: KeptHead | None
    last_compared: int | None = None

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.report.problems


def verify(
    path: str | os.PathLike[str] | DatabaseUrl,
    *,
    anchor: str | os.PathLike[str] | None = None,
    write: bool = False,
    progress: Progress = silent,
    jobs: int | None = None,
) -> Verification:
    """Verify the whole history in a database: rehash each commit, and check all versions and references.

    Args:
        path: The file, which may be open in a server, or a backup; or postgresql://USER@HOST/DATABASE.
        anchor: A file with heads kept elsewhere. The history must still contain each of them, unchanged.
        write: Add the current head to `anchor`, which is created if missing, if there are no problems.
        progress: Is called with the progress.
        jobs: How many processes share the work, at most 64. By default one for each core, but at most 4, and a single
            one for a small file. The result does not depend on it.

    Returns:
        The problems. Nothing was altered or lost if there are none (`ok`).

    Raises:
        OpenError: The file is not a database of this release.
        InvalidArgumentError: `anchor` cannot be read or written, has no heads, or is missing although `write` is set;
            `jobs` is out of range; or what the database needs is not installed.
        UnsupportedError: It is in Redis or Valkey.
    """
    kept_in = None if anchor is None else Path(anchor)
    if write and kept_in is None:
        raise InvalidArgumentError("anchor", "name the file to write the head to")
    kept = () if kept_in is None else _read(kept_in, may_be_missing=write)
    source, check = _opened(path, progress, jobs)
    with source:
        # Read before the check, so that a head that is written has been checked.
        newest = source.head()
        report = check()
        report = replace(report, problems=(*report.problems, *_problems(source, kept)))
        written = None
        if write and kept_in is not None and newest and not report.problems:
            written = _head_of(_commit(source, newest))
            _append(kept_in, written)
    return Verification(report, len(kept), written, max((head.sequence for head in kept), default=None))


def _opened(
    path: str | os.PathLike[str] | DatabaseUrl, progress: Progress, jobs: int | None
) -> "tuple[AuditSource, Callable[[], CheckReport]]":
    from dspex_persist.state.store import maintenance

    url = path if isinstance(path, DatabaseUrl) else database_url(path) if isinstance(path, str) else None
    if url is None:
        assert not isinstance(path, DatabaseUrl), "it is the URL then"
        file = Path(path)
        return maintenance.open_audit(file), partial(maintenance.check, file, progress, jobs)
    if url.scheme != "postgresql":
        raise UnsupportedError(f"verifying {url}", "`dspex-persist db check` reads and rehashes its whole log")
    lack = lack_of(url.scheme, "psycopg", "postgresql")
    if lack is not None:
        raise InvalidArgumentError("path", lack)
    from dspex_persist.state.store import databases

    return databases.open_audit(url.url), partial(databases.check, url.url, progress, jobs)


def _commit(source: AuditSource, sequence: int) -> CommitEntry:
    (commit,) = source.page(CommitQuery(since=str(sequence - 1), until=str(sequence))).rows
    return commit


def _head_of(commit: CommitEntry) -> KeptHead:
    return KeptHead(commit.sequence, commit.hash, commit.created_at.isoformat())


def _problems(source: AuditSource, kept: Sequence[KeptHead]) -> "Iterator[Problem]":
    from dspex_persist.state.store.verify import Problem

    newest = source.head()
    for head in kept:
        where = f"commit {head.sequence}"
        if head.sequence > newest:
            reason = f"kept as the newest of {head.time}, it is gone: the log ends with commit {newest}"
            yield Problem(where, reason)
        elif (actual := _commit(source, head.sequence).hash) != head.hash:
            reason = f"kept as {head.hash[:12]}… of {head.time}, it is {actual[:12]}…: history was rewritten"
            yield Problem(where, reason)


def _read(file: Path, *, may_be_missing: bool) -> tuple[KeptHead, ...]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        if may_be_missing:
            return ()
        raise InvalidArgumentError("anchor", f"there is no file {file}; writing a head creates it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError("anchor", f"cannot read {file}: {error}") from error
    heads = tuple(_parse(file, number, line) for number, line in enumerate(lines, 1))
    if not heads and not may_be_missing:
        raise InvalidArgumentError("anchor", f"{file} is empty; write a head to it first")
    return heads


def _parse(file: Path, number: int, line: str) -> KeptHead:
    try:
        head = KeptHead(**json.loads(line))
        if head.sequence < 1 or len(bytes.fromhex(head.hash)) != 32:
            raise ValueError(line)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError("anchor", f"line {number} of {file} is not a kept head") from error
    return head


def _append(file: Path, head: KeptHead) -> None:
    line = json.dumps({"sequence": head.sequence, "hash": head.hash, "time": head.time})
    try:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(line + "\n")
            lines.flush()
            os.fsync(lines.fileno())
    except OSError as error:
        raise InvalidArgumentError("anchor", f"cannot write {file}: {error.strerror}") from error
