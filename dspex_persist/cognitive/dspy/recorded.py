"""Recorded LM calls, wherever they are kept, for `playing`."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

from dspex_persist.cognitive.backends import BackendView
from dspex_persist.opening import open_history
from dspex_persist.state.abilities import Auditable
from dspex_persist.state.audit import AuditSource, ExecutionQuery
from dspex_persist.state.errors import InvalidArgumentError, NotInHistoryError, UnsupportedError
from dspex_persist.state.events import ExecutionBegan, ExecutionEnded, event_in
from dspex_persist.state.model import RECORDING_ID
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.recording import read_recording
from dspex_persist.state.tools.session import LM_CALLS

Calls = list[Mapping[str, Any]]

_DATABASE: Final = b"SQLite format 3\x00"
_PREFIX: Final = "rec_"


class HasBackend(Protocol):
    """A context, by what is used of it."""

    backend: BackendView


Kept: TypeAlias = str | os.PathLike[str] | AuditSource | StateProvider | HasBackend
"""Where recorded calls are: a file, the address of a server, a context, a provider, or a history."""


def recorded_calls(recorded: str, place: Kept) -> Calls:
    """Return the recorded LM calls of an execution or of a recording, for `playing`.

    Args:
        recorded: The id of an execution (of a tool, a transaction or a recording), or the `id` of a recording, which
            stands for all its executions.
        place: Where it is: a database file, a session's recording as `session export` writes it, the address of a
            server, or an open context, provider or audit source. Files are only read.

    Returns:
        The calls, in the order in which they began.

    Raises:
        NotInHistoryError: There is no such execution or recording.
        UnsupportedError: The calls quote sensitive variables, and are masked here.
        OpenError: The file cannot be opened.
    """
    if not isinstance(recorded, str):
        raise InvalidArgumentError("recorded", f"it must be the id of an execution, not {type(recorded).__name__}")
    found = list(_found(recorded, place))
    if not found:
        raise NotInHistoryError("execution", recorded, "audit executions lists them")
    calls = [call for calls in found for call in calls]
    if any(call.get("masked") for call in calls):
        raise UnsupportedError(
            f"playing the LM calls of {recorded}, which quote sensitive variables",
            "take them from the file, or start the server with --audit-reveal",
        )
    # The parts of a recording number their calls through.
    return sorted(calls, key=lambda call: int(call["ordinal"]))


def _found(recorded: str, place: Kept) -> Iterator[Iterable[Mapping[str, Any]]]:
    """Yield the calls of each execution that is asked for."""
    if isinstance(place, str | os.PathLike) and _is_tape(path := Path(place)):
        with path.open(encoding="utf-8") as lines:
            yield from _on_tape(recorded, lines, str(path))
        return
    with _history(place) as history:
        if recorded.startswith(_PREFIX):
            query = ExecutionQuery(metadata={RECORDING_ID: recorded})
            for execution_id in [each.execution_id for each in history.iterate(query)]:
                yield history.execution(execution_id).recorded.get(LM_CALLS, ())
        else:
            yield history.execution(recorded).recorded.get(LM_CALLS, ())


def _is_tape(path: Path) -> bool:
    """Whether it is a file, but no database."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_DATABASE)) != _DATABASE


def _on_tape(recorded: str, lines: Iterable[str], name: str) -> Iterator[Iterable[Mapping[str, Any]]]:
    wanted = {recorded}
    for commit in read_recording(lines, name)[1]:
        for each in commit.events:
            event = event_in(each.kind, each.body)
            if isinstance(event, ExecutionBegan) and event.metadata.get(RECORDING_ID) == recorded:
                wanted.add(event.execution_id)
            elif isinstance(event, ExecutionEnded) and event.execution_id in wanted:
                yield event.lm_calls


@contextmanager
def _history(place: Kept) -> Iterator[AuditSource]:
    if isinstance(place, AuditSource):
        yield place
        return
    if isinstance(place, str | os.PathLike):
        opened: AuditSource = open_history(place, reveal=True)
    else:
        provider = place if isinstance(place, StateProvider) else place.backend.provider
        opened = Auditable.of(provider).audit(reveal=True)
    with opened as history:
        yield history
