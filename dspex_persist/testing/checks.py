"""Helpers of the contract suites: waiting, comparing, checking errors."""

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import pytest

from dspex_persist.state import errors
from dspex_persist.state.errors import StateError
from dspex_persist.state.model import Update, Variable
from dspex_persist.state.watch import Watch

DEADLINE_S = 30.0
"""How long the tests wait for something that must happen, in seconds."""
LONG_TEXT = "x" * 100_000
REFUSALS = (errors.InvalidArgumentError, errors.LimitExceededError)
NOT_THERE = (*REFUSALS, errors.SessionNotFoundError, errors.VariableNotFoundError)


def exact(value: object) -> str:
    """Return a text that is equal only for identical values: 1 is not 1.0 nor True, 0.0 is not -0.0, NaN is NaN."""
    return json.dumps(value, sort_keys=True)


def shown(value: object) -> str:
    """Return a parameter as part of a test's id."""
    return ascii(value)[:40]


def let_pass(seconds: float) -> None:
    """Let time pass, for what must end by itself and would be kept alive by polling it."""
    threading.Event().wait(seconds)


def take(watch: Watch, count: int) -> list[Update]:
    """Return exactly the next `count` updates."""
    updates: list[Update] = []
    deadline = time.monotonic() + DEADLINE_S
    while len(updates) < count:
        left_s = deadline - time.monotonic()
        assert left_s > 0, f"only {len(updates)} of {count} updates came within {DEADLINE_S} s"
        updates.extend(watch.next(left_s))
    assert len(updates) == count, f"more than {count} updates: {updates}"
    return updates


def take_until(watch: Watch, name: str) -> list[Update]:
    """Return the updates before the first one of the variable `name`."""
    updates: list[Update] = []
    deadline = time.monotonic() + DEADLINE_S
    while not any(update.variable.name == name for update in updates):
        left_s = deadline - time.monotonic()
        assert left_s > 0, f"no update of {name!r} came within {DEADLINE_S} s, only: {updates}"
        updates.extend(watch.next(left_s))
    assert updates[-1].variable.name == name
    return updates[:-1]


def names_of(items: Iterable[Update | Variable]) -> list[str]:
    return [each.variable.name if isinstance(each, Update) else each.name for each in items]


def check_whole_commits(updates: Sequence[Update]) -> None:
    """Check that commits come in order, none twice, each with all of its parts."""
    sequences = [sequence for sequence, _ in groupby(updates, key=lambda update: update.sequence)]
    assert sequences == sorted(set(sequences))
    for _, group in groupby(updates, key=lambda update: update.sequence):
        parts = [update.part for update in group]
        assert parts == [(number, len(parts)) for number in range(1, len(parts) + 1)]


def refused(future: Future[Any]) -> StateError | None:
    """Return the `StateError` with which a command failed, None if it did not; any other error is raised."""
    error = future.exception(DEADLINE_S)
    if error is not None and not isinstance(error, StateError):
        raise error
    return error


def check_invalid(ask: Callable[[], object], field: str, reason: str) -> None:
    """Check that an argument is refused with exactly this reason."""
    with pytest.raises(errors.InvalidArgumentError) as error:
        ask()
    assert str(error.value) == f"invalid {field}: {reason}"


@contextmanager
def check_refused(kind: type[StateError], reason: str) -> Iterator[None]:
    """Check that the block raises an error of this kind, whose text contains `reason`."""
    with pytest.raises(kind) as error:
        yield
    assert reason in str(error.value)
