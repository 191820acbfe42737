"""A server without tools, and a state that is closed while a thread watches it."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dspex_persist import connect
from dspex_persist.state.errors import EngineClosedError
from dspex_persist.testing.server import ServedDatabase
from tests.prepared import commands

DEADLINE_S = 30


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDatabase]:
    with ServedDatabase(tmp_path_factory.mktemp("served") / "s.db") as served:
        yield served


NOTHING = {"": "has no tools: ", "s": "'s' has no workers"}


@pytest.mark.parametrize("session", NOTHING)
def test_tools_list_says_that_the_server_has_none(server: ServedDatabase, session: str) -> None:
    with connect(server.url) as state:
        state.initialize_session("s")
    words = ["tools", "list", "--target", server.target, *(["--session", session] if session else [])]
    listed = commands().run(words, cwd=server.path.parent, env=os.environ, timeout_s=DEADLINE_S)
    assert listed.returncode == 0, listed.stderr
    assert f"the server at {server.target} has no tools" in listed.stdout
    assert NOTHING[session] in listed.stdout
    assert "--target" not in listed.stdout


@pytest.mark.parametrize("url", ["file", "server"])
def test_closing_under_a_watch_is_the_same_error_everywhere(server: ServedDatabase, tmp_path: Path, url: str) -> None:
    state = connect(server.url if url == "server" else tmp_path / "s.db")
    state.initialize_session("watched")
    watch = state.watch("watched")
    errors: list[BaseException] = []

    def listen() -> None:
        try:
            for _ in watch:
                pass
        except BaseException as error:  # noqa: BLE001 -- the thread's end
            errors.append(error)

    listening = threading.Thread(target=listen)
    listening.start()
    state.close()
    listening.join(DEADLINE_S)
    assert [type(error) for error in errors] == [EngineClosedError]
    with pytest.raises(EngineClosedError):
        watch.pull()
    watch.close()
