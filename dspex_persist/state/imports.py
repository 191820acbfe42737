"""Check a recording before it is imported, so that the writer only has to write it.

An import is one group of the log: all of it or nothing. While it is written, no other caller can write. So everything
that takes long happens before, on the caller's thread: reading, parsing, and applying every commit to a session that
nobody sees. What was checked waits in memory, and beyond some megabytes in a temporary file. Only of a short recording
the writer checks the commits as it writes them, which takes some hundredths of a second.

Into a backend that nobody else uses, the commits can be written while they come (`write_ahead`): its transaction is
open until then, and nobody waits for it. Then each is applied once, and nothing waits in a file.
"""

import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import IO, Final

from dspex_persist import clock
from dspex_persist.infra import forks
from dspex_persist.state.abilities import SessionImport
from dspex_persist.state.budgets import Spent
from dspex_persist.state.commands import ImportCommit, ImportSession
from dspex_persist.state.errors import Hint, RecordingError, UnavailableError
from dspex_persist.state.model import ImportedSession, JournalEntry, Origin, VariableVersion
from dspex_persist.state.options import SessionOptions
from dspex_persist.state.recording import ContentHash, Header, RecordedCommit, commit_in, commit_line
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.unit_of_work import Drafts, RecordedOutcome, UnitOfWork, VersionQuery

IMPORT: Final = Origin("dspex-persist", "import")
_FEW: Final = 1_500
_FEW_BYTES: Final = 1024 * 1024
"""So many commits, with so large values, are checked by the writer itself, which applies each only once."""
_PAGE_COMMITS: Final = 500
_PAGE_BYTES: Final = 2 * 1024 * 1024
_MEMORY_BYTES: Final = 16 * 1024 * 1024
"""About how many bytes of checked commits stay in memory."""
_AHEAD_COMMITS: Final = 100
_MOST_WAITING: Final = 4
"""So many commits make a page that is written ahead, and so many pages wait for the writer."""


class _Nothing:
    """The `Backing` of a session that is only checked."""

    def load(self, session_id: str) -> SessionState | None:
        return None

    def find_version(self, state: SessionState, variable_id: str, version: int) -> VariableVersion | None:
        return None

    def history(self, state: SessionState, query: VersionQuery) -> list[VariableVersion] | None:
        return None

    def find_outcome(self, session_id: str, key: str) -> RecordedOutcome | None:
        return None

    def find_execution(self, state: SessionState, key: str) -> JournalEntry | None:
        return None

    def spent(self, state: SessionState) -> tuple[int, Mapping[str, Spent]]:
        return 0, {}


class CheckedImport(SessionImport):
    """Checks the commits of a recording one by one, and keeps them until they are imported.

    Args:
        header: The header of the recording.
        options: The limits of the backend that imports it.
        session_id: The id of the new session; None to keep the recorded one.
        submit: Submits the command that imports the checked commits.
        may_lead: Whether `write_ahead` may keep all others from writing until the end.

    Raises:
        RecordingError: Values were left out of the recording.
    """

    def __init__(
        self,
        header: Header,
        options: SessionOptions,
        session_id: str | None,
        submit: Callable[[ImportSession], "Future[ImportedSession]"],
        *,
        may_lead: bool = True,
    ) -> None:
        if header.masked:
            reason = "values of sensitive variables were left out of it, and an import needs them"
            raise RecordingError("the recording", 1, reason).advising(Hint.EXPORT_REVEALED)
        self._session_id = header.session_id if session_id is None else session_id
        # The requests that the answers belong to named the session.
        self._keeps_answers = self._session_id == header.session_id
        self._options = options
        self._submit = submit
        self._may_lead = may_lead
        self._ahead: _Ahead | None = None
        self._in_all = header.commits
        self._drafts = Drafts(_Nothing())
        self._pages = _Pages()
        self._page: list[RecordedCommit] = []
        self._page_bytes = 0
        self._content = ContentHash()
        self._is_checked = False
        self._size_bytes = 0

    @property
    def content_hash(self) -> str:
        """See `SessionImport`."""
        return self._content.hexdigest()

    def add(self, commit: RecordedCommit) -> None:
        """Add the next commit; `RecordingError` if it is inconsistent with those before it, or exceeds a limit."""
        self._content.add(commit)
        if self._ahead is not None:
            self._ahead.add(commit)
            return
        size_bytes = sum(version.value.size_bytes for version in commit.versions if version.value is not None)
        self._size_bytes += size_bytes
        # The writer does not see answers that are left out.
        is_left_out = commit.answer is not None and not self._keeps_answers
        is_much = len(self._page) == _FEW or self._size_bytes > _FEW_BYTES
        if is_much or is_left_out:
            self.check()
        if self._is_checked:
            self._check(commit)
        if is_left_out:
            commit = replace(commit, answer=None)
        self._page.append(commit)
        self._page_bytes += size_bytes + _PAGE_BYTES // _PAGE_COMMITS
        if self._page_bytes > _PAGE_BYTES and self._is_checked:
            self._end_page()

    def write_ahead(self) -> None:
        """See `SessionImport.write_ahead`. Answers that are left out are not written, and have to be checked before."""
        if self._may_lead and self._ahead is None and self._keeps_answers and self._content.commits == 0:
            self._ahead = _Ahead(self._session_id, self._submit)

    def check(self) -> None:
        """See `SessionImport.check`."""
        if self._ahead is not None:
            self._ahead.settle()
        elif not self._is_checked:
            self._is_checked = True
            for each in self._page:
                self._check(each)

    def _check(self, commit: RecordedCommit) -> None:
        options, drafts = self._options, self._drafts
        unit = UnitOfWork(
            drafts,
            IMPORT,
            commit.at,
            commit.number,
            options.limits,
            options.session_ttl_s,
            options.optimization_lease_s,
            clock.steady(),
        )
        ImportCommit(self._session_id, commit).apply(unit)
        drafts.versions.clear()
        drafts.executions.clear()
        if commit.answer is not None:
            # Only its key is needed from here on, and the answers may be large.
            drafts.outcomes[self._session_id, commit.answer.key] = _SEEN

    def _end_page(self) -> None:
        self._pages.add(self._page, self._page_bytes)
        self._page, self._page_bytes = [], 0

    def extend(self, header: Header) -> bool:
        """See `SessionImport.extend`."""
        self._in_all = header.commits
        return True

    def finish(self) -> ImportedSession:
        """Import the session; `RecordingError` if commits are missing."""
        if self._content.commits != self._in_all:
            # What is wrong with a commit says more.
            self.check()
            reason = f"it ends after {self._content.commits} commits of {self._in_all}"
            raise RecordingError("the recording", self._content.commits + 1, reason)
        if self._ahead is not None:
            return replace(self._ahead.finish(), content_hash=self.content_hash)
        self._end_page()
        command = ImportSession(self._session_id, self._pages, self.content_hash, self._is_checked)
        return self._submit(command).result()

    def close(self) -> None:
        """Free the memory, and delete the temporary file."""
        if self._ahead is not None:
            self._ahead.close()
        self._pages.close()


_SEEN: Final = RecordedOutcome("", "", "", "", "")


class Feed:
    """Pages of commits that the writer writes while others are still being added."""

    def __init__(self) -> None:
        self._pages: deque[Sequence[RecordedCommit]] = deque()
        self._changed = threading.Condition()
        self._is_awaited = self._is_complete = self._has_ended = False

    def put(self, page: Sequence[RecordedCommit]) -> None:
        """Add a page, when there is room for it. Nothing happens if no more are written."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_ended or len(self._pages) < _MOST_WAITING)
            self._pages.append(page)
            self._changed.notify_all()

    def settle(self) -> None:
        """Wait until all pages are written, or no more are."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_ended or (self._is_awaited and not self._pages))

    def complete(self) -> None:
        """End the pages: these are all."""
        with self._changed:
            self._is_complete = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Have nothing of it written, unless it is complete."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[Sequence[RecordedCommit]]:
        while (page := self._next()) is not None:
            yield page

    def _next(self) -> Sequence[RecordedCommit] | None:
        with forks.aside(), self._changed:
            self._is_awaited = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._pages or self._is_complete or self._has_ended)
            self._is_awaited = False
            if self._has_ended and not self._is_complete:
                raise UnavailableError("the import was given up")
            return self._pages.popleft() if self._pages else None


class _Ahead:
    """An import that is written while its commits come: its group is open, and the writer waits for more."""

    def __init__(self, session_id: str, submit: Callable[[ImportSession], "Future[ImportedSession]"]) -> None:
        self._page: list[RecordedCommit] = []
        self._page_bytes = 0
        self._feed = feed = Feed()
        # However this object ends, the writer must not wait for it.
        self._end = weakref.finalize(self, feed.stop)
        self._imported = submit(ImportSession(session_id, feed, ""))
        self._imported.add_done_callback(lambda _: feed.stop())

    def add(self, commit: RecordedCommit) -> None:
        """Add the next commit. The error of an earlier one is raised here at the latest, or by `settle`."""
        self._page.append(commit)
        self._page_bytes += sum(version.value.size_bytes for version in commit.versions if version.value is not None)
        if len(self._page) == _AHEAD_COMMITS or self._page_bytes > _PAGE_BYTES:
            self._put()

    def _put(self) -> None:
        self._feed.put(self._page)
        self._page, self._page_bytes = [], 0
        self._raise()

    def settle(self) -> None:
        """Wait until all commits so far are written."""
        self._put()
        self._feed.settle()
        self._raise()

    def _raise(self) -> None:
        if self._imported.done():
            self._imported.result()

    def finish(self) -> ImportedSession:
        """Wait until everything is stored."""
        self._feed.put(self._page)
        self._feed.complete()
        return self._imported.result()

    def close(self) -> None:
        """Have nothing written, unless it is finished. Then the writer is done with it."""
        self._end()
        wait((self._imported,))


class _Pages:
    """Pages of commits, in memory up to some size, then as lines of a recording in a temporary file."""

    def __init__(self) -> None:
        self._kept: list[Sequence[RecordedCommit]] = []
        self._kept_bytes = 0
        self._file: IO[str] | None = None

    def add(self, page: Sequence[RecordedCommit], size_bytes: int) -> None:
        """Add a page of about this size."""
        if self._file is None and self._kept_bytes + size_bytes <= _MEMORY_BYTES:
            self._kept.append(page)
            self._kept_bytes += size_bytes
            return
        if self._file is None:
            # It has no name, so it is gone however this process ends.
            self._file = tempfile.TemporaryFile("w+", encoding="utf-8", newline="\n")  # noqa: SIM115 - see `close`
        self._file.writelines(f"{commit_line(commit)}\n" for commit in page)
        self._file.write("\n")

    def __iter__(self) -> Iterator[Sequence[RecordedCommit]]:
        yield from self._kept
        if self._file is None:
            return
        self._file.seek(0)
        page: list[RecordedCommit] = []
        for line in self._file:
            if line != "\n":
                page.append(commit_in(line))
            else:
                yield page
                page = []

    def close(self) -> None:
        """Delete the pages."""
        self._kept = []
        if self._file is not None:
            self._file.close()
