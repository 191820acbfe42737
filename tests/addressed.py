"""Whatever takes an address takes that of a database that servers share, and no place that tells it shows its password.

A module for one kind has the fixture `secret`: the address, with the password `geheim`, of a log with the session `s`,
whose variable `x` is 1. Its conftest.py imports `run`.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dspex_persist import Context, cli
from dspex_persist.infra.process import ServerProcess
from dspex_persist.wiring.connecting import connect
from tests.deadline import within
from tests.end_to_end.old_style import serve, target_of

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """`dspex-persist ...` in this process: its exit code, and what it has printed."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["dspex-persist", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        stdout, stderr = capsys.readouterr()
        assert "geheim" not in stdout + stderr
        return int(ended.value.code or 0), stdout + stderr

    return run


class Addressed:
    """What is the same for each kind of database."""

    @pytest.fixture
    def servers(self, secret: str, tmp_path: Path) -> Iterator[list[ServerProcess]]:
        with serve(tmp_path / "unused.db", "--db", secret) as one, serve(tmp_path / "unused.db", "--db", secret) as two:
            yield [one, two]

    def test_a_context(self, secret: str) -> None:
        with Context("s", secret) as ctx:
            ctx["x"] = 5
            assert "geheim" not in repr(ctx)
            assert secret.replace("geheim", "***") in repr(ctx)
            # It is durable where it is.
            ctx.ensure_persistent("other.db")
            assert not Path("other.db").exists()
        with Context("s", secret) as ctx:
            assert ctx["x"] == 5

    def test_its_scheme_may_have_capital_letters(self, secret: str, run: Run) -> None:
        scheme, rest = secret.split(":", 1)
        for each in (scheme.upper(), scheme.title()):
            for words in (("get", "s"), ("db", "check")):
                code, printed = run(*words, "--db", f"{each}:{rest}")
                assert code == 0, printed
            with connect(f"{each}:{rest}") as state:
                assert state.heartbeat("s")

    def test_a_session_in_memory_moves_to_it(self, secret: str) -> None:
        with Context("moved", "local") as ctx:
            ctx["y"] = 1
            ctx.move_to(secret)
            assert "geheim" not in repr(ctx)
            ctx["y"] = 2
        with connect(secret) as state:
            assert state.get_variable("moved", "y").version == 1

    def test_two_servers(self, servers: list[ServerProcess], secret: str) -> None:
        one, two = (connect(f"grpc://{target_of(server)}") for server in servers)
        with one, two, connect(secret) as here:
            one.set_variable("s", "x", 7)
            assert json.loads(two.get_variable("s", "x").value.json) == 7
            two.set_variable("s", "x", 8)
            assert json.loads(here.get_variable("s", "x").value.json) == 8
            with two.watch("s", ["x"], after_sequence=0) as watch:
                assert [each.variable.version for each in itertools.islice(watch, 3)] == [0, 1, 2]
        for server in servers:
            assert server.terminate(timeout_s=within(10)) == 0
            assert '"event": "serving"' in server.stderr_tail
            assert "geheim" not in server.stderr_tail
