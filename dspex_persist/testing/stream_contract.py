"""The contract of every provider that is `StreamsTools`, as tests. A backend subclasses `StreamContract`, with the
fixture `provider` that `tool_contract` describes.
"""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, cast

import pytest

from dspex_persist.state import errors
from dspex_persist.state.abilities import ExecutesTools, StreamsTools
from dspex_persist.testing.tool_contract import Client, ToolsContract


class StreamContract(ToolsContract):
    """Chunks arrive as the tool yields them."""

    def test_chunks_come_as_they_are_yielded_and_the_end_is_the_commit(self, client: Client) -> None:
        assert list(stream(client, "count", to=3)) == [1, 2, 3]
        assert client.values()["a"] == 3
        assert list(stream(client, "count_later", to=2)) == [{"n": 1}, {"n": 2}]
        assert client.values()["a"] == 2
        assert list(stream(client, "count", to=0)) == []

    def test_floats_that_json_does_not_have_come_as_such(self, client: Client) -> None:
        assert list(stream(client, "infinities")) == [math.inf, 1.0, -math.inf]

    def test_of_a_tool_that_does_not_stream_its_result_comes(self, client: Client) -> None:
        assert list(stream(client, "add", amount=2)) == [2]
        assert list(stream(client, "add_later", amount=2)) == [4]
        assert list(stream(client, "infinity")) == [math.inf]

    def test_nothing_begins_before_the_first_chunk_is_asked_for(self, client: Client) -> None:
        chunks = stream(client, "count", to=1)
        assert client.versions() == [0]
        assert list(chunks) == [1]

    @pytest.mark.parametrize("tool", ["stumble", "stumble_later"])
    def test_what_fails_later_has_shown_its_chunks_and_kept_nothing(self, client: Client, tool: str) -> None:
        chunks = stream(client, tool, name="ValueError")
        assert next(chunks) == 1
        with pytest.raises(errors.ToolFailedError, match="ValueError"):
            next(chunks)
        assert client.values()["a"] == 0

    @pytest.mark.parametrize(
        ("tool", "parameters", "kind"),
        [
            ("fail", {"name": "ValueError"}, errors.ToolFailedError),
            ("count", {"two": 1}, errors.ToolArgumentError),
            ("count_up", {}, errors.ToolNotFoundError),
        ],
    )
    def test_what_is_wrong_is_raised(
        self, client: Client, tool: str, parameters: dict[str, object], kind: type[Exception]
    ) -> None:
        with pytest.raises(kind):
            list(stream(client, tool, **parameters))

    def test_a_session_that_is_not_there(self, provider: ExecutesTools) -> None:
        with pytest.raises(errors.SessionNotFoundError):
            list(_streams(provider).stream_tool("unknown", "count", {"to": 1}))

    def test_wrong_arguments(self, provider: ExecutesTools) -> None:
        with pytest.raises(errors.InvalidArgumentError):
            list(_streams(provider).stream_tool(cast("str", 1), "count", {"to": 1}))

    @pytest.mark.parametrize("tool", ["stream_for_ever", "stream_for_ever_later"])
    def test_who_takes_no_more_ends_it(self, client: Client, tool: str) -> None:
        chunks = stream(client, tool, text="x")
        assert list(islice(chunks, 3)) == ["x", "x", "x"]
        chunks.close()
        assert list(stream(client, "count", to=1)) == [1]
        assert client.versions() == [1, 0]

    def test_under_an_idempotency_key_it_runs_once(self, client: Client) -> None:
        for _ in range(2):
            chunks = _streams(client.provider).stream_tool(
                client.session, "count", {"to": 2}, metadata={"idempotency_key": "k"}
            )
            assert list(chunks) == [1, 2]
        assert client.versions() == [2, 1, 0]


def _streams(provider: ExecutesTools) -> StreamsTools:
    return StreamsTools.of(provider)


def stream(client: Client, tool: str, **parameters: Any) -> Any:
    """Return an iterator over the chunks of a tool, which can be closed."""
    chunks: Iterator[object] = _streams(client.provider).stream_tool(client.session, tool, parameters)
    return chunks
