"""What commits and executions are called: as in the recording or, of one read from a database, as in the database.

An audit of the same file then calls them the same.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from dspex_persist.replay.recorded import RecordedExecution, Recording
from dspex_persist.replay.report import Divergence, ReplayedExecution
from dspex_persist.state.errors import InvalidArgumentError, quote
from dspex_persist.state.recording import renumbered_id


class Numbers:
    """The numbers that people see, by those of the recording."""

    def __init__(self, recording: Recording) -> None:
        self._session_id = recording.header.session_id
        self._shown = {commit.number: commit.sequence or commit.number for commit in recording.commits}
        self.first = min(self._shown.values(), default=0)
        self.last = max(self._shown.values(), default=0)

    def __str__(self) -> str:
        return f"session {quote(self._session_id)} has commits {self.first} to {self.last}"

    def shown(self, number: int) -> int:
        """What a commit is called."""
        return self._shown.get(number, number)

    def shown_id(self, execution_id: str) -> str:
        """What an execution is called."""
        return renumbered_id(execution_id, self._shown.get)

    def told(self, execution: ReplayedExecution) -> ReplayedExecution:
        """The same with the numbers that people see."""
        return replace(
            execution,
            execution_id=self.shown_id(execution.execution_id),
            commit=self.shown(execution.commit),
            parent_id=None if execution.parent_id is None else self.shown_id(execution.parent_id),
            divergences=tuple(map(self.told_of, execution.divergences)),
        )

    def told_of(self, divergence: Divergence) -> Divergence:
        """The same with the numbers that people see."""
        return replace(
            divergence,
            commit=self.shown(divergence.commit),
            execution_id=self.shown_id(divergence.execution_id),
        )


@dataclass(frozen=True, slots=True)
class Range:
    """Which executions are meant, by the commits of their beginnings as people see them, both included."""

    first: int
    last: int

    def has(self, number: int) -> bool:
        """Whether an execution that began there is meant."""
        return self.first <= number <= self.last


def range_of(roots: Iterable[RecordedExecution], numbers: Numbers, since: str | int, until: str | int) -> Range:
    """The range between two points: commits, or ids of executions; "" is its beginning or end.

    An execution that another one called means that one, without which it does not run.
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
            raise InvalidArgumentError(option, f"{quote(text)} is no execution of it; {numbers}")
        return number
    if not (text.isascii() and text.isdecimal()):
        reason = f"{quote(text)} is neither the number of a commit nor the id of an execution; {numbers}"
        raise InvalidArgumentError(option, reason)
    # Python refuses to make a number of thousands of digits.
    if len(text) > 18 or not numbers.first <= int(text) <= numbers.last:
        raise InvalidArgumentError(option, f"there is no commit {text}: {numbers}")
    return int(text)


def _token(execution_id: str) -> str:
    """What an execution's id keeps in every file: the number in it is that of the file's own commit."""
    return execution_id.rpartition("_")[2]
