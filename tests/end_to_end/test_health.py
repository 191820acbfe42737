"""dspex-persist health, in every state that a server may be in."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dspex_persist import BridgedState, cli
from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.embedded import SqliteState
from tests.certificates import Authority
from tests.deadline import within
from tests.end_to_end.old_style import Gate, environment, serve, target_of, wait_until
from tests.prepared import commands

PROGRAM = (sys.executable, "-m", "dspex_persist")
SERVING, NOT_SERVING, USAGE, UNREACHABLE = 0, 1, 2, 69


def health(folder: Path, *arguments: str, **more: str) -> tuple[int, str]:
    """Run the command in a folder; return its exit code, and what it says."""
    argv = [*PROGRAM, "health", *arguments]
    done = subprocess.run(
        argv, cwd=folder, env=environment(**more), capture_output=True, text=True, timeout=within(60), check=False
    )
    assert not (done.stdout and done.stderr) or "--json" in arguments
    return done.returncode, done.stdout + done.stderr


@contextmanager
def serving(folder: Path, *arguments: str, **more: str) -> Iterator[ServerProcess]:
    argv = (*PROGRAM, "serve", *arguments)
    with ServerProcess.start(argv, env=environment(**more), cwd=folder) as server:
        yield server


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return int(bound.getsockname()[1])


def test_a_server_that_serves_and_then_has_ended(tmp_path: Path) -> None:
    arguments = ["token", "new", "t", "--scopes", "read", "--token-file", "tokens"]
    assert commands().run(arguments, cwd=tmp_path, env=environment(), timeout_s=within(60)).returncode == 0
    # It needs no token.
    with serve(tmp_path / "sessions.db", "--token-file", str(tmp_path / "tokens")) as server:
        target = target_of(server)
        assert health(tmp_path, "--target", target) == (SERVING, f"{target} is serving\n")
        assert health(tmp_path, f"--target=grpc://{target}") == (SERVING, f"{target} is serving\n")
        code, output = health(tmp_path, "--target", target, "--json")
        assert (code, json.loads(output)) == (SERVING, {"ok": True, "status": "serving", "target": target})
        code, output = health(tmp_path, "--target", f"grpcs://{target}")
        assert code == UNREACHABLE
        assert "the server does not use TLS; name it without TLS: --target HOST:PORT" in output
        assert server.terminate(within(30)) == 0
    code, output = health(tmp_path, "--target", target)
    assert (code, output) == (
        UNREACHABLE,
        f"error: cannot reach {target}: nothing listens there; start it with `dspex-persist serve`, or name its "
        "address with --target\n",
    )
    code, output = health(tmp_path, "--target", target, "--json")
    assert code == UNREACHABLE
    assert json.loads(output.splitlines()[0])["status"] == "unreachable"


def test_it_asks_the_server_of_the_same_settings(tmp_path: Path) -> None:
    port = free_port()
    settings = {"DSPEX_PERSIST_LISTEN": f"0.0.0.0:{port}", "DSPEX_PERSIST_INSECURE": "yes"}
    with serving(tmp_path, **settings):
        assert health(tmp_path, **settings) == (SERVING, f"127.0.0.1:{port} is serving\n")
        (tmp_path / "dspex-persist.toml").write_text(f'listen = "127.0.0.1:{port}"\n')
        assert health(tmp_path) == (SERVING, f"127.0.0.1:{port} is serving\n")
        (tmp_path / "dspex-persist.toml").rename(tmp_path / "other.toml")
        assert health(tmp_path, "--config", "other.toml")[0] == SERVING
        assert health(tmp_path, DSPEX_PERSIST_CONFIG="other.toml")[0] == SERVING
        # Where the server of this database is, its lock file tells.
        assert health(tmp_path, DSPEX_PERSIST_LISTEN="127.0.0.1:0") == (SERVING, f"0.0.0.0:{port} is serving\n")
        code, output = health(tmp_path, DSPEX_PERSIST_LISTEN=f"127.0.0.1:{free_port()}")
        assert code == UNREACHABLE
        assert f"its server is at 0.0.0.0:{port}: name that with --target" in output


def test_a_server_that_is_starting(tmp_path: Path) -> None:
    """It owns the file, and upgrades it or replays its log, before it listens."""
    listen = f"127.0.0.1:{free_port()}"
    with SqliteState(tmp_path / "sessions.db"):
        code, output = health(tmp_path, DSPEX_PERSIST_LISTEN=listen)
    assert code == NOT_SERVING
    assert "open, and does not serve it yet: it is starting, or another command" in output
    assert health(tmp_path, DSPEX_PERSIST_LISTEN=listen)[0] == UNREACHABLE


def test_it_waits_for_a_server_which_then_leaves_its_socket(tmp_path: Path) -> None:
    path = tmp_path / "bridge.sock"
    listen = f"unix:{path}"
    argv = [*PROGRAM, "health", "--target", listen, "--wait", "600"]
    with subprocess.Popen(argv, env=environment(), cwd=tmp_path, stdout=subprocess.PIPE, text=True) as waiting:
        with serving(tmp_path, "--listen", listen) as server:
            assert waiting.wait(within(30)) == SERVING
            server.kill()
        assert waiting.stdout is not None
        assert waiting.stdout.read() == f"{listen} is serving\n"
    assert path.exists()
    code, output = health(tmp_path, "--target", f"grpc+{listen}", "--wait", "0.2")
    assert code == UNREACHABLE
    assert "nothing listens there" in output


def test_a_server_that_shuts_down(tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    with serve(tmp_path / "sessions.db", "--tools", "tests.end_to_end.served_tools", "--grace", "600") as server:
        target = target_of(server)
        with BridgedState(target) as state, ThreadPoolExecutor(1) as threads:
            state.initialize_session("s")
            state.register_variable("s", "a", "integer", 0)
            call = threads.submit(state.execute_tool, "s", "add_at_gate", {"gate": str(gate)})
            gate.wait()
            server.send_signal(signal.SIGTERM)
            wait_until(lambda: "draining" in server.stderr_tail, "it drains")
            code, output = health(tmp_path, "--target", target)
            assert code == NOT_SERVING
            why = "it is shutting down, its writer is stuck, or its database is away"
            assert output == f"error: {target} is not serving: {why}\n"
            gate.open()
            call.result()
        assert server.wait(within(30)) == 0


def test_tls(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "tls")
    pair = authority.issue("server", "DNS:state.example.org")
    here = authority.issue("here")
    settings = {
        "DSPEX_PERSIST_LISTEN": f"127.0.0.1:{free_port()}",
        "DSPEX_PERSIST_TLS_CERT": str(pair.cert),
        "DSPEX_PERSIST_TLS_KEY": str(pair.key),
    }
    target = settings["DSPEX_PERSIST_LISTEN"]
    trusted = {"DSPEX_PERSIST_CA": str(authority.cert)}
    with serving(tmp_path, **settings):
        # A server of this machine is asked by an address that its certificate does not have.
        assert health(tmp_path, **settings) == (SERVING, f"grpcs://{target} is serving\n")
        code, output = health(tmp_path, "--target", target)
        assert code == UNREACHABLE
        assert "as one with TLS does; if it has, name it as --target grpcs://HOST:PORT" in output
        code, output = health(tmp_path, "--target", f"grpcs://{target}")
        assert code == UNREACHABLE
        assert "its certificate is not trusted: unable to get local issuer certificate; DSPEX_PERSIST_CA" in output
        code, output = health(tmp_path, "--target", f"grpcs://{target}", **trusted)
        assert "IP address mismatch" in output
        settings["DSPEX_PERSIST_TLS_CERT"], settings["DSPEX_PERSIST_TLS_KEY"] = str(here.cert), str(here.key)
        code, output = health(tmp_path, "--target", f"grpcs://{target}", DSPEX_PERSIST_CA="missing.pem")
        assert (code, output) == (USAGE, "error: missing.pem: cannot read it: No such file or directory\n")
    with serving(tmp_path, **settings, DSPEX_PERSIST_CLIENT_CA=str(authority.cert)):
        assert "DSPEX_PERSIST_CERT and its key in DSPEX_PERSIST_KEY" in health(tmp_path, **settings)[1]
        shown = {"DSPEX_PERSIST_CERT": str(here.cert), "DSPEX_PERSIST_KEY": str(here.key)}
        assert health(tmp_path, "--target", f"grpcs://{target}", **trusted, **shown)[0] == SERVING
        assert health(tmp_path, **settings, **shown)[0] == SERVING


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "nowhere"], "setting target (flag --target): 'nowhere' is invalid: expected HOST:PORT"),
        (["--config", "missing.toml"], "cannot read missing.toml"),
        (["--wait", "long"], "Invalid value for '--wait'"),
        (["--wait", "-1"], "Invalid value for '--wait'"),
        (["--port", "1"], "No such option"),
        (["--target"], "requires an argument"),
        (["more"], "unexpected extra argument"),
    ],
)
def test_wrong_usage(arguments: list[str], words: str, tmp_path: Path) -> None:
    """Some of it is refused where all usage is, past the imports of other commands."""
    done = commands().run(["health", *arguments], cwd=tmp_path, env=environment(), timeout_s=within(60))
    assert done.returncode == USAGE
    assert words in " ".join(done.stderr.replace("│", " ").split())
    if words.startswith(("setting", "cannot")):
        assert health(tmp_path, *arguments) == (USAGE, done.stderr)


def test_the_command_says_the_same_where_all_commands_are(tmp_path: Path) -> None:
    target = f"127.0.0.1:{free_port()}"
    result = CliRunner().invoke(cli.app, ["health", "--target", target])
    assert (result.exit_code, result.output) == health(tmp_path, "--target", target)
    assert CliRunner().invoke(cli.app, ["health", "--target", "x"]).exit_code == USAGE


def test_it_starts_without_what_takes_long_to_import() -> None:
    script = (
        "import sys; sys.argv[1:] = ['health', '--target', '127.0.0.1:1']\n"
        "from dspex_persist.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code)\n"
        "print(sorted({'grpc', 'typer', 'rich', 'pydantic', 'sqlalchemy', 'asyncio', 'ssl'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=within(60),
        check=True,
    )
    assert done.stdout == f"{UNREACHABLE}\n[]\n"
