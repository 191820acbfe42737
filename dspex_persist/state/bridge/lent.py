"""What the server and a worker of ours tell each other about a call, besides the messages of the bridge protocol.

The server sends headers: the execution, its seed, and the execution that waits for it. The worker answers in metadata:
how the code failed, and what the journal has to keep. Both are of the same release.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Final, NamedTuple

from dspex_persist import clock
from dspex_persist.state.bridge.status import error_in, facts_of
from dspex_persist.state.errors import StateError
from dspex_persist.state.model import Failure, LogEntry
from dspex_persist.state.tools.failures import RaisedError, raised_of
from dspex_persist.state.tools.session import ToolSession

SEED: Final = "x-dspex-seed"
"""Header: the seed of the execution's random numbers and ids."""
ATTEMPT: Final = "x-dspex-attempt"
"""Header: the number of the attempt."""
PUBLISH: Final = "x-dspex-publish"
"""Header of SetVariable at a worker's address: write at once, in a separate commit."""
PARENT: Final = "x-dspex-parent"
"""Header: the execution is part of the one that waits for it."""
RAISED: Final = "x-dspex-raised"
"""Header of ExecuteTool at a worker's address: answer with what the tool has raised, if that is an error of ours."""
JOURNAL: Final = "dspex.journal"
"""Metadata of an answer: what the journal has to keep that the worker has not sent yet."""
FAILURE: Final = "dspex.failure"
"""Metadata of an answer: how the code failed."""
KIND: Final = "journal"
"""The kind of `RecordInputs` at a worker's address: its entries are those of `Entries`."""


class RaisedThereError(Exception):
    """Stands for what a tool's code raised in a worker. The failure has its type and its text."""


class Entries(NamedTuple):
    """What a journal has to keep: lines of the log, times, and recorded inputs by kind."""

    log: list[LogEntry]
    times: list[Any]
    recorded: dict[str, list[Any]]

    def __bool__(self) -> bool:
        return bool(self.log or self.times or self.recorded)

    def written(self) -> str:
        """Return them as JSON."""
        lines = [[clock.to_micros(line.at), line.message, line.fields] for line in self.log]
        return json.dumps([lines, [clock.to_micros(moment) for moment in self.times], self.recorded])


def take_entries(session: ToolSession, text: str) -> None:
    """Add what a worker has sent to the journal of an execution.

    Raises:
        LimitExceededError: The journal becomes too large.
        ValueError: It is not what a worker of ours sends.
    """
    if not text:
        return
    lines, times, recorded = json.loads(text)
    log = [LogEntry(clock.from_micros(at), message, fields) for at, message, fields in lines]
    session.take(log, [clock.from_micros(moment) for moment in times], recorded)


def failure_text(error: BaseException) -> str:
    """Return what a worker tells of an error that a tool's code has raised."""
    raised, failure = raised_of(error)
    assert failure is not None, "code of a tool aborts nothing"
    facts = facts_of(raised)
    known = {"code": raised.error_code, "facts": facts} if isinstance(raised, StateError) and facts else {}
    return json.dumps({**asdict(failure), **known})


def raised_in(text: str) -> RaisedError:
    """Return the error that `failure_text` has described."""
    fields: Mapping[str, Any] = json.loads(text)
    known = error_in(fields["code"], fields["facts"]) if "code" in fields else None
    failure = Failure(*(fields[name] for name in Failure.__dataclass_fields__))
    return RaisedError(known or RaisedThereError(failure.message), failure)
