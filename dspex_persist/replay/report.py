"""The report of a replay."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from difflib import unified_diff
from enum import StrEnum
from typing import Any, Final

DOCUMENT: Final = "dspex-persist replay"
DOCUMENT_VERSION: Final = 1


class Aspect(StrEnum):
    """What was compared, in the order of the report: earlier differences tend to explain later ones."""

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
    """State replays: each version follows its predecessor, and its value is valid for its variable."""
    JOURNAL = "journal"
    """State replays: the journal lists exactly the versions that executions wrote."""
    STATE = "state"
    """State replays: the rebuilt state equals the stored one."""


class ReplayOutcome(StrEnum):
    """The outcome of replaying an execution."""

    SAME = "same"
    DIVERGED = "diverged"
    SKIPPED = "skipped"


@dataclass(frozen=True, slots=True)
class Divergence:
    """One difference between the recording and the replay.

    Attributes:
        what: What was compared.
        summary: The difference in one sentence.
        commit: The number of the commit, in the recording or in the database that it was read from.
        execution_id: The execution; "" if the difference does not belong to one.
        diff: Recorded lines (-) and new ones (+), with some context.
    """

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
    """An execution of the recording, and the outcome of replaying it.

    Attributes:
        execution_id: Its id, as in the recording or in the database that it was read from.
        tool: The name of the tool.
        commit: The number of the commit that began it.
        attempt: Which attempt at its request it was, from 1.
        parent_id: The execution that called it, if any.
        status: How it ended when it was recorded.
        outcome: The outcome of the replay.
        reason: Why it was skipped, else "".
        divergences: The differences, empty unless it diverged.
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
    """The result of a replay.

    Attributes:
        session_id: The recorded session.
        mode: "tools" if its tools ran again, "state" if its state was rebuilt from the log.
        commits: The number of commits in the recording.
        executions: The executions, in the order of the recording.
        divergences: All differences, including those of the executions, in the order of the recording.
    """

    session_id: str
    mode: str
    commits: int
    executions: tuple[ReplayedExecution, ...] = ()
    divergences: tuple[Divergence, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the replay found no differences."""
        return not self.divergences

    @property
    def checked(self) -> bool:
        """Whether anything was checked. Skipped executions were not."""
        return self.mode == "state" or any(each.outcome is not ReplayOutcome.SKIPPED for each in self.executions)

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why executions were skipped, each reason once."""
        return tuple(dict.fromkeys(each.reason for each in self.executions if each.outcome is ReplayOutcome.SKIPPED))

    def count(self, outcome: ReplayOutcome) -> int:
        """Return the number of executions with this outcome."""
        return sum(each.outcome is outcome for each in self.executions)

    def document(self) -> dict[str, Any]:
        """Return the report as a JSON object. Later releases may add keys, but keep these."""
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
        """Return the report as text, with up to `most` divergences."""
        shown = [str(each) for each in self.divergences[:most]]
        more = len(self.divergences) - len(shown)
        return "\n\n".join([self.headline(), *shown, *([f"and {more} more"] if more else [])])

    def headline(self) -> str:
        """Return the report in one sentence."""
        divergences = _counted(len(self.divergences), "divergence") if self.divergences else "no divergence"
        if self.mode == "state":
            return f"session {self.session_id}: {divergences} in {_counted(self.commits, 'commit')}"
        if not self.executions:
            return f"session {self.session_id}: nothing was checked: it has no executions"
        counts = ", ".join(f"{self.count(each)} {each.value}" for each in ReplayOutcome if self.count(each))
        ran = f"{_counted(len(self.executions), 'execution')} ({counts})"
        if not self.checked:
            return f"session {self.session_id}: nothing was checked in {ran}: {'; '.join(self.reasons)}"
        return f"session {self.session_id}: {divergences} in {ran}"

    def __str__(self) -> str:
        return self.describe()


def _execution_document(execution: ReplayedExecution) -> dict[str, Any]:
    return {**asdict(execution), "divergences": [_divergence_document(each) for each in execution.divergences]}


def _divergence_document(divergence: Divergence) -> Mapping[str, Any]:
    return {**asdict(divergence), "diff": list(divergence.diff)}


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def diff_of(recorded: Iterable[str], new: Iterable[str]) -> tuple[str, ...]:
    """Return a unified diff without its header lines."""
    return tuple(_without_head(unified_diff(list(recorded), list(new), n=2, lineterm="")))


def _without_head(lines: Iterator[str]) -> Iterator[str]:
    for number, line in enumerate(lines):
        # The first three lines name the files and the position of the first hunk.
        if number > 2 and not line.startswith("@@"):
            yield line
        elif number > 2:
            yield "..."
