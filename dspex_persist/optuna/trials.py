"""Trials: those that run here, and what the journal says of all."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Any, Protocol

import optuna
from optuna.trial import TrialState

from dspex_persist.cognitive.context import Context
from dspex_persist.cognitive.steps import Runs, Step, Steps, Work, run_work, run_work_aio, verb, work
from dspex_persist.optuna.journal import Known, OpenTrial, note_of, report_of
from dspex_persist.state import arguments


@dataclass(frozen=True, slots=True)
class TrialRecord:
    """A trial as the journal has it.

    Attributes:
        number: Its number in the study, from 0, in the order of their beginning. It is the same for all processes.
        id: Its id, which it keeps when its session moves.
        state: RUNNING, COMPLETE, PRUNED or FAIL.
        params: The values that it tried, by variable.
        values: The values of the objectives; None if it has none. Of a pruned trial, the last that was reported.
        intermediate_values: What was reported on the way, by step.
        user_attrs: What was noted with it.
        interrupted: Whether its process, or its server, has ended before its result was told: then it is a FAIL.
        retry_of: The id of the interrupted trial whose values it tries again; "" if it does not.
        execution_ids: The executions of the journal that it consists of: one, or more if its session moved, its server
            was started again, or another process told its result.
        actor: Who began it.
        began_at: When it began (UTC).
        ended_at: When it ended (UTC); None while it runs.
    """

    number: int
    id: str
    state: TrialState
    params: Mapping[str, Any]
    values: tuple[float, ...] | None
    intermediate_values: Mapping[int, float]
    user_attrs: Mapping[str, Any]
    interrupted: bool
    retry_of: str
    execution_ids: tuple[str, ...]
    actor: str
    began_at: datetime
    ended_at: datetime | None

    @property
    def value(self) -> float | None:
        """The value of the only objective; None if it has none."""
        if self.values is not None and len(self.values) > 1:
            raise RuntimeError(f"trial {self.number} has {len(self.values)} values: use values")
        return None if self.values is None else self.values[0]


def record_of(number: int, known: Known) -> TrialRecord:
    """Return the record of a trial. `number` is its place among those of the study."""
    told, first = known.told, known.parts[0]
    if told is not None:
        state = TrialState[told.state.upper()]
    else:
        state = TrialState.RUNNING if known.is_running else TrialState.FAIL
    ended = None if state is TrialState.RUNNING else max(each.ended_at for each in known.parts if each.ended_at)
    reports: dict[int, float] = {}
    notes: dict[str, Any] = {}
    for part in known.parts:
        reports.update(part.reports)
        notes.update(part.notes)
    return TrialRecord(
        number,
        known.id,
        state,
        MappingProxyType(dict(known.params)),
        None if told is None else told.values,
        MappingProxyType(reports),
        MappingProxyType(notes),
        told is None and state is TrialState.FAIL,
        known.retry_of,
        tuple(part.execution_id for part in known.parts),
        first.actor,
        first.began_at,
        ended,
    )


class Works(Runs):
    """An object whose verbs consist of work that may wait for a file or a server."""

    def _run_step(self, step: Step) -> Any:
        """See `Runs`."""
        assert isinstance(step, Work), "it asks no commands by steps"
        return run_work(step)

    async def _run_step_aio(self, step: Step) -> Any:
        """See `Runs`."""
        assert isinstance(step, Work), "it asks no commands by steps"
        return await run_work_aio(step)


class Applies(Protocol):
    """Writes the values of a trial into its session."""

    def __call__(self, trial: "Trial", reason: str | None) -> int: ...


class Trial(Works):
    """A trial that this process runs: the values to try. The session does not have them, unless `apply` writes them.

        trial["temperature"]                    # a value to try; of other variables, what the session has
        trial.params                            # all of them
        trial.report(0.7, step=3)               # a value of the objective on the way
        trial.should_prune()                    # whether to give it up

    Attributes:
        number: Its number in the study, from 0.
        params: The values to try, by variable.
    """

    def __init__(
        self,
        ctx: Context,
        number: int,
        params: Mapping[str, Any],
        sampled: optuna.Trial,
        opened: OpenTrial,
        apply: Applies,
    ) -> None:
        self._ctx = ctx
        self.number = number
        self.params: Mapping[str, Any] = MappingProxyType(dict(params))
        self._sampled = sampled
        self._opened = opened
        self._apply = apply
        self._steps: set[int] = set()
        # What to keep in the journal, if that has failed.
        self._told: Mapping[str, Any] | None = None

    @property
    def id(self) -> str:
        """Its id, which it keeps when its session moves."""
        return self._opened.id

    @property
    def execution_id(self) -> str:
        """The id of its execution in the journal; that of its newest part, if there are several."""
        return self._opened.execution_id

    @property
    def user_attrs(self) -> Mapping[str, Any]:
        """What was noted with it."""
        return self._sampled.user_attrs

    def __getitem__(self, name: str) -> Any:
        return self.params[name] if name in self.params else self._ctx[name]

    @verb
    def report(self, value: float, step: int) -> Steps[None]:
        """Report a value of the objective on the way, for the pruner and the journal.

        A server keeps it at once, a file when the trial ends. Only the first value of a step counts.

        Args:
            value: The value.
            step: The number of the step, from 0.
        """
        yield from work(self._report, value, step)

    def _report(self, value: float, step: int) -> None:
        # It checks them, and warns of a step that was reported before.
        self._sampled.report(value, step)
        if step not in self._steps:
            self._opened.record(report_of(int(step), float(value)))
            self._steps.add(step)

    def should_prune(self) -> bool:
        """Return whether the pruner of the study would give the trial up, by what was reported.

        Then raise `optuna.TrialPruned` in an objective, or `study.tell(trial, state="pruned")`.
        """
        return self._sampled.should_prune()

    @verb
    def set_user_attr(self, key: str, value: Any) -> Steps[None]:
        """Note something with the trial, such as the path of what it made.

        Args:
            key: The name of the note.
            value: What to note: what JSON can represent.
        """
        yield from work(self._note, arguments.text("key", key), value)

    def _note(self, key: str, value: Any) -> None:
        self._opened.record(note_of(key, value))
        self._sampled.set_user_attr(key, value)

    @verb
    def apply(self, *, reason: str | None = None) -> Steps[int]:
        """Write the values into the session now, in one commit, for an objective that reads them there.

        Others see them. Each trial overwrites those before it, and `Study.apply_best` the last one.

        Args:
            reason: Why; by default the history names study and trial.

        Returns:
            How many variables were written.

        Raises:
            RuleViolatedError: A rule of the session does not allow these values together.
            VariableLockedError: Another optimizer has locked a variable.
        """
        return (yield from work(self._apply, self, reason))

    def __repr__(self) -> str:
        return f"<trial {self.number}: {dict(self.params)}>"
