"""Sessions of contexts that move to a database, and what has to stay where one process has the session."""

import pytest

from dspex_persist import Context, connect
from dspex_persist.state.errors import UnsupportedError


def test_a_context_moves_its_session_to_a_database(url: str) -> None:
    with Context("s", "local") as ctx:
        ctx["a"] = 1
        ctx.move_to(url)
        ctx["a"] += 1
        assert "distributed" in ctx.backend.capabilities
        with connect(url) as other:
            assert other.get_value("s", "a") == 2
            other.set_variable("s", "a", 3)
        assert ctx["a"] == 3


def test_functions_of_one_process_do_not_come_along(url: str) -> None:
    with Context("s", "local") as ctx:
        ctx["a"] = 1
        ctx.derive("double", ["a"], lambda a: 2 * a)
        with pytest.raises(UnsupportedError, match=r"a database that servers share, with derived variables \(double\)"):
            ctx.move_to(url)
        ctx["a"] = 4
        assert ctx["double"] == 8


def test_a_database_derives_nothing(url: str) -> None:
    with Context("s", url) as ctx:
        ctx["a"] = 1
        with pytest.raises(UnsupportedError, match="derived variables"):
            ctx.derive("double", ["a"], lambda a: 2 * a)


def test_a_session_leaves_a_database_by_export(url: str) -> None:
    with Context("s", url) as ctx:
        ctx["a"] = 1
        with pytest.raises(UnsupportedError, match="export"):
            ctx.move_to("local.db")
        assert ctx["a"] == 1
