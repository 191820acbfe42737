"""Executions in the answers of audits: what they show of the two events of an execution, wherever the log is."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, Protocol, TypeVar

from dspex_persist.spelling import did_you_mean
from dspex_persist.state.audit import ExecutionDetail, ExecutionSummary, HistoryEntry, ReadEntry
from dspex_persist.state.errors import Hint, InvalidArgumentError, NotInHistoryError, quote
from dspex_persist.state.events import ExecutionBegan, ExecutionEnded
from dspex_persist.state.masking import Secrets
from dspex_persist.state.model import Conflict, ExecutionStatus, Failure, Seen
from dspex_persist.state.values.json_text import storable


class Executed(Protocol):
    """An execution that a history has."""

    @property
    def execution_id(self) -> str:
        """Its id."""


E = TypeVar("E", bound=Executed)
R = TypeVar("R")

_ENDINGS: Final[Mapping[str, str]] = {
    ExecutionStatus.INTERRUPTED: "the server ended while it ran",
    ExecutionStatus.CANCELLED: "its client cancelled it",
}
"""The reason to show for a status whose journal entry has neither a failure nor a reason."""


def check_name(text: object) -> str:
    """Return a name or an id that is looked up; `InvalidArgumentError` if it is no text."""
    if not isinstance(text, str):
        raise InvalidArgumentError("query", f"{quote(text)} is not a str, as names and ids are")
    return text


def find_execution(execution_id: str, find: Callable[[int], E | None]) -> E:
    """Return the execution with this id. The number in it is the commit that began it, so `exec_12` is enough.

    Args:
        execution_id: The id.
        find: Returns the execution that a commit began.

    Raises:
        NotInHistoryError: There is none.
    """
    check_name(execution_id)
    _, number, *token = execution_id.split("_") if execution_id.startswith("exec_") else ("", "")
    found = None
    if number.isascii() and number.isdecimal() and len(number) < 19:
        found = find(int(number))
    if found is None:
        raise NotInHistoryError("execution", execution_id, "").advising(Hint.LIST_EXECUTIONS)
    if token and found.execution_id != execution_id:
        raise NotInHistoryError("execution", execution_id, did_you_mean(found.execution_id, spell=str))
    return found


def error_text(
    status: str, failure: Failure | None, reason: str | None, conflicts: tuple[Conflict, ...], *, has_end: bool
) -> str:
    """Return what a summary says about an execution that did not commit; "" if there is nothing to say.

    `has_end`: whether the log has its end. If that was pruned, a default reason would be a guess: the end of a session
    interrupts executions, too.
    """
    if failure is not None:
        return f"{failure.type}: {failure.message}"
    return reason or ", ".join(map(str, conflicts)) or (_ENDINGS.get(status, "") if has_end else "")


def attempts_of(one: R, before: Callable[[R], R | None], after: Callable[[R], R | None]) -> tuple[R, ...]:
    """Return all attempts at the same request, in order: the ones that `one` retries, itself, its retries."""
    attempts = [one]
    while (earlier := before(attempts[0])) is not None:
        attempts.insert(0, earlier)
    while (later := after(attempts[-1])) is not None:
        attempts.append(later)
    return tuple(attempts)


def detail_of(
    summary: ExecutionSummary,
    began: ExecutionBegan | None,
    ended: ExecutionEnded | None,
    attempts: tuple[str, ...],
    children: tuple[ExecutionDetail, ...],
    history: tuple[HistoryEntry, ...],
    secrets: Secrets,
) -> ExecutionDetail:
    """Return an execution in full, with `secrets` masked in its LM calls; see `ExecutionDetail`.

    An event is None if it was pruned, or is not there yet.
    """
    return ExecutionDetail(
        summary,
        **(_fields_of_beginning(began) if began is not None else _NO_BEGINNING),
        **(_fields_of_end(ended, secrets) if ended is not None else {}),
        attempts=attempts,
        children=children,
        history=history,
    )


_NO_BEGINNING: Final[Mapping[str, Any]] = {"isolation": "", "parameters": {}, "metadata": {}, "seed": ""}


def _fields_of_beginning(event: ExecutionBegan) -> dict[str, Any]:
    return {
        "isolation": event.isolation.value,
        "parameters": event.parameters,
        "metadata": event.metadata,
        "seed": event.seed,
    }


def _fields_of_end(event: ExecutionEnded, secrets: Secrets) -> dict[str, Any]:
    return {
        "result": event.result,
        "failure": event.failure,
        "reason": event.reason or "",
        "conflicts": event.conflicts,
        "reads": tuple(_read_entry(name, seen) for name, seen in event.reads.items()),
        "patterns": event.patterns,
        "writes": event.writes,
        "published": event.published,
        "log": tuple(replace(line, message=_text_of(line.message)) for line in event.log),
        "recorded": secrets.masked_recorded(event.recorded),
    }


def _read_entry(name: str, seen: Seen | None) -> ReadEntry:
    return ReadEntry(name, seen.name, seen.variable_id, seen.version) if seen else ReadEntry(name, None, None, None)


def _text_of(message: object) -> str:
    """Return the logged message as text: old releases logged any JSON value."""
    return message if isinstance(message, str) else storable(message)
