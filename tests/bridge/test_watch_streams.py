"""Streams to many watchers send a few at a time, and share their encoded messages."""

import asyncio
from datetime import UTC, datetime
from typing import Final

from dspex_persist.state.bridge import codec, watch_streams
from dspex_persist.state.bridge.watch_streams import Encoded, Turns
from dspex_persist.state.model import ChangeKind, Source, Update, UpdateKind, Value, Variable, VariableVersion

AT_ONCE: Final = watch_streams.SENDING
NOW: Final = datetime(2026, 1, 2, tzinfo=UTC)


def is_set(streams: list[asyncio.Event]) -> list[int]:
    return [number for number, ready in enumerate(streams) if ready.is_set()]


async def _ask(count: int) -> tuple[Turns, list[asyncio.Event]]:
    turns, streams = Turns(asyncio.get_running_loop()), [asyncio.Event() for _ in range(count)]
    for ready in streams:
        turns.ask(ready)
    return turns, streams


def test_a_few_send_at_a_time_and_each_that_has_sent_lets_the_next_one() -> None:
    async def test() -> None:
        turns, streams = await _ask(AT_ONCE + 3)
        assert is_set(streams) == list(range(AT_ONCE))
        turns.give_back(streams[2])
        turns.give_back(streams[2])
        assert is_set(streams) == list(range(AT_ONCE + 1))
        # One that ends while it waits leaves no gap.
        turns.leave(streams[AT_ONCE + 1])
        turns.leave(streams[0])
        assert is_set(streams) == [*range(AT_ONCE + 1), AT_ONCE + 2]

    asyncio.run(test())


def test_one_that_is_sending_is_told_at_once_that_there_is_more() -> None:
    async def test() -> None:
        turns, streams = await _ask(AT_ONCE + 1)
        streams[0].clear()
        turns.ask(streams[0])
        assert streams[0].is_set()

    asyncio.run(test())


def test_those_whose_watchers_do_not_read_let_the_others_pass() -> None:
    async def test() -> None:
        _, streams = await _ask(3 * AT_ONCE)
        await asyncio.wait_for(asyncio.gather(*(ready.wait() for ready in streams)), 20)

    asyncio.run(test())


def update(
    sequence: int,
    name: str = "x",
    kind: UpdateKind = UpdateKind.VALUE_CHANGE,
    part: int = 1,
    json: str = "0.25",
    number: int = 3,
) -> Update:
    variable = Variable(f"var_{name}", name, "float", Value(json), number, "", {}, Source.PYTHON, NOW)
    version = VariableVersion(
        variable.id, "float", number, ChangeKind.SET, Value(json), {}, Source.PYTHON, NOW, "a", "c", sequence
    )
    return Update(kind, variable, sequence, NOW, version, part=(part, 2))


def test_a_message_is_encoded_once_for_all_watchers() -> None:
    encoded = Encoded()
    updates = [
        update(7),
        update(7, "y"),
        update(7, part=2),
        update(7, kind=UpdateKind.DELETED),
        # A commit may write a variable twice; which part of it each is depends on what is watched.
        update(7, number=4),
        update(8),
        update(7),
    ]
    for each in updates:
        assert encoded.message(each) == codec.update_message(each).SerializeToString()
    assert encoded.message(update(7)) is encoded.message(update(7))


def test_messages_that_are_too_large_together_are_not_kept() -> None:
    encoded = Encoded()
    large = update(7, json=f'"{"x" * watch_streams.KEPT_BYTES}"')
    assert encoded.message(large) == encoded.message(large)
    assert encoded.message(large) is not encoded.message(large)
