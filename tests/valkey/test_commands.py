"""Commands as the functions of the store get them: none is too long to be unpacked, and parts are not too large."""

from typing import Any

from dspex_persist.state.valkey.batch import Commands


def commands_in(words: list[Any]) -> list[list[Any]]:
    found, place = [], 0
    while place < len(words):
        found.append(words[place + 1 : place + 1 + words[place]])
        place += 1 + words[place]
    return found


def test_many_fields_are_several_commands() -> None:
    commands = Commands()
    commands.set("hash", {f"field {number}": number for number in range(1_200)})
    commands.remove("hash", (f"field {number}" for number in range(1_200)))
    found = commands_in(commands.words)
    assert [command[0] for command in found] == ["HSET"] * 3 + ["HDEL"] * 3
    assert sum(len(command) - 2 for command in found) == 3 * 1_200
    assert max(map(len, found)) <= 1_002
    commands.set("hash", {})
    commands.remove("hash", ())
    assert commands_in(commands.words) == found


def test_parts() -> None:
    commands = Commands()
    for number in range(10):
        commands.add("SET", "key", "x" * 100 * number)
    parts = list(commands.parts(1_000))
    assert [word for part in parts for word in part] == commands.words
    assert len(parts) > 3
    assert all(len(str(part)) < 1_500 for part in parts)
    assert commands.size_bytes > 4_500
