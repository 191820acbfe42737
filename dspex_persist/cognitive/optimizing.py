"""Optimization: a variable is locked while an optimizer tries values for it."""

import json
import secrets
import time
from collections.abc import Mapping
from datetime import datetime
from types import MappingProxyType, TracebackType
from typing import Any, Final, NoReturn, Self

from dspex_persist.cognitive.records import HistoryEntry, decode
from dspex_persist.cognitive.steps import Runs, Step, Steps, Terms, ask, pause, run, run_aio, verb
from dspex_persist.errors import DspexError
from dspex_persist.state import arguments, commands, model, values
from dspex_persist.state.errors import (
    NotOptimizingError,
    SessionNotFoundError,
    VariableLockedError,
    VariableNotFoundError,
)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.02, 1.0
_PAGE: Final = 100
OPTIMIZER, OPTIMIZATION, ITERATION, METRICS = "optimizer_id", "optimization_id", "iteration", "metrics"
"""The keys in the metadata of the versions that an optimization reports."""


class Status:
    """The lock of an optimization. From a server only `optimizer_id` and `started_at` are known."""

    __slots__ = ("record",)

    def __init__(self, record: model.Optimization) -> None:
        self.record = record

    @property
    def id(self) -> str:
        """The id of the optimization."""
        return self.record.id

    @property
    def optimizer_id(self) -> str:
        """The name of the optimizer that holds the lock."""
        return self.record.optimizer_id

    @property
    def started_at(self) -> datetime:
        """When it began (UTC)."""
        return self.record.started_at

    @property
    def started_by(self) -> str:
        """The actor that began it."""
        return self.record.started_by

    @property
    def expires_at(self) -> datetime:
        """When the lock ends unless the optimizer reports before (UTC)."""
        return self.record.expires_at()

    @property
    def config(self) -> Mapping[str, str]:
        """What it was started with."""
        return MappingProxyType(dict(self.record.config))

    def __repr__(self) -> str:
        return f"<optimization {self.id} by {self.optimizer_id!r} since {self.started_at:%Y-%m-%d %H:%M:%S}>"


class Trial:
    """A value that an optimization has reported."""

    __slots__ = ("entry",)

    def __init__(self, entry: HistoryEntry) -> None:
        self.entry = entry

    @property
    def iteration(self) -> int:
        """The number of the iteration."""
        return int(self.entry.metadata[ITERATION])

    @property
    def value(self) -> Any:
        """The value, as a new Python object."""
        return self.entry.value

    @property
    def metrics(self) -> Mapping[str, Any]:
        """The metrics of the value by name."""
        metrics: dict[str, Any] = json.loads(self.entry.metadata.get(METRICS, "{}"))
        return metrics

    @property
    def version(self) -> int:
        """The version of the variable."""
        return self.entry.version

    @property
    def at(self) -> datetime:
        """When it was reported (UTC)."""
        return self.entry.at

    def __repr__(self) -> str:
        return f"<iteration {self.iteration}: {self.value!r}, {dict(self.metrics)}>"


class Optimization(Runs):
    """An optimization of a variable: it holds the lock from the beginning of its block to the end.

    Attributes:
        name: The name of the variable.
        optimizer_id: The name of the optimizer.
        id: The id of the optimization; "" before it begins.
    """

    def __init__(
        self,
        owner: Runs,
        session_id: str,
        name: str,
        config: Mapping[str, object] | None,
        optimizer_id: str | None,
        wait_s: float,
        force: bool,
    ) -> None:
        self._owner = owner
        self._session_id = session_id
        self.name = arguments.text("name", name)
        made_up = f"optimizer-{secrets.token_hex(4)}"
        self.optimizer_id = made_up if optimizer_id is None else arguments.text("optimizer_id", optimizer_id)
        self.id = ""
        given = {} if config is None else arguments.mapping("config", config)
        self._config = {key: _text(entry) for key, entry in given.items()}
        self._wait_s = arguments.seconds("wait_s", wait_s)
        self._force = arguments.flag("force", force)
        self._terms = Terms(optimizer_id=self.optimizer_id)
        self._next = 0

    def _run_step(self, step: Step) -> Any:
        """See `Runs`."""
        return self._owner._run_step(step)

    async def _run_step_aio(self, step: Step) -> Any:
        """See `Runs`."""
        return await self._owner._run_step_aio(step)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an optimization cannot be copied, pickled, or sent to another process: report from the one with the lock"
        )

    def _begin(self) -> Steps[Self]:
        command = commands.StartOptimization(self._session_id, self.name, self.optimizer_id, self._config)
        deadline, pause_s = time.monotonic() + self._wait_s, _FIRST_PAUSE_S
        while True:
            try:
                self.id = yield from ask(command)
                return self
            except VariableLockedError:
                left_s = deadline - time.monotonic()
                if left_s <= 0 and not self._force:
                    raise
            if left_s <= 0:
                yield from self._break()
            else:
                yield from pause(min(pause_s, left_s))
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _break(self) -> Steps[None]:
        try:
            yield from ask(commands.StopOptimization(self._session_id, self.name, True), self._terms)
        except NotOptimizingError:
            # It has ended in the meantime.
            return

    def _end(self, error: BaseException | None) -> Steps[None]:
        """Release the lock at the end of the block, whose own error was `error`."""
        try:
            yield from ask(commands.StopOptimization(self._session_id, self.name), self._terms)
        except (NotOptimizingError, VariableLockedError, VariableNotFoundError, SessionNotFoundError):
            # Its lease is over, others have broken the lock, or there is nothing to lock any more; a report would have
            # said so.
            return
        except DspexError:
            # The block's own error says what went wrong first; the lock ends with its lease.
            if error is None:
                raise

    @verb
    def report(self, iteration: int | None, value: object, metrics: Mapping[str, object] | None = None) -> Steps[int]:
        """Write a value that the optimizer tries, with its metrics; it renews the lock.

        Args:
            iteration: The number of the iteration; None counts from 0.
            value: The value.
            metrics: The metrics of the value by name: numbers, or what else JSON can represent.

        Returns:
            The new version.

        Raises:
            VariableLockedError: Others have broken the lock, and another optimizer holds it.
            NotOptimizingError: Others have broken the lock, or it was not renewed in time.
            StateError: The value is invalid.
        """
        number = self._next if iteration is None else arguments.number("iteration", iteration)
        record = yield from ask(commands.GetVariable(self._session_id, self.name))
        lock = record.optimization
        if lock is None or not self._is_own(lock):
            raise NotOptimizingError(self.name) if lock is None else VariableLockedError(self.name, lock.optimizer_id)
        encoded = values.encode_for(value, lambda: record.type, name=self.name)
        metadata = {
            OPTIMIZER: self.optimizer_id,
            OPTIMIZATION: self.id,
            ITERATION: str(number),
            METRICS: values.encode(dict(metrics or {}), "map", name="metrics").json,
        }
        version = yield from ask(
            commands.SetVariable(self._session_id, self.name, encoded, metadata, record.version), self._terms
        )
        self._next = number + 1
        return version

    @verb
    def status(self) -> Steps[Status | None]:
        """Return the status of the lock; None if it holds no more."""
        record = yield from ask(commands.GetVariable(self._session_id, self.name))
        lock = record.optimization
        return Status(lock) if lock is not None and self._is_own(lock) else None

    def _is_own(self, lock: model.Optimization) -> bool:
        # A server tells the optimizer of a lock, but not the lock's id.
        return lock.optimizer_id == self.optimizer_id and lock.id in ("", self.id)

    @verb
    def history(self) -> Steps[list[Trial]]:
        """Return what it has reported, in the order of the reports."""
        trials: list[Trial] = []
        before: int | None = None
        while True:
            page = yield from ask(commands.GetVariableHistory(self._session_id, self.name, _PAGE, before))
            for version in page:
                if version.metadata.get(OPTIMIZATION) == self.id:
                    trials.append(Trial(HistoryEntry(version)))
                elif trials and trials[-1].version != version.version + 1:
                    break
            if len(page) < _PAGE or page[-1].version == 0:
                return trials[::-1]
            before = page[-1].version

    @verb
    def value(self) -> Steps[Any]:
        """Return the current value of the variable."""
        return decode((yield from ask(commands.GetVariable(self._session_id, self.name))))

    def __enter__(self) -> Self:
        return run(self, self._begin())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        run(self, self._end(error))

    async def __aenter__(self) -> Self:
        return await run_aio(self, self._begin())

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await run_aio(self, self._end(error))

    def __repr__(self) -> str:
        return f"<optimization of {self.name!r} by {self.optimizer_id!r}>"


def _text(entry: object) -> str:
    return entry if isinstance(entry, str) else values.encode({"entry": entry}, "map", name="config").json[9:-1]
