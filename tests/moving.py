"""Sessions of contexts that move to a database that servers share, from it, and what has to stay with one process.

A module for one kind of database has the fixtures `url` and `elsewhere`, the addresses of two logs.
"""

import threading
from pathlib import Path
from typing import ClassVar

import pytest

from dspex_persist import Context, connect
from dspex_persist.state.errors import SessionMovedError, SessionNotFoundError, StateError, UnsupportedError
from dspex_persist.state.provider import StateProvider
from tests.deadline import within
from tests.engines import wait_until


class Moving:
    """What is the same for each kind of database."""

    overtaken: ClassVar[tuple[type[StateError], ...]] = ()
    """What is raised for a write that others have overtaken again and again; nothing was written."""

    def test_functions_of_one_process_do_not_come_along(self, url: str) -> None:
        with Context("derived", "local") as ctx:
            ctx["a"] = 1
            ctx.derive("double", ["a"], lambda a: 2 * a)
            shared = r"a database that servers share, with derived variables \(double\)"
            with pytest.raises(UnsupportedError, match=shared):
                ctx.move_to(url)
            ctx["a"] = 4
            assert ctx["double"] == 8

    def test_it_derives_nothing(self, url: str) -> None:
        with Context("deriving", url) as ctx:
            ctx["a"] = 1
            with pytest.raises(UnsupportedError, match="derived variables"):
                ctx.derive("double", ["a"], lambda a: 2 * a)

    def test_a_session_leaves_it_while_others_write_it(self, url: str, tmp_path: Path) -> None:
        acknowledged: list[list[int]] = [[] for _ in range(3)]
        refused: list[StateError] = []
        pause = threading.Event()

        def write(state: StateProvider, name: str, mine: list[int]) -> None:
            number = 0
            while True:
                number += 1
                try:
                    state.set_variable("leaves", name, number)
                except (SessionMovedError, SessionNotFoundError) as error:
                    refused.append(error)
                    return
                except self.overtaken:
                    continue
                mine.append(number)
                # Without a pause, one server may have the others wait for long.
                pause.wait(0.005)

        with Context("leaves", url) as ctx, connect(url) as other, connect(url) as third:
            for name in ("x0", "x1", "x2"):
                ctx[name] = 0
            threads = [
                threading.Thread(target=write, args=(state, f"x{number}", acknowledged[number]))
                for number, state in enumerate((other, other, third))
            ]
            for thread in threads:
                thread.start()
            wait_until(lambda: min(len(each) for each in acknowledged) >= 20)
            ctx.move_to(tmp_path / "moved.db")
            for thread in threads:
                thread.join(within(30))
            assert len(refused) == 3
            # Each acknowledged write is here, and none was acknowledged there after the move.
            for number, mine in enumerate(acknowledged):
                history = ctx.backend.provider.get_variable_history("leaves", f"x{number}", 5000)
                assert [int(version.value.json) for version in reversed(history)][1:] == mine
            ctx["x0"] = -1
            assert ctx["x0"] == -1
            with pytest.raises(SessionNotFoundError):
                other.get_session("leaves")

    def test_a_session_moves_to_it_and_on_to_another(self, url: str, elsewhere: str) -> None:
        with Context("travels", "local") as ctx:
            ctx["a"] = 1
            ctx.move_to(url)
            ctx["a"] += 1
            assert "distributed" in ctx.backend.capabilities
            with connect(url) as other:
                assert other.get_value("travels", "a") == 2
                other.set_variable("travels", "a", 3)
            assert ctx["a"] == 3
            ctx.move_to(elsewhere)
            ctx["a"] += 1
            assert "distributed" in ctx.backend.capabilities
            with connect(elsewhere) as other, connect(url) as before:
                assert other.get_value("travels", "a") == 4
                assert not before.heartbeat("travels")
