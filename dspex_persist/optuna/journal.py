"""The trials of a study in the journal of a session: each is an execution that writes nothing.

Its metadata has the study, the values that are tried, and the digest of the space that they are from; what is recorded
in it has the values that were reported, and how the trial ended. As for any execution, the journal says who ran it and
when, and whether it was interrupted because its process, or its server, has ended. A trial has several executions,
parts, if its session moved, its server ended meanwhile, or another process told its result. All parts have the same id
of a recording.

An execution of its own has what trials have in common: the directions and the space. Its digest is in each trial.
"""

import contextlib
import json
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, TypeVar

from dspex_persist.cognitive.context import Context
from dspex_persist.cognitive.steps import Terms
from dspex_persist.optuna.reading import STUDY, Execution, Reader, reader_of
from dspex_persist.state import abilities
from dspex_persist.state.abilities import Transacts, new_recording_id
from dspex_persist.state.errors import (
    ExecutionEndedError,
    LimitExceededError,
    OutcomeUnknownError,
    ShuttingDownError,
    StorageError,
    UnavailableError,
)
from dspex_persist.state.model import PART, RECORDING_ID, ExecutionStatus
from dspex_persist.state.provider import StateProvider

R = TypeVar("R")

TRIAL: Final = "trial"
"""What the journal has as the tool of a trial, and the kind of what is recorded in it."""
# The tool of the execution that has what trials have in common is STUDY, too.
PARAMS, SPACE, RETRY_OF = "params", "space", "retry_of"
"""Keys of metadata: the values that are tried, as JSON; the digest of their space; the trial that is tried again."""
_STATE, _PATIENCE_S, _PAUSE_S = "state", 30.0, 0.1


@dataclass(frozen=True, slots=True)
class Told:
    """How a trial ended, as somebody has told.

    Attributes:
        sequence: The commit that has it.
        state: "complete", "pruned" or "fail".
        values: The values of the objectives; None if there are none.
        sampler: What the sampler notes with the trial.
        sampler_study: What the sampler notes with the study.
    """

    sequence: int
    state: str
    values: tuple[float, ...] | None
    sampler: Mapping[str, Any]
    sampler_study: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """An execution of a trial, as the journal has it now."""

    execution_id: str
    is_running: bool
    actor: str
    began_sequence: int
    began_at: datetime
    ended_at: datetime | None
    reports: Mapping[int, float]
    notes: Mapping[str, Any]
    told: Told | None


@dataclass(frozen=True, slots=True)
class Known:
    """A trial, as the journal has it now. `params` are the values tried, `space` is the digest of their space."""

    id: str
    params: Mapping[str, Any]
    space: str
    retry_of: str
    parts: tuple[Part, ...] = ()

    @property
    def told(self) -> Told | None:
        """How it ended; if several have told, the first counts."""
        told = [part.told for part in self.parts if part.told is not None]
        return min(told, key=lambda each: each.sequence, default=None)

    @property
    def is_running(self) -> bool:
        """Whether somebody is at it."""
        return self.told is None and any(part.is_running for part in self.parts)


@dataclass(frozen=True, slots=True)
class Definition:
    """What the trials of a study have in common. `space` has distributions as Optuna writes them."""

    digest: str
    directions: tuple[str, ...]
    space: Mapping[str, str]


@dataclass(slots=True)
class Past:
    """What the journal of the session has of a study.

    Attributes:
        definitions: The definitions by their digests, oldest first.
        trials: The trials by their ids, in the order of their beginning.
        numbers: The places of the trials in that order, by their ids.
        news: The ids of trials about which something was read; whoever has looked at them removes them.
    """

    definitions: dict[str, Definition] = field(default_factory=dict)
    trials: dict[str, Known] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    news: list[str] = field(default_factory=list)


class Journal:
    """Reads and writes the trials of a study. Reading is for one thread at a time."""

    def __init__(self, ctx: Context, study: str, terms: Terms) -> None:
        self.past = Past()
        self._ctx = ctx
        self._study = study
        self._terms = terms
        self._reader: Reader | None = None
        self._read_from: StateProvider | None = None

    # Reading

    def read(self) -> Past:
        """Read what is new, and return all."""
        provider = self._ctx._backend.provider
        if self._reader is None or provider is not self._read_from:
            # A session that moves gets other numbers for its commits.
            self._reader, self._read_from = reader_of(self._ctx, self._study), provider
            self.past = Past()
        for execution in self._reader.read():
            if execution.tool == STUDY:
                self._take_definition(execution)
            elif execution.tool == TRIAL and RECORDING_ID in execution.metadata:
                self._take_trial(execution)
        return self.past

    def _take_definition(self, execution: Execution) -> None:
        for entry in execution.recorded.get(STUDY, ()):
            digest = str(entry[SPACE])
            self.past.definitions.pop(digest, None)
            self.past.definitions[digest] = Definition(digest, tuple(entry["directions"]), entry["distributions"])

    def _take_trial(self, execution: Execution) -> None:
        metadata = execution.metadata
        trial_id = metadata[RECORDING_ID]
        known = self.past.trials.get(trial_id)
        if known is None:
            params = json.loads(metadata.get(PARAMS, "{}"))
            known = Known(trial_id, params, metadata.get(SPACE, ""), metadata.get(RETRY_OF, ""))
        part = _part_of(execution)
        others = [each for each in known.parts if each.execution_id != part.execution_id]
        parts = tuple(sorted((*others, part), key=lambda each: each.began_sequence))
        self.past.numbers.setdefault(trial_id, len(self.past.trials))
        self.past.trials[trial_id] = replace(known, parts=parts)
        self.past.news.append(trial_id)

    # Writing

    def define(self, definition: Definition, facts: Mapping[str, Any]) -> None:
        """Keep what the trials to come have in common; `facts` say more to those who read the journal."""
        entry = {**facts, "directions": definition.directions, SPACE: definition.digest}
        metadata = {STUDY: self._study, SPACE: definition.digest}

        def keep() -> None:
            opened = self._begin(STUDY, metadata)
            opened.record(STUDY, {**entry, "distributions": dict(definition.space)})
            opened.commit()

        self._ctx._through_gate(keep)

    def begin(self, params: Mapping[str, Any], space: str, retry_of: str = "") -> "OpenTrial":
        """Begin a trial."""
        metadata = {STUDY: self._study, PARAMS: json.dumps(dict(params)), SPACE: space}
        if retry_of:
            metadata[RETRY_OF] = retry_of
        return self._opened(new_recording_id(), metadata, 1)

    def resume(self, known: Known) -> "OpenTrial":
        """Begin another part of a trial that others have begun."""
        metadata = {STUDY: self._study, PARAMS: json.dumps(dict(known.params)), SPACE: known.space}
        return self._opened(known.id, metadata, len(known.parts) + 1)

    def _opened(self, trial_id: str, metadata: Mapping[str, str], number: int) -> "OpenTrial":
        opened = OpenTrial(self, trial_id, metadata, number)
        self._ctx._backend.parked.add(opened)
        self._ctx._through_gate(opened.open)
        return opened

    def _begin(self, tool: str, metadata: Mapping[str, str]) -> abilities.Transaction:
        provider = self._ctx._backend.provider
        actor = self._terms.actor if self._terms.actor is not None else self._ctx._terms.actor
        origin = provider.origin("BeginTransaction", actor=actor, reason=self._terms.reason)
        transacts = Transacts.of(provider)
        return transacts.begin_recording(self._ctx.session_id, tool, metadata=metadata, origin=origin)

    def _has_end_of(self, trial_id: str) -> bool:
        known = self.read().trials.get(trial_id)
        return known is not None and known.told is not None


class OpenTrial:
    """A trial that this process runs. Usable from any thread."""

    def __init__(self, journal: Journal, trial_id: str, metadata: Mapping[str, str], number: int) -> None:
        self.id = trial_id
        self.execution_id = ""
        self._journal = journal
        self._metadata = metadata
        self._number = number
        # What the current part has, as long as it may be lost with its server.
        self._entries: list[Mapping[str, Any]] = []
        self._lock = threading.Lock()
        self._part: abilities.Transaction | None = None

    def open(self) -> None:
        """Begin its first part."""
        self._begun()

    def record(self, entry: Mapping[str, Any]) -> None:
        """Keep an entry: on a server at once, elsewhere when the part ends."""
        self._through_gate(lambda: self._record(entry))

    def end(self, entry: Mapping[str, Any], error: BaseException | None = None) -> None:
        """Keep how it ended; the execution has failed with `error`, if there is one."""
        self._through_gate(lambda: self._end(entry, error))

    def drop(self, error: BaseException | None = None) -> None:
        """End it without a result."""

        def abort() -> None:
            part, self._part = self._part, None
            if part is not None:
                part.abort(error)

        self._through_gate(abort)

    def park(self) -> None:
        """End the current part: the session is about to move. Whatever comes next begins another one."""
        with self._lock:
            self._keep()

    def _keep(self) -> None:
        """End the current part, with what was recorded in it."""
        part, self._part = self._part, None
        if part is not None:
            with contextlib.suppress(ExecutionEndedError):
                part.commit()
                self._entries.clear()

    def _through_gate(self, call: Callable[[], R]) -> R:
        def locked() -> R:
            with self._lock:
                return call()

        return self._journal._ctx._through_gate(locked)

    def _begun(self) -> abilities.Transaction:
        if self._part is None:
            metadata = {**self._metadata, RECORDING_ID: self.id, PART: str(self._number)}
            part = self._journal._begin(TRIAL, metadata)
            self._number += 1
            for entry in self._entries:
                part.record(TRIAL, entry)
            self._part, self.execution_id = part, part.execution_id
        return self._part

    def _record(self, entry: Mapping[str, Any]) -> None:
        part = self._again(self._begun)
        try:
            part.record(TRIAL, entry)
        except ExecutionEndedError:
            # Its server has ended, and interrupted it.
            self._part = None
            self._again(self._begun).record(TRIAL, entry)
        except LimitExceededError:
            if not self._entries:
                # It would not fit into any.
                raise
            self._keep()
            self._again(self._begun).record(TRIAL, entry)
        self._entries.append(entry)

    def _end(self, entry: Mapping[str, Any], error: BaseException | None) -> None:
        self._record(entry)
        part = self._again(self._begun)
        if error is not None:
            part.abort(error)
        else:
            self._commit(part)
        self._part = None

    def _commit(self, part: abilities.Transaction) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                part.commit()
            except (ExecutionEndedError, OutcomeUnknownError, StorageError) as error:
                self._part = None
                if isinstance(error, StorageError) and time.monotonic() > deadline:
                    raise
                if part.status == ExecutionStatus.COMMITTED or self._again(lambda: self._journal._has_end_of(self.id)):
                    return
                part = self._again(self._begun)
            else:
                return

    def _again(self, call: Callable[[], R]) -> R:
        """Make a call, again and again while the server or the database is away: a result should not be lost so."""
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            try:
                return call()
            except (UnavailableError, ShuttingDownError, StorageError):
                if not self.execution_id or time.monotonic() > deadline:
                    raise
                time.sleep(_PAUSE_S)


def report_of(step: int, value: float) -> Mapping[str, Any]:
    """Return the entry for a value on the way."""
    return {"step": step, "value": _number(value)}


def note_of(key: str, value: Any) -> Mapping[str, Any]:
    """Return the entry for a note."""
    return {"note": key, "value": value}


def told_of(
    state: str,
    objectives: Sequence[float] | None,
    number: int,
    sampler: Mapping[str, Any],
    sampler_study: Mapping[str, Any],
) -> Mapping[str, Any]:
    """Return the entry for an end. `number` is for those who read the journal."""
    entry: dict[str, Any] = {_STATE: state, "number": number}
    if objectives is not None:
        entry["values"] = [_number(value) for value in objectives]
    notes = {"trial": dict(sampler), "study": dict(sampler_study)}
    if any(notes.values()):
        entry["sampler"] = {key: note for key, note in notes.items() if note}
    return entry


def _part_of(execution: Execution) -> Part:
    reports: dict[int, float] = {}
    notes: dict[str, Any] = {}
    told: Told | None = None
    for entry in execution.recorded.get(TRIAL, ()):
        if _STATE in entry:
            told = _told_in(entry, execution.ended or 0)
        elif "step" in entry:
            reports[int(entry["step"])] = float(entry["value"])
        elif "note" in entry:
            notes[entry["note"]] = entry["value"]
    return Part(
        execution.id,
        execution.is_running,
        execution.actor,
        execution.began,
        execution.began_at,
        execution.ended_at,
        reports,
        notes,
        told,
    )


def _told_in(entry: Mapping[str, Any], sequence: int) -> Told:
    objectives, sampler = entry.get("values"), entry.get("sampler", {})
    values = None if objectives is None else tuple(float(each) for each in objectives)
    return Told(sequence, entry[_STATE], values, sampler.get("trial", {}), sampler.get("study", {}))


def _number(value: float) -> float | str:
    """Return a number as JSON has it, which lacks NaN and the infinities."""
    return value if math.isfinite(value) else str(value)
