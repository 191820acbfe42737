"""`Study`: Optuna's ask and tell over the variables of a session, whose journal has every trial."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

import optuna
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.trial import TrialState

from dspex_persist.cognitive.context import Context
from dspex_persist.cognitive.errors import ContextClosedError, StudyError
from dspex_persist.cognitive.optimizing import OPTIMIZER
from dspex_persist.cognitive.steps import Steps, Terms, ask, run, verb, work
from dspex_persist.errors import DspexError
from dspex_persist.optuna.journal import Definition, Journal, Known, told_of
from dspex_persist.optuna.locks import Locks
from dspex_persist.optuna.sampling import Sampling, checked_directions, float_of
from dspex_persist.optuna.space import Choices, ConfigurationSpace
from dspex_persist.optuna.trials import Trial, TrialRecord, Works, record_of
from dspex_persist.state import arguments, commands, values
from dspex_persist.state.abilities import Transacts
from dspex_persist.state.errors import EngineClosedError, InvalidArgumentError

Objective: TypeAlias = Callable[[Trial], Any]
_ENDS: Final = {state.name.lower(): state for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)}


class Study(Works):
    """A study: it looks for good values of variables of a session, with the samplers of Optuna.

    Each trial is an execution in the journal of the session, with its values, its result, and who ran it. That is all
    that a study consists of: one of the same name in the same session goes on where it was, also in another process,
    and several processes can run one at the same time. A trial whose process has ended has failed.

    From the first `ask` to the end of the block, or `close`, the variables are locked: others can read them, but not
    write them.

        with Study(ctx, ["temperature", "model"], direction="maximize") as study:
            study.optimize(objective, n_trials=50)
            study.apply_best()

    Args:
        ctx: A context of the session, which stays open.
        variables: What to set, as for `ConfigurationSpace.of`: names of variables, or by names, what they may be set
            to. None for what the study has set before.
        name: The name of the study in its session.
        direction: Whether to "minimize" or "maximize" the objective; by default what the study did before, or else
            "minimize".
        directions: The same for several objectives.
        sampler: What chooses the values; by default that of Optuna.
        pruner: What gives up trials on the way; by default that of Optuna.
        requeue: Whether to try the values of interrupted trials again, once each.
        actor: Who runs it; by default the actor of the context.

    Attributes:
        name: The name of the study.
        space: The variables, and what they are set to.

    Raises:
        StudyError: It is new, and `variables` says nothing; or it has other directions.
        InvalidArgumentError: An argument is wrong; a variable has no range.
        VariableNotFoundError: There is no such variable.
        UnsupportedError: The backend cannot: it keeps no journal that can be read.
    """

    def __init__(
        self,
        ctx: Context,
        variables: Sequence[str] | Mapping[str, Choices] | None = None,
        *,
        name: str = "study",
        direction: str | None = None,
        directions: Sequence[str] | None = None,
        sampler: BaseSampler | None = None,
        pruner: BasePruner | None = None,
        requeue: bool = False,
        actor: str | None = None,
    ) -> None:
        self.name = arguments.text("name", name)
        if not self.name:
            raise InvalidArgumentError("name", "it must not be empty")
        self._ctx = ctx
        self._requeue = arguments.flag("requeue", requeue)
        self._terms = Terms(actor, None, None, f"study {self.name}")
        self._lock = threading.RLock()
        self._open: dict[str, Trial] = {}
        self._is_stopped = self._in_block = False
        stated = checked_directions(direction, directions)
        self._journal = Journal(ctx, self.name, self._terms)
        Transacts.of(ctx.backend.provider)
        past = self._journal.read()
        last = next(reversed(past.definitions.values()), None)
        if stated is not None and last is not None and stated != last.directions:
            raise StudyError(self.name, f"its objectives are to {' and '.join(last.directions)}, as it began")
        self._directions = stated or (last.directions if last is not None else ("minimize",))
        if variables is not None:
            self.space = ConfigurationSpace.of(ctx, variables)
        elif last is not None:
            self.space = ConfigurationSpace.from_json(last.space)
            self.space.check(ctx)
        else:
            raise StudyError(self.name, "it is new in this session: say which variables it sets")
        self._sampling = Sampling(self.name, self._directions, self.space, sampler, pruner)
        self._sampling.learn(past)
        self._definition = Definition(self.space.digest, self._directions, self.space.to_json())
        self._locks = Locks(ctx, tuple(self.space), self._terms, {"study": self.name, **self._facts()})

    def _facts(self) -> dict[str, str]:
        return {"directions": " ".join(self._directions), **self._sampling.names()}

    # Asking and telling

    @verb
    def ask(self) -> Steps[Trial]:
        """Begin a trial, with values to try. It locks the variables, if they are not.

        Raises:
            VariableLockedError: Another optimizer has locked a variable.
            StateError: The journal cannot be written.
        """
        return (yield from work(self._ask))

    def _ask(self) -> Trial:
        with self._lock:
            self._locks.hold()
            self._read()
            if self._definition.digest not in self._journal.past.definitions:
                self._journal.define(self._definition, self._facts())
            while True:
                trial, retried = self._begin()
                if retried is None or self._is_first_retry(trial, retried):
                    return trial
                # Another process was faster.
                self._tell(trial, None, "fail", None)

    def _begin(self) -> tuple[Trial, Known | None]:
        retried = self._to_retry()
        if retried is not None:
            self._sampling.enqueue(retried.params)
        sampled, params = self._sampling.ask()
        try:
            opened = self._journal.begin(params, self._definition.digest, "" if retried is None else retried.id)
        except BaseException:
            self._sampling.drop(sampled)
            raise
        self._read()
        trial = Trial(self._ctx, self._number_of(opened.id), params, sampled, opened, self._apply_trial)
        self._open[opened.id] = trial
        self._sampling.own.add(opened.id)
        return trial, retried

    def _to_retry(self) -> Known | None:
        """Return an interrupted trial that nobody has tried again."""
        if not self._requeue:
            return None
        trials = self._journal.past.trials.values()
        retried = {each.retry_of for each in trials}
        left = (each for each in trials if self._is_interrupted(each) and each.id not in retried)
        return next((each for each in left if self._sampling.can_have(each.params)), None)

    def _is_interrupted(self, known: Known) -> bool:
        return known.told is None and not known.is_running and known.id not in self._open

    def _is_first_retry(self, trial: Trial, retried: Known) -> bool:
        trials = self._journal.past.trials.values()
        return next(each.id for each in trials if each.retry_of == retried.id) == trial.id

    def _number_of(self, trial_id: str) -> int:
        return self._journal.past.numbers[trial_id]

    def _read(self) -> None:
        self._sampling.learn(self._journal.read())

    @verb
    def tell(
        self,
        trial: Trial | TrialRecord | int,
        values: float | Sequence[float] | None = None,
        *,
        state: TrialState | str | None = None,
    ) -> Steps[TrialRecord]:
        """Say how a trial ended. The journal has it when this returns.

        Args:
            trial: The trial, or its number. It may be one that another process has begun, or that was interrupted.
            values: The value of the objective, or the values of all.
            state: "complete", "pruned" or "fail"; by default "complete", or "fail" if there is no value, or one is NaN.

        Returns:
            The trial, as the journal has it now.

        Raises:
            StudyError: There is no such trial, or how it ended is known.
            InvalidArgumentError: The values are no numbers, or not as many as there are objectives.
        """
        return (yield from work(self._tell_any, trial, values, state))

    def _tell_any(
        self, trial: Trial | TrialRecord | int, values: float | Sequence[float] | None, state: TrialState | str | None
    ) -> TrialRecord:
        end, objectives = self._checked_end(values, state)
        own = self._own(trial)
        if own is not None:
            return self._tell(own, objectives, end, None)
        with self._lock:
            self._read()
            known = self._find(trial)
            if known.told is not None:
                raise StudyError(self.name, f"trial {self._number_of(known.id)} has ended: {known.told.state}")
            opened = self._journal.resume(known)
            if end == "pruned":
                objectives = _last_reported(known)
            opened.end(told_of(end, objectives, self._number_of(known.id), {}, {}))
            self._read()
            return self._record(known.id)

    def _own(self, trial: Trial | TrialRecord | int) -> Trial | None:
        """Return a trial that runs here, if it does."""
        if isinstance(trial, Trial):
            if trial._told is not None and trial.id not in self._open:
                raise StudyError(self.name, f"trial {trial.number} has ended: {trial._told['state']}")
            return trial
        number = trial.number if isinstance(trial, TrialRecord) else arguments.number("trial", trial)
        return next((each for each in self._open.values() if each.number == number), None)

    def _find(self, trial: Trial | TrialRecord | int) -> Known:
        trials = self._journal.past.trials
        if isinstance(trial, Trial | TrialRecord):
            found = trials.get(trial.id)
        else:
            found = list(trials.values())[trial] if 0 <= trial < len(trials) else None
        if found is None:
            number = trial if isinstance(trial, int) else trial.number
            raise StudyError(self.name, f"it has no trial {number}")
        return found

    def _checked_end(
        self, values: float | Sequence[float] | None, state: TrialState | str | None
    ) -> tuple[str, tuple[float, ...] | None]:
        end = state.name.lower() if isinstance(state, TrialState) else state
        if end is not None and end not in _ENDS:
            raise InvalidArgumentError("state", f"it must be complete, pruned or fail, not {end}")
        if end in ("pruned", "fail") and values is not None:
            raise InvalidArgumentError("values", f"a trial that ends as {end} has none")
        if values is None:
            if end == "complete":
                raise InvalidArgumentError("values", "a trial that is complete has some")
            return end or "fail", None
        given: Iterable[Any] = values if isinstance(values, Sequence) and not isinstance(values, str) else (values,)
        objectives = tuple(float_of(each) for each in given)
        if len(objectives) != len(self._directions):
            raise InvalidArgumentError("values", f"{len(objectives)} were told, and there are {len(self._directions)}")
        if any(each != each for each in objectives):
            if end == "complete":
                raise InvalidArgumentError("values", "NaN is none")
            return "fail", None
        return "complete", objectives

    def _tell(
        self, trial: Trial, objectives: tuple[float, ...] | None, end: str, error: BaseException | None
    ) -> TrialRecord:
        with self._lock:
            if trial._told is None:
                objectives, notes, study_notes = self._sampling.tell(trial._sampled, objectives, _ENDS[end])
                trial._told = told_of(end, objectives, trial.number, notes, study_notes)
            # The lock is held: what comes next has to know of it.
            trial._opened.end(trial._told, error)
            self._open.pop(trial.id, None)
            self._read()
            return self._record(trial.id)

    @verb
    def enqueue(self, params: Mapping[str, Any] | None = None) -> Steps[None]:
        """Have one of the next trials try certain values.

        Args:
            params: Values by variable; the sampler chooses the others. None for the values that the variables have now.

        Raises:
            InvalidArgumentError: A value is not in the space.
        """
        yield from work(self._enqueue, params)

    def _enqueue(self, params: Mapping[str, Any] | None) -> None:
        given = self._ctx.get_many(*self.space) if params is None else arguments.mapping("params", params)
        for name, value in given.items():
            if not self.space.contains(name, value):
                raise InvalidArgumentError("params", f"the space has no {name}={value!r}")
        with self._lock:
            self._sampling.enqueue(given)

    # Running trials

    @verb
    def optimize(
        self,
        objective: Objective,
        n_trials: int | None = None,
        *,
        timeout_s: float | None = None,
        in_all: bool = False,
        catch: type[Exception] | tuple[type[Exception], ...] = (),
        callbacks: Sequence[Callable[["Study", TrialRecord], object]] = (),
    ) -> Steps[None]:
        """Run trials, one after the other.

        Args:
            objective: Takes a trial, and returns its value, or its values if there are several objectives. It may raise
                `optuna.TrialPruned`. From asyncio it runs in a thread; a coroutine function is awaited.
            n_trials: How many trials; None for as many as there is time.
            timeout_s: After how many seconds to begin no more.
            in_all: `n_trials` is for the whole study: with all that have run before, and that run elsewhere. So a
                program that was killed makes the rest when it runs again. Interrupted trials do not count.
            catch: Exceptions after which it goes on; the trial has failed. After others it has failed as well, and
                they are raised.
            callbacks: Called after each trial, with the study and the trial.

        Raises:
            VariableLockedError: Another optimizer has locked a variable.
            StateError: The journal cannot be written.
        """
        arguments.function("objective", objective, also_async=True)
        if n_trials is not None:
            arguments.number("n_trials", n_trials)
        deadline = None if timeout_s is None else time.monotonic() + arguments.seconds("timeout_s", timeout_s)
        self._is_stopped, made, was_held = False, 0, self._locks.are_held
        try:
            while not self._is_stopped and (deadline is None or time.monotonic() < deadline):
                if n_trials is not None and (yield from work(self._made, made, in_all)) >= n_trials:
                    break
                record = yield from self._run_one(objective, catch)
                made += 1
                for callback in callbacks:
                    yield from work(callback, self, record)
                if self._sampling.has_run_out:
                    break
        except GeneratorExit:
            raise
        except BaseException as error:
            if not was_held and not self._in_block:
                yield from work(self._leave, error)
            raise
        if not was_held and not self._in_block:
            yield from work(self._release)

    def _run_one(
        self, objective: Objective, catch: type[Exception] | tuple[type[Exception], ...]
    ) -> Steps[TrialRecord]:
        trial = yield from work(self._ask)
        try:
            result = yield from work(objective, trial)
            end, objectives = self._checked_end(result, None)
        except optuna.TrialPruned:
            return (yield from work(self._tell, trial, None, "pruned", None))
        except Exception as error:
            record: TrialRecord = yield from work(self._tell, trial, None, "fail", error)
            if not isinstance(error, catch):
                raise
            return record
        except GeneratorExit:
            raise
        except BaseException as error:
            # It is interrupted, as if the process had been killed.
            yield from work(self._drop, trial, error)
            raise
        return (yield from work(self._tell, trial, objectives, end, None))

    def _made(self, made: int, in_all: bool) -> int:
        if not in_all:
            return made
        with self._lock:
            self._read()
            return sum(each.told is not None or each.is_running for each in self._journal.past.trials.values())

    def _drop(self, trial: Trial, error: BaseException | None = None) -> None:
        with self._lock:
            self._open.pop(trial.id, None)
            if trial._told is None:
                self._sampling.drop(trial._sampled)
            self._sampling.own.discard(trial.id)
            trial._opened.drop(error)

    def stop(self) -> None:
        """Have `optimize` begin no more trials. Callable from an objective, a callback, or another thread."""
        self._is_stopped = True

    # What there is

    @property
    def directions(self) -> tuple[str, ...]:
        """Whether each objective is to be minimized or maximized: "minimize", "maximize"."""
        return self._directions

    @property
    def trials(self) -> tuple[TrialRecord, ...]:
        """All trials, by number, of all processes: it reads what is new in the journal."""
        with self._lock:
            self._read()
            known = self._journal.past.trials.values()
            return tuple(self._record_at(number, each) for number, each in enumerate(known))

    def _record(self, trial_id: str) -> TrialRecord:
        return self._record_at(self._number_of(trial_id), self._journal.past.trials[trial_id])

    def _record_at(self, number: int, known: Known) -> TrialRecord:
        record = record_of(number, known)
        if record.interrupted and known.id in self._open:
            # Its server was started again, and it goes on here.
            return replace(record, state=TrialState.RUNNING, interrupted=False, ended_at=None)
        return record

    @property
    def best_trial(self) -> TrialRecord:
        """The complete trial with the best value; the first, if there are several.

        Raises:
            StudyError: There is none yet, or the study has several objectives: see `best_trials`.
        """
        if len(self._directions) > 1:
            raise StudyError(self.name, "it has several objectives: best_trials has those that no other is better than")
        complete = [each for each in self.trials if each.state is TrialState.COMPLETE and each.values is not None]
        if not complete:
            raise StudyError(self.name, "it has no complete trial yet")
        sign = -1.0 if self._directions[0] == "maximize" else 1.0
        return min(complete, key=lambda each: sign * (each.value or 0.0))

    @property
    def best_trials(self) -> tuple[TrialRecord, ...]:
        """The complete trials than which no other is better in all objectives."""
        trials = self.trials
        return tuple(trials[each.number] for each in self._sampling.copy(trials).best_trials)

    @property
    def best_params(self) -> Mapping[str, Any]:
        """The values that the best trial tried."""
        return self.best_trial.params

    @property
    def best_value(self) -> float:
        """The value of the best trial."""
        value = self.best_trial.value
        assert value is not None, "it is complete"
        return value

    def to_optuna(self) -> optuna.Study:
        """Return a copy as a study of Optuna, in memory: for its plots, importances and data frames."""
        return self._sampling.copy(self.trials)

    # Applying

    @verb
    def apply_best(self, *, reason: str | None = None) -> Steps[TrialRecord]:
        """Set all variables to the values of the best trial, in one commit.

        Args:
            reason: Why; by default the history names the study, the trial and its value.

        Returns:
            The trial.

        Raises:
            StudyError: There is no complete trial yet, or the study has several objectives.
            VariableLockedError: Another optimizer has locked a variable.
            RuleViolatedError: A rule of the session does not allow these values together.
        """
        best = yield from work(lambda: self.best_trial)
        yield from work(self._apply, best, reason)
        return best

    @verb
    def apply(self, trial: TrialRecord | int, *, reason: str | None = None) -> Steps[TrialRecord]:
        """Set all variables to the values of a trial, in one commit. See `apply_best`.

        Args:
            trial: The trial, or its number.
            reason: Why; by default the history names the study, the trial and its values.
        """
        found: TrialRecord = yield from work(self._record_of, trial)
        yield from work(self._apply, found, reason)
        return found

    def _record_of(self, trial: TrialRecord | int) -> TrialRecord:
        with self._lock:
            self._read()
            return self._record(self._find(trial).id)

    def _apply(self, trial: TrialRecord, reason: str | None) -> None:
        told = trial.values or ()
        value = ", ".join(f"{each:.6g}" for each in told)
        about = f"study {self.name}, trial {trial.number}" + (f": {value}" if told else "")
        facts = {"values": value} if told else {}
        self._write(trial.params, {"trial": str(trial.number), "trial_id": trial.id, **facts}, reason or about)

    def _apply_trial(self, trial: Trial, reason: str | None) -> int:
        facts = {"trial": str(trial.number), "trial_id": trial.id}
        self._write(trial.params, facts, reason or f"study {self.name}, trial {trial.number}")
        return len(trial.params)

    def _write(self, params: Mapping[str, Any], facts: Mapping[str, str], reason: str) -> None:
        session_id = self._ctx.session_id
        found = run(self._ctx, ask(commands.GetVariables(session_id, tuple(params)))).variables
        encoded = {
            name: values.encode(value, found[name].type if name in found else None, name=name)
            for name, value in params.items()
        }
        metadata = {OPTIMIZER: self._terms.optimizer_id or "", "study": self.name, **facts}
        command = commands.SetVariables(session_id, encoded, metadata, True, raises=True)
        outcome = run(self._ctx, ask(command, self._terms._replace(reason=reason)))
        if not outcome.success:
            # The answer of a server that raises nothing.
            raise InvalidArgumentError("params", "; ".join(dict.fromkeys(outcome.errors.values())))

    # Ending

    @verb
    def close(self) -> Steps[None]:
        """Release the variables, unless other processes run trials of the study. Trials that run here are interrupted.

        Closing it twice is harmless, and so is to ask it again, which locks the variables again.
        """
        yield from work(self._release)

    def _release(self) -> None:
        try:
            self._end_all()
        except (ContextClosedError, EngineClosedError):
            # All ends with that: the trials at once, the locks with their leases.
            self._locks.forget()

    def _end_all(self) -> None:
        with self._lock:
            for trial in list(self._open.values()):
                self._drop(trial)
            if not self._locks.are_held:
                return
            if any(each.is_running for each in self._journal.read().trials.values()):
                # Another process is at it, and renews them. The last one releases them, or their leases end.
                self._locks.forget()
            else:
                self._locks.release()

    def __enter__(self) -> Self:
        self._in_block = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._in_block = False
        self._leave(error)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._in_block = False
        await asyncio.to_thread(self._leave, error)

    def _leave(self, error: BaseException | None) -> None:
        """Release the variables at the end of a block, whose own error was `error`."""
        try:
            self._release()
        except DspexError:
            # The block's own error says what went wrong first; the locks end with their leases.
            if error is None:
                raise

    def __repr__(self) -> str:
        return f"<Study {self.name!r} of session {self._ctx.session_id!r}>"


def _last_reported(known: Known) -> tuple[float, ...] | None:
    """Return what counts as the value of a pruned trial."""
    reports = {step: value for part in known.parts for step, value in part.reports.items()}
    last = reports[max(reports)] if reports else None
    return None if last is None or last != last else (last,)
