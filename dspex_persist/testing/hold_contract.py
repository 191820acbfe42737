"""The contract of every provider that is `Holdable`, as tests. A backend subclasses `HoldContract`."""

import gc
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from dspex_persist.state import commands, errors
from dspex_persist.state.abilities import Holdable, KeepsOrder, SessionHold
from dspex_persist.state.model import Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.checks import DEADLINE_S, NOT_THERE
from dspex_persist.testing.provider_contract.base import Contract


def hold(provider: StateProvider, session: str) -> SessionHold:
    return Holdable.of(provider).hold_session(session)


def begun(work: Callable[[], object]) -> tuple[threading.Thread, list[BaseException]]:
    """Run something on a thread, and return that with what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, raised


class HoldContract(Contract):
    """A session whose writers wait."""

    def test_it_claims_to_hold(self, provider: StateProvider) -> None:
        assert isinstance(provider, Holdable)

    def test_writers_wait_and_readers_do_not(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        other = f"{session}-other"
        provider.initialize_session(other)
        with hold(provider, session):
            blocked, raised = begun(lambda: provider.set_variable(session, "x", 1))
            pending = [provider.submit(commands.SetVariable(session, "x", Value(str(n)))) for n in range(2, 5)]
            assert provider.get_value(session, "x") == 0
            assert provider.get_session(session).variable_count == 1
            assert len(provider.get_variable_history(session, "x")) == 1
            # Other sessions are written meanwhile.
            provider.register_variable(other, "y", "integer", 0)
            provider.set_variable(other, "y", 1)
            assert not any(future.done() for future in pending)
            assert blocked.is_alive()
        blocked.join(DEADLINE_S)
        versions = [future.result(DEADLINE_S) for future in pending]
        assert raised == []
        assert versions == sorted(versions)
        assert provider.get_variable(session, "x").version == 4

    def test_all_that_waited_is_written_in_order(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        with hold(provider, session):
            pending = [provider.submit(commands.SetVariable(session, "x", Value(str(n)))) for n in range(1, 101)]
        versions = [future.result(DEADLINE_S) for future in pending]
        assert (versions if isinstance(provider, KeepsOrder) else sorted(versions)) == list(range(1, 101))
        history = {each.version: each.value for each in provider.get_variable_history(session, "x", limit=100)}
        assert history == {version: Value(str(n)) for n, version in enumerate(versions, 1)}

    def test_nobody_is_refused_who_came_just_before(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        pending: list[Future[Any]] = []
        over = threading.Event()

        def write() -> None:
            while not over.is_set():
                pending.extend(
                    provider.submit(commands.SetVariable(session, "x", Value(str(each)))) for each in range(5)
                )
                pending[-1].result(DEADLINE_S)

        writer, raised = begun(write)
        for _ in range(10):
            hold(provider, session).close()
        over.set()
        writer.join(DEADLINE_S)
        assert raised == []
        versions = [future.result(DEADLINE_S) for future in pending]
        assert (versions if isinstance(provider, KeepsOrder) else sorted(versions)) == list(range(1, len(pending) + 1))

    def test_a_cancelled_write_is_not_written(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        with hold(provider, session):
            pending = provider.submit(commands.SetVariable(session, "x", Value("1")))
            cancelled = pending.cancel()
        # A call that was sent to a server is cancelled no more.
        assert cancelled or not isinstance(provider, KeepsOrder)
        assert provider.set_variable(session, "x", 2) == (1 if cancelled else 2)

    def test_nobody_else_can_hold_it(self, provider: StateProvider, session: str) -> None:
        with hold(provider, session):
            with pytest.raises(errors.SessionHeldError) as caught:
                hold(provider, session)
            assert caught.value.retryable
        hold(provider, session).close()

    def test_closing_twice_is_harmless(self, provider: StateProvider, session: str) -> None:
        held = hold(provider, session)
        held.close()
        with hold(provider, session):
            held.close()
            pending = provider.submit(commands.RegisterVariable(session, "x", "integer", Value("0")))
            assert not pending.done()
        assert pending.result(DEADLINE_S)

    def test_a_hold_that_is_forgotten_ends(self, provider: StateProvider, session: str) -> None:
        held = hold(provider, session)
        pending = provider.submit(commands.RegisterVariable(session, "x", "integer", Value("0")))
        del held
        gc.collect()
        assert pending.result(DEADLINE_S)

    def test_a_mover_that_fails_frees_it(self, provider: StateProvider, session: str) -> None:
        with pytest.raises(ZeroDivisionError), hold(provider, session):
            raise ZeroDivisionError
        provider.register_variable(session, "x", "integer", 0)

    def test_a_session_that_moved_has_ended_here(self, provider: StateProvider, session: str) -> None:
        provider.register_variable(session, "x", "integer", 0)
        with hold(provider, session) as held:
            blocked, raised = begun(lambda: provider.set_variable(session, "x", 1))
            pending: Future[Any] = provider.submit(commands.SetVariable(session, "x", Value("2")))
            held.move("the moon")
        blocked.join(DEADLINE_S)
        for error in (*raised, pending.exception(DEADLINE_S)):
            # One may have come after the hold.
            assert isinstance(error, errors.SessionMovedError | errors.SessionNotFoundError)
        moved = pending.exception()
        assert isinstance(moved, errors.SessionMovedError)
        assert (moved.session_id, moved.moved_to) == (session, "the moon")
        assert not provider.heartbeat(session)
        provider.initialize_session(session)
        assert provider.list_variables(session) == ()

    def test_only_a_live_session_can_be_held(self, provider: StateProvider, session: str) -> None:
        with pytest.raises(NOT_THERE):
            hold(provider, f"{session}-missing")
        provider.initialize_session(f"{session}-missing")
        hold(provider, f"{session}-missing").close()
