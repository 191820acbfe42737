"""audit verify: the whole history hashed again, and compared with heads that were kept elsewhere.

Kept heads are JSON Lines, one for each time that somebody had them written: {"sequence": 120, "hash": "9f...", "time":
"2026-03-01T12:00:00+00:00"}. Whoever changes the log cannot change a file that he cannot reach.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dspex_persist.audit import AuditSource, CommitEntry, CommitQuery
from dspex_persist.cli.output import counted, progress_bar
from dspex_persist.state.errors import InvalidArgumentError

if TYPE_CHECKING:
    from dspex_persist.state.store.maintenance import CheckReport
    from dspex_persist.state.store.verify import Problem


@dataclass(frozen=True, slots=True)
class KeptHead:
    """A commit as it was when it was the newest."""

    sequence: int
    hash: str
    time: str


@dataclass(frozen=True, slots=True)
class Verification:
    """What was found, with how many kept heads the log was compared, and the one that was written."""

    report: "CheckReport"
    compared: int
    written: KeptHead | None


def verify(path: Path, anchor: Path | None, write: bool) -> Verification:
    """Check the file, and against the heads in `anchor`; with `write`, add its head to them if all is well."""
    from dspex_persist.state.store import maintenance

    if write and anchor is None:
        raise InvalidArgumentError("write", "it says to write a head: name the file with --anchor")
    kept = _read(anchor, write) if anchor is not None else ()
    with ExitStack() as undo:
        # Before the check, so that what is written has been checked.
        progress = undo.enter_context(progress_bar())
        source = undo.enter_context(maintenance.open_audit(path))
        newest = source.head()
        report = maintenance.check(path, progress)
        problems = (*report.problems, *_problems(source, kept))
        report = replace(report, problems=problems)
        written = None
        if write and anchor is not None and newest and not problems:
            written = _head_of(_commit(source, newest))
            _append(anchor, written)
    return Verification(report, len(kept), written)


def _commit(source: AuditSource, sequence: int) -> CommitEntry:
    (found,) = source.page(CommitQuery(since=str(sequence - 1), until=str(sequence))).rows
    return found


def _head_of(commit: CommitEntry) -> KeptHead:
    return KeptHead(commit.sequence, commit.hash, commit.created_at.isoformat())


def _problems(source: AuditSource, kept: Sequence[KeptHead]) -> "Iterator[Problem]":
    from dspex_persist.state.store.verify import Problem

    newest = source.head()
    for head in kept:
        where = f"commit {head.sequence}"
        if head.sequence > newest:
            yield Problem(where, f"kept as the newest of {head.time}, it is gone: the log ends with commit {newest}")
        elif (found := _commit(source, head.sequence).hash) != head.hash:
            yield Problem(
                where, f"kept as {head.hash[:12]}… of {head.time}, it is {found[:12]}…: history was rewritten"
            )


def _read(anchor: Path, write: bool) -> tuple[KeptHead, ...]:
    try:
        lines = anchor.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError as error:
        if write:
            return ()
        raise InvalidArgumentError("anchor", f"there is no file {anchor}; --write makes it") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError("anchor", f"cannot read {anchor}: {error}") from error
    heads = tuple(_parse(anchor, number, line) for number, line in enumerate(lines, 1))
    if not heads and not write:
        raise InvalidArgumentError("anchor", f"{anchor} is empty; --write adds the head to it")
    return heads


def _parse(anchor: Path, number: int, line: str) -> KeptHead:
    try:
        found = KeptHead(**json.loads(line))
        if found.sequence < 1 or len(bytes.fromhex(found.hash)) != 32:
            raise ValueError(line)
    except (TypeError, ValueError) as error:
        raise InvalidArgumentError("anchor", f"{anchor}, line {number} is no head that --write wrote") from error
    return found


def _append(anchor: Path, head: KeptHead) -> None:
    line = json.dumps({"sequence": head.sequence, "hash": head.hash, "time": head.time})
    try:
        with anchor.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InvalidArgumentError("anchor", f"cannot write {anchor}: {error.strerror}") from error


def told(verification: Verification, anchor: Path | None) -> Iterator[str]:
    """What there is to say about the kept heads."""
    if verification.compared:
        yield f"compared with {counted(verification.compared, 'kept head')} of {anchor}"
    if verification.written is not None:
        yield f"{anchor}: head {verification.written.sequence} written, {verification.written.hash}"
