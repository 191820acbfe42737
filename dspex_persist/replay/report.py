"""What a replay found."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from difflib import unified_diff
from enum import StrEnum
from typing import Any, Final

DOCUMENT: Final = "dspex-persist replay"
DOCUMENT_VERSION: Final = 1


class Aspect(StrEnum):
    """What was compared, in the order in which it is told: what comes first tends to explain what follows."""

    LM = "lm"
    CALLS = "calls"
    DRAWS = "draws"
    PUBLISHED = "published"
    ERROR = "error"
    RESULT = "result"
    WRITES = "writes"
    DEPENDENCIES = "dependencies"
    LOCKS = "locks"
    VERSIONS = "versions"
    """In a replay of the state: that versions follow each other, and fit their variable."""
    JOURNAL = "journal"
    """In a replay of the state: that the journal says what was written."""
    STATE = "state"
    """In a replay of the state: that it ends as it is stored."""


class ReplayOutcome(StrEnum):
    """What became of an execution."""

    SAME = "same"
    DIVERGED = "diverged"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Divergence:
    """Something that came out differently. `commit`: where in the recording, or in the database that it was read from;
    `execution_id` is "" if no execution is concerned. `diff`: recorded lines (-) and new ones (+), with some around
    them."""

    what: Aspect
    summary: str
    commit: int
    execution_id: str = ""
    diff: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = self.execution_id or f"commit {self.commit}"
        return "\n".join([f"{where}: {self.summary}", *self.diff])


@dataclass(frozen=True, slots=True)
class ReplayedExecution:
    """An execution of the recording, and what became of it. `status`: how it had ended; `commit`: where it began.

    `reason`: why it was skipped.
    """

    execution_id: str
    tool: str
    commit: int
    attempt: int
    parent_id: str | None
    status: str
    outcome: ReplayOutcome
    reason: str = ""
    divergences: tuple[Divergence, ...] = ()


@dataclass(frozen=True, slots=True)
class ReplayReport:
    """All of a replay. `mode`: "tools" or "state"; `commits`: how many the recording has.

    `divergences` has those of the executions too, in the order of the recording.
    """

    session_id: str
    mode: str
    commits: int
    executions: tuple[ReplayedExecution, ...] = ()
    divergences: tuple[Divergence, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything that was checked came out as it was recorded."""
        return not self.divergences

    @property
    def checked(self) -> bool:
        """Whether anything was: executions that were skipped were not."""
        return self.mode == "state" or any(each.outcome is not ReplayOutcome.SKIPPED for each in self.executions)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why executions were skipped, each reason once."""
        return tuple(dict.fromkeys(each.reason for each in self.executions if each.outcome is ReplayOutcome.SKIPPED))

    def count(self, outcome: ReplayOutcome) -> int:
        """How many executions ended so."""
        return sum(each.outcome is outcome for each in self.executions)

    def document(self) -> dict[str, Any]:
        """The report as JSON: what is in it stays, what is new is added."""
        return {
            "format": DOCUMENT,
            "version": DOCUMENT_VERSION,
            "ok": self.ok,
            "checked": self.checked,
            "session_id": self.session_id,
            "mode": self.mode,
            "commits": self.commits,
            "same": self.count(ReplayOutcome.SAME),
            "diverged": self.count(ReplayOutcome.DIVERGED),
            "skipped": self.count(ReplayOutcome.SKIPPED),
            "executions": [_execution_document(each) for each in self.executions],
            "divergences": [_divergence_document(each) for each in self.divergences],
        }

    def describe(self, most: int = 5) -> str:
        """The report in words, with the first divergences."""
        shown = [str(each) for each in self.divergences[:most]]
        more = len(self.divergences) - len(shown)
        return "\n\n".join([self.headline(), *shown, *([f"and {more} more"] if more else [])])

    def headline(self) -> str:
        """The report in one sentence."""
        found = _counted(len(self.divergences), "divergence") if self.divergences else "no divergence"
        if self.mode == "state":
            return f"session {self.session_id}: {found} in {_counted(self.commits, 'commit')}"
        if not self.executions:
            return f"session {self.session_id}: nothing was checked: it has no executions"
        counts = ", ".join(f"{self.count(each)} {each.value}" for each in ReplayOutcome if self.count(each))
        ran = f"{_counted(len(self.executions), 'execution')} ({counts})"
        if not self.checked:
            return f"session {self.session_id}: nothing was checked in {ran}: {'; '.join(self.reasons)}"
        return f"session {self.session_id}: {found} in {ran}"

    def __str__(self) -> str:
        return self.describe()


def _execution_document(execution: ReplayedExecution) -> dict[str, Any]:
    return {**asdict(execution), "divergences": [_divergence_document(each) for each in execution.divergences]}


def _divergence_document(divergence: Divergence) -> Mapping[str, Any]:
    return {**asdict(divergence), "diff": list(divergence.diff)}


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def diff_of(recorded: Iterable[str], new: Iterable[str]) -> tuple[str, ...]:
    """What differs, as lines of a unified diff without its head."""
    return tuple(_without_head(unified_diff(list(recorded), list(new), n=2, lineterm="")))


def _without_head(lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        # The two lines that name files, and where in the first one it begins.
        if number > 2 and not line.startswith("@@"):
            yield line
        elif number > 2:
            yield "..."
