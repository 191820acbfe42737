"""Closing. Needs a provider that is created for each test."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dspex_persist.infra.mailbox import LoopMailbox
from dspex_persist.state import abilities, commands, errors
from dspex_persist.state.commands import Command
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.checks import DEADLINE_S, refused
from dspex_persist.testing.provider_contract.base import Contract


class ClosingContract(Contract):
    """Closing. Needs a provider that is created for each test."""

    def test_after_closing_everything_is_refused(self, provider: StateProvider, session: str) -> None:
        provider.check_open()
        provider.close()
        provider.close()
        requests: list[Command[Any]] = [
            commands.GetSession(session),
            commands.GetVariableHistory(session, "x"),
            commands.InitializeSession(session),
        ]
        for command in requests:
            assert isinstance(refused(provider.submit(command)), errors.EngineClosedError)
        for ask in (lambda: provider.watch(session), provider.check_open):
            with pytest.raises(errors.EngineClosedError):
                ask()

    def test_a_watch_ends_with_an_error_when_its_provider_closes(self, provider: StateProvider, session: str) -> None:
        watch = provider.watch(session)
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(list, watch)
            provider.close()
            assert isinstance(waiting.exception(DEADLINE_S), errors.EngineClosedError)
        watch.close()

    def test_a_watch_of_an_event_loop_ends_with_an_error_when_its_provider_closes(
        self, provider: StateProvider, session: str
    ) -> None:
        async def closed() -> None:
            woken = asyncio.Event()
            with provider.watch(session) as watch:
                mailbox = LoopMailbox(asyncio.get_running_loop())
                watch.notify(mailbox.waker(woken.set))
                assert watch.pull_ready() == []
                await asyncio.to_thread(provider.close)
                await asyncio.wait_for(woken.wait(), DEADLINE_S)
                with pytest.raises(errors.EngineClosedError):
                    watch.pull_ready()

        asyncio.run(closed())

    def test_async_with_closes_it(self, provider: StateProvider) -> None:
        async def use() -> None:
            async with provider:
                provider.check_open()

        asyncio.run(use())
        with pytest.raises(errors.EngineClosedError):
            provider.check_open()

    def test_it_claims_what_it_has_and_nothing_else(self, provider: StateProvider) -> None:
        claimed = provider.capabilities
        assert {"atomic_batches", "watch", "history"} <= claimed
        kinds = [kind for kind in vars(abilities).values() if isinstance(kind, type) and kind is not abilities.Ability]
        for kind in kinds:
            if issubclass(kind, abilities.Ability) and kind.gives and not claimed.isdisjoint(kind.gives):
                assert isinstance(provider, kind)
        assert not isinstance(provider, abilities.Durable) or "durable" in claimed
        assert isinstance(provider.url, str)
