"""Sampling: a study of Optuna in memory, made of what the journal has, which its samplers look at."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import optuna
from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

from dspex_persist.optuna.journal import Known, Past
from dspex_persist.optuna.space import ConfigurationSpace
from dspex_persist.optuna.trials import TrialRecord, record_of
from dspex_persist.state.errors import InvalidArgumentError

_DIRECTIONS: Final = {"minimize": StudyDirection.MINIMIZE, "maximize": StudyDirection.MAXIMIZE}
_CREATES: Final = logging.getLogger("optuna.storages._in_memory")


class _Stopped(optuna.Study):
    """A study that samplers can stop when there is nothing left to try; Optuna's can only be stopped in its loop."""

    is_stopped = False

    def stop(self) -> None:
        """Remember it."""
        self.is_stopped = True


class Sampling:
    """Chooses the values of trials. For one thread at a time.

    Attributes:
        own: The ids of the trials that were asked for here, whose ends it knows without the journal.
    """

    def __init__(
        self,
        name: str,
        directions: Sequence[str],
        space: ConfigurationSpace,
        sampler: BaseSampler | None,
        pruner: BasePruner | None,
    ) -> None:
        self.own: set[str] = set()
        self._name = name
        self._directions = [_DIRECTIONS[each] for each in directions]
        self._space = space
        self._storage = InMemoryStorage()
        with _quiet():
            made = optuna.create_study(
                storage=self._storage, study_name=name, directions=self._directions, sampler=sampler, pruner=pruner
            )
        self._study = _Stopped(name, self._storage, made.sampler, made.pruner)
        self._study_id = self._storage.get_study_id_from_name(name)
        self._learnt: set[str] = set()
        self._kept: dict[str, int] = {}
        self._is_new = True

    @property
    def has_run_out(self) -> bool:
        """Whether the sampler has said that there is nothing left to try, since this was asked last."""
        has_run_out, self._study.is_stopped = self._study.is_stopped, False
        return has_run_out

    def names(self) -> dict[str, str]:
        """Return the names of sampler and pruner, for those who read the history."""
        return {"sampler": type(self._study.sampler).__name__, "pruner": type(self._study.pruner).__name__}

    def learn(self, past: Past) -> None:
        """Take in what others have told."""
        for trial_id in dict.fromkeys(past.news):
            known = past.trials[trial_id]
            if known.told is not None and trial_id not in self._learnt:
                self._learnt.add(trial_id)
                if trial_id not in self.own:
                    self._add(known)
        past.news.clear()
        if self._is_new and past.trials:
            # A sampler with a seed would begin with the values that it began with before.
            self._study.sampler.reseed_rng()
        self._is_new = False

    def _add(self, known: Known) -> None:
        assert known.told is not None, "it is learnt when it has ended"
        params = {name: value for name, value in known.params.items() if self._space.contains(name, value)}
        if not params:
            return
        system = known.told.sampler
        self._study.add_trial(_frozen(record_of(-1, known), params, self._space, system))
        for key, number in known.told.sampler_study.items():
            self._kept[key] = number
            self._storage.set_study_system_attr(self._study_id, key, number)

    def ask(self) -> tuple[optuna.Trial, dict[str, Any]]:
        """Return a trial of Optuna, and the values that it is to try."""
        sampled = self._study.ask(dict(self._space))
        return sampled, sampled.params

    def tell(
        self, sampled: optuna.Trial, objectives: tuple[float, ...] | None, state: TrialState
    ) -> tuple[tuple[float, ...] | None, Mapping[str, Any], Mapping[str, int]]:
        """Take in how a trial of `ask` has ended.

        Returns:
            The values of the objectives, those of a pruned trial too; and what the sampler notes with the trial, and
            with the study.
        """
        told = self._study.tell(sampled, None if objectives is None else list(objectives), state)
        values = told.values
        noted = {key: note for key, note in told.system_attrs.items() if key != "fixed_params"}
        return None if values is None else tuple(values), noted, self._noted()

    def _noted(self) -> dict[str, int]:
        """Return what is new among the numbers that the sampler keeps with the study, such as the last of a sequence.

        What else it keeps there is derived from the trials.
        """
        attrs = self._storage.get_study_system_attrs(self._study_id)
        new = {key: number for key, number in attrs.items() if type(number) is int and self._kept.get(key) != number}
        self._kept.update(new)
        return new

    def drop(self, sampled: optuna.Trial) -> None:
        """Forget a trial of `ask`, as far as that is possible."""
        self._study.tell(sampled, state=TrialState.FAIL)

    def enqueue(self, params: Mapping[str, Any]) -> None:
        """Have the next trial of `ask` try values."""
        self._study.enqueue_trial(dict(params))

    def can_have(self, params: Mapping[str, Any]) -> bool:
        """Whether all values are in the space."""
        return all(self._space.contains(name, value) for name, value in params.items())

    def copy(self, records: Iterable[TrialRecord]) -> optuna.Study:
        """Return a study of Optuna with these trials, and their numbers."""
        with _quiet():
            study = optuna.create_study(
                study_name=self._name,
                directions=self._directions,
                sampler=self._study.sampler,
                pruner=self._study.pruner,
            )
        for record in records:
            study.add_trial(_frozen(record, record.params, self._space, {}))
        return study


def _frozen(
    record: TrialRecord, params: Mapping[str, Any], space: ConfigurationSpace, system: Mapping[str, Any]
) -> FrozenTrial:
    fitting = {name: value for name, value in params.items() if space.contains(name, value)}
    distributions: dict[str, BaseDistribution] = {name: space[name] for name in fitting}
    frozen = create_trial(
        state=record.state,
        values=None if record.values is None else list(record.values),
        params=fitting,
        distributions=distributions,
        user_attrs=dict(record.user_attrs),
        system_attrs=dict(system),
        intermediate_values=dict(record.intermediate_values),
    )
    # Optuna has local times without a zone.
    frozen.datetime_start = record.began_at.astimezone().replace(tzinfo=None)
    if record.ended_at is not None:
        frozen.datetime_complete = record.ended_at.astimezone().replace(tzinfo=None)
    return frozen


def checked_directions(direction: str | None, directions: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the directions of all objectives; None if none is stated."""
    if direction is not None and directions is not None:
        raise InvalidArgumentError("directions", "state a direction, or directions for several objectives, not both")
    stated = directions if direction is None else (direction,)
    if stated is None:
        return None
    if isinstance(stated, str) or not stated or any(each not in _DIRECTIONS for each in stated):
        field = "direction" if directions is None else "directions"
        raise InvalidArgumentError(field, f"it must be minimize or maximize, not {stated!r}")
    return tuple(stated)


def float_of(value: Any) -> float:
    """Return a value of an objective as a float."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise InvalidArgumentError("values", f"{value!r} is no number") from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Optuna from saying that the study is new, and in memory: it is neither."""
    level = _CREATES.level
    _CREATES.setLevel(logging.WARNING)
    try:
        yield
    finally:
        _CREATES.setLevel(level)
