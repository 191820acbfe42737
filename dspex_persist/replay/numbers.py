"""The numbers of commits and executions in reports: those of the recording, or of the database it was read from.

So a report and an audit of the same database use the same numbers.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from dspex_persist.replay.recorded import RecordedExecution, Recording
from dspex_persist.replay.report import Divergence, ReplayedExecution
from dspex_persist.state.errors import InvalidArgumentError, quote
from dspex_persist.state.recording import renumbered_id


class Numbers:
    """Maps numbers of the recording to those that users see."""

    def __init__(self, recording: Recording) -> None:
        self._session_id = recording.header.session_id
        self._shown = {commit.number: commit.sequence or commit.number for commit in recording.commits}
        self.first = min(self._shown.values(), default=0)
        self.last = max(self._shown.values(), default=0)

    def __str__(self) -> str:
        return f"session {quote(self._session_id)} has commits {self.first} to {self.last}"

    def shown(self, number: int) -> int:
        """Return the number of a commit that users see."""
        return self._shown.get(number, number)

    def shown_id(self, execution_id: str) -> str:
        """Return the id of an execution that users see."""
        return renumbered_id(execution_id, self._shown.get)

    def renumber(self, execution: ReplayedExecution) -> ReplayedExecution:
        """Return the execution with the numbers that users see."""
        return replace(
            execution,
            execution_id=self.shown_id(execution.execution_id),
            commit=self.shown(execution.commit),
            parent_id=None if execution.parent_id is None else self.shown_id(execution.parent_id),
            divergences=tuple(map(self.renumber_divergence, execution.divergences)),
        )

    def renumber_divergence(self, divergence: Divergence) -> Divergence:
        """Return the divergence with the numbers that users see."""
        return replace(
            divergence,
            commit=self.shown(divergence.commit),
            execution_id=self.shown_id(divergence.execution_id),
        )


@dataclass(frozen=True, slots=True)
class Range:
    """A range of executions, by the commits that began them, as users see them; both ends are included."""

    first: int
    last: int

    def has(self, number: int) -> bool:
        """Return whether an execution that began with this commit is in the range."""
        return self.first <= number <= self.last


def range_of(roots: Iterable[RecordedExecution], numbers: Numbers, since: str | int, until: str | int) -> Range:
    """Return the range between two points.

    Args:
        roots: The executions that no other one called.
        numbers: The numbers that users see.
        since: A commit number or an execution id; "" for the beginning. A called execution stands for its caller.
        until: The same for the end, which is included.

    Raises:
        InvalidArgumentError: A point does not exist, or `until` is before `since`.
    """
    began: dict[str, int] = {}
    for root in roots:
        for each in root.tree():
            began[_token(each.id)] = began[f"exec_{numbers.shown(each.number)}"] = numbers.shown(root.number)
    first = _number(since, "since", began, numbers, numbers.first)
    last = _number(until, "until", began, numbers, numbers.last)
    if first > last:
        reason = f"commit {last} is before commit {first}, where the range begins; {numbers}"
        raise InvalidArgumentError("until", reason)
    return Range(first, last)


def _number(point: str | int, option: str, began: dict[str, int], numbers: Numbers, default: int) -> int:
    text = str(point).strip()
    if not text:
        return default
    if text.startswith("exec_"):
        number = began.get(text, began.get(_token(text)))
        if number is None:
            raise InvalidArgumentError(option, f"{quote(text)} is not an execution in it; {numbers}")
        return number
    if not (text.isascii() and text.isdecimal()):
        reason = f"{quote(text)} is neither the number of a commit nor the id of an execution; {numbers}"
        raise InvalidArgumentError(option, reason)
    # Python refuses to convert thousands of digits to a number.
    if len(text) > 18 or not numbers.first <= int(text) <= numbers.last:
        raise InvalidArgumentError(option, f"there is no commit {text}: {numbers}")
    return int(text)


def _token(execution_id: str) -> str:
    """The part of an execution's id that is the same in every file; its number is a commit of one file."""
    return execution_id.rpartition("_")[2]
