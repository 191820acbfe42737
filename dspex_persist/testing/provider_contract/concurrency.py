"""Concurrent callers, and what a provider can be used for besides."""

import copy
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest

from dspex_persist.state import commands, errors
from dspex_persist.state.commands import Command
from dspex_persist.state.model import Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.checks import DEADLINE_S, refused
from dspex_persist.testing.provider_contract.base import Contract


class ConcurrencyContract(Contract):
    """Concurrent callers, and what a provider can be used for besides."""

    def test_a_read_sees_every_write_that_was_acknowledged_before_it(
        self, provider: StateProvider, session: str
    ) -> None:
        provider.register_variable(session, "x", "integer", 0)
        reads: list[Command[Any]] = [
            commands.GetVariable(session, "x"),
            commands.GetVariable(session, "x", bypass_cache=True),
            commands.GetVariableHistory(session, "x", 1),
        ]
        for number in range(1, 31):
            version = provider.set_variable(session, "x", number)
            answer = provider.submit(reads[number % 3]).result()
            newest = answer[0] if isinstance(answer, list) else answer
            assert (newest.version, newest.value) == (version, Value(str(number)))

    def test_increments_with_an_expected_version_add_up(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "counter", "integer", 0)
        provider.set_variable(session, "counter", 0)
        increments, workers = 15, 6

        def increment() -> None:
            for _ in range(increments):
                while True:
                    variable = provider.get_variable(session, "counter")
                    following = int(variable.value.json) + 1
                    command = commands.SetVariable(session, "counter", Value(str(following)), {}, variable.version)
                    error = refused(provider.submit(command))
                    if error is None:
                        break
                    assert isinstance(error, errors.VersionConflictError)
                    assert error.actual > error.expected

        with ThreadPoolExecutor(workers) as threads:
            for future in [threads.submit(increment) for _ in range(workers)]:
                future.result(DEADLINE_S)
        assert provider.get_value(session, "counter") == increments * workers
        assert provider.get_variable(session, "counter").version == increments * workers + 1

    def test_a_reader_never_sees_half_a_batch(self, provider: StateProvider, session: str) -> None:
        names = ("a", "b", "c")
        for name in names:
            provider.register_variable(session, name, "integer", 0)
        done = threading.Event()

        def write() -> None:
            for number in range(1, 61):
                provider.set_variables(session, dict.fromkeys(names, number), atomic=True)
            done.set()

        with ThreadPoolExecutor(1) as thread:
            writing = thread.submit(write)
            for bypass_cache in _alternately(done):
                command = commands.GetVariables(session, names, bypass_cache)
                variables = provider.submit(command).result().variables
                assert len({variables[name].value for name in names}) == 1
            writing.result(DEADLINE_S)

    def test_a_cancelled_future_does_no_harm(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        pending = [provider.submit(commands.SetVariable(session, "x", Value(str(n)))) for n in range(50)]
        given_up = [future for future in pending if future.cancel()]
        versions = [future.result(DEADLINE_S) for future in pending if future not in given_up]
        assert len(set(versions)) == len(versions)
        version = provider.set_variable(session, "x", 1)
        assert len(versions) + 1 <= version <= len(pending) + 1

    def test_many_sessions_at_once(self, provider: StateProvider) -> None:
        run = uuid.uuid4().hex

        def live(number: int) -> tuple[str, int]:
            session = f"{run}-{number}"
            provider.initialize_session(session)
            provider.register_variable(session, "x", "integer", number)
            provider.set_variable(session, "x", -number)
            return session, number

        with ThreadPoolExecutor(8) as threads:
            lives = list(threads.map(live, range(40)))
        for session, number in lives:
            assert provider.get_value(session, "x") == -number
            assert provider.get_session(session).variable_count == 1

    def test_cannot_be_sent_to_another_process(self, provider: StateProvider) -> None:
        for send in (ForkingPickler.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match=r"a state cannot be copied, pickled, or sent .*connect\(\) there"):
                send(provider)


def _alternately(done: threading.Event) -> Iterator[bool]:
    """Yield False and True alternately until `done`, then each once more."""
    while not done.is_set():
        yield False
        yield True
    yield False
    yield True
