"""Check a recording before it is imported, so that the writer only has to write it.

An import is one group of the log: all of it or nothing. While it is written, no other caller can write. So everything
that takes long happens before, on the caller's thread: reading, parsing, and applying every commit to a session that
nobody sees. What was checked waits in memory, and beyond some megabytes in a temporary file. Only of a short recording
the writer checks the commits as it writes them, which takes some hundredths of a second.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import IO, Final

from dspex_persist import clock
from dspex_persist.state.abilities import SessionImport
from dspex_persist.state.commands import ImportCommit, ImportSession
from dspex_persist.state.errors import Hint, RecordingError
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


class CheckedImport(SessionImport):
    """Checks the commits of a recording one by one, and keeps them until they are imported.

    Args:
        header: The header of the recording.
        options: The limits of the backend that imports it.
        session_id: The id of the new session; None to keep the recorded one.
        run: Runs the command that imports the checked commits.

    Raises:
        RecordingError: Values were left out of the recording.
    """

    def __init__(
        self,
        header: Header,
        options: SessionOptions,
        session_id: str | None,
        run: Callable[[ImportSession], ImportedSession],
    ) -> None:
        if header.masked:
            reason = "values of sensitive variables were left out of it, and an import needs them"
            raise RecordingError("the recording", 1, reason).advising(Hint.EXPORT_REVEALED)
        self._session_id = header.session_id if session_id is None else session_id
        # The requests that the answers belong to named the session.
        self._keeps_answers = self._session_id == header.session_id
        self._options = options
        self._run = run
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

    def check(self) -> None:
        """See `SessionImport.check`."""
        if not self._is_checked:
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
        self._end_page()
        return self._run(ImportSession(self._session_id, self._pages, self.content_hash, self._is_checked))

    def close(self) -> None:
        """Free the memory, and delete the temporary file."""
        self._pages.close()


_SEEN: Final = RecordedOutcome("", "", "", "", "")


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
