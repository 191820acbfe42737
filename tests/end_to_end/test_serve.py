"""dspex-persist serve, as a process: what it says, what it refuses, how it ends, and that nothing is lost."""

import json
import os
import re
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Protocol

import grpc
import pytest
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from typer.testing import CliRunner

import dspex_persist
from dspex_persist import cli
from dspex_persist.cli.places import url_of
from dspex_persist.infra.process import ProcessFailedError, ServerProcess
from dspex_persist.settings import SettingsError
from dspex_persist.state.commands import SetVariable
from dspex_persist.state.errors import InvalidArgumentError, NotADatabaseError, OutcomeUnknownError, UnavailableError
from dspex_persist.state.model import Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.testing.server import ServedDatabase
from dspex_persist.wiring.connecting import connect
from dspex_persist.wiring.serving import serve
from tests.certificates import Authority
from tests.deadline import within
from tests.prepared import commands

pytestmark = pytest.mark.usefixtures("own_interpreters")

PROGRAM = (sys.executable, "-m", "dspex_persist")
DEADLINE_S = within(30)


class Start(Protocol):
    """Starts a server in the test's own directory."""

    def __call__(self, *arguments: str, **environment: str) -> ServerProcess: ...


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """A stack that the test enters clients and servers on; its end closes them, servers last."""
    with ExitStack() as opened:
        yield opened


@pytest.fixture
def start(stack: ExitStack, tmp_path: Path) -> Start:
    """Starts a server on `tmp_path/sessions.db` and a free port, unless the arguments say otherwise."""

    def start_server(*arguments: str, **environment: str) -> ServerProcess:
        listen = () if "--listen" in arguments else ("--listen", "127.0.0.1:0")
        argv = [*PROGRAM, "serve", *listen, *arguments]
        return stack.enter_context(ServerProcess.start(argv, env=clean_environment(**environment), cwd=tmp_path))

    return start_server


@pytest.fixture
def client_of(stack: ExitStack) -> Callable[..., StateProvider]:
    """Connects to a server, or to an address."""

    def connect_to(server: ServerProcess | str, **options: Any) -> StateProvider:
        url = server if isinstance(server, str) else f"grpc://127.0.0.1:{server.port}"
        return stack.enter_context(connect(url, **options))

    return connect_to


def clean_environment(**more: str) -> dict[str, str]:
    return {name: text for name, text in os.environ.items() if not name.startswith("DSPEX_PERSIST_")} | more


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command that is to end by itself."""
    return commands().run(arguments, cwd=cwd, env=clean_environment(**environment), timeout_s=within(60))


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll for what no event tells."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not within {DEADLINE_S:g} s: {what}"
        time.sleep(0.01)


def fill(client: StateProvider, value: object = 1) -> None:
    """A session "s" with an integer "n"."""
    client.initialize_session("s")
    client.register_variable("s", "n", "integer", 0)
    client.set_variable("s", "n", value)


# --- Ready, and logs ---


def test_it_says_that_it_is_ready_in_one_line_and_logs_json_without_values(tmp_path: Path) -> None:
    argv = [*PROGRAM, "serve", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(
        argv, cwd=tmp_path, env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.fullmatch(r"GRPC_READY:([0-9]+)\n", line)
        assert match is not None, line
        with connect(f"grpc://127.0.0.1:{match[1]}") as client:
            client.initialize_session("s", {"note": "secret-of-the-session"})
            client.register_variable("s", "v", "string", "secret-of-a-variable", constraints={"max_length": 20})
            with pytest.raises(Exception, match="max"):
                client.set_variable("s", "v", "secret-of-a-variable-that-is-too-long")
        process.send_signal(signal.SIGINT)
        rest, logs = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, rest) == (0, "")
    events = [json.loads(text) for text in logs.splitlines()]
    assert {"serving", "draining", "stopped"} <= {event["event"] for event in events}
    assert any(event.get("session_id") == "s" for event in events)
    assert "secret" not in logs


def test_it_serves_on_a_unix_socket(start: Start, client_of: Callable[..., StateProvider], tmp_path: Path) -> None:
    server = start("--listen", f"unix:{tmp_path / 'bridge.sock'}")
    assert server.port == 0
    client = client_of(f"grpc+unix:{tmp_path / 'bridge.sock'}")
    fill(client)
    assert client.get_value("s", "n") == 1
    assert server.terminate(DEADLINE_S) == 0


def test_tools_may_change_the_working_directory(
    start: Start, client_of: Callable[..., StateProvider], tmp_path: Path
) -> None:
    """While they are imported, and while they run: what was named is where it was named."""
    (tmp_path / "elsewhere").mkdir()
    Authority(tmp_path, "trusted")
    (tmp_path / "wandering.py").write_text(
        "import os\n"
        "from dspex_persist import tool\n"
        "os.chdir('elsewhere')\n"
        "@tool\n"
        "def wander() -> None:\n"
        "    os.chdir('/')\n"
    )
    files = ("--listen", "unix:a.sock", "--db", "a.db", "--worker-ca", "trusted.pem")
    server = start(*files, "--tools", "wandering")
    client = client_of(f"grpc+unix:{tmp_path / 'a.sock'}")
    fill(client)
    assert client.execute_tool("s", "wander").success
    assert client.get_value("s", "n") == 1
    assert server.terminate(DEADLINE_S) == 0
    assert sorted(each.name for each in tmp_path.iterdir() if "a." in each.name) == ["a.db", "a.db.anchor", "a.db.lock"]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_settings_reach_the_engine(start: Start, client_of: Callable[..., StateProvider], tmp_path: Path) -> None:
    (tmp_path / "dspex-persist.toml").write_text(
        'db = "from_file.db"\nsession_id_length = 4\nvariables_per_session = 2\n'
    )
    server = start("--limit", "name_length=5", DSPEX_PERSIST_SESSION_ID_LENGTH="6")
    assert (tmp_path / "from_file.db").exists()
    client = client_of(server)
    client.initialize_session("sixsix")
    with pytest.raises(Exception, match=r"above the limit of 6 \(setting session_id_length\)"):
        client.initialize_session("sevenseven")
    with pytest.raises(Exception, match=r"above the limit of 5 \(setting name_length\)"):
        client.register_variable("sixsix", "sixsix", "integer", 0)
    client.register_variable("sixsix", "a", "integer", 0)
    client.register_variable("sixsix", "b", "integer", 0)
    with pytest.raises(Exception, match=r"above the limit of 2 \(setting variables_per_session\)"):
        client.register_variable("sixsix", "c", "integer", 0)


# --- Refusals ---


def test_a_second_server_on_the_file_is_refused_and_names_the_first(start: Start, tmp_path: Path) -> None:
    first = start()
    # The port is taken too: the database must be looked at first.
    second = run("serve", "--listen", f"127.0.0.1:{first.port}", cwd=tmp_path)
    assert second.returncode == 4
    assert last_line(second).startswith(
        f"error: sessions.db is in use by process {first.pid}, the server at 127.0.0.1:{first.port}: one server owns a "
        "database; stop it, or use another --db"
    )
    assert "Traceback" not in second.stderr


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.stdout == ""
    return result.stderr.splitlines()[-1]


def test_an_address_in_use_is_refused(start: Start, tmp_path: Path) -> None:
    first = start()
    second = run("serve", "--db", "other.db", "--listen", f"127.0.0.1:{first.port}", cwd=tmp_path)
    assert second.returncode == 75
    assert last_line(second) == f"error: cannot listen on 127.0.0.1:{first.port}: address already in use"
    assert list(tmp_path.glob("other*")) == []


def test_an_address_that_others_can_reach_needs_insecure(start: Start, tmp_path: Path) -> None:
    refused = run("serve", "--listen", "0.0.0.0:0", cwd=tmp_path)
    assert refused.returncode == 2
    assert re.fullmatch(r"error: setting listen: '0\.0\.0\.0:0' can be reached .* --insecure\n", refused.stderr)
    assert list(tmp_path.iterdir()) == []
    assert start("--listen", "0.0.0.0:0", "--insecure").port > 0


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        (["--grace", "soon"], {}, "setting grace_s (flag --grace): 'soon' is invalid: it must be a valid number"),
        (["--listen", "nowhere"], {}, "setting listen: 'nowhere' is invalid: expected HOST:PORT"),
        (["--limit", "depth=3"], {}, "setting limit (flag --limit): 'depth=3' is invalid: write NAME=NUMBER"),
        (["--limit", "json_depth=x"], {}, "setting json_depth (flag --limit json_depth): 'x' is invalid"),
        (
            [],
            {"DSPEX_PERSIST_DURABILITY": "fast"},
            "setting durability (environment variable DSPEX_PERSIST_DURABILITY): "
            "'fast' is invalid: it must be 'full' or 'normal'",
        ),
        (["--config", "bad.toml"], {}, "setting colour (file bad.toml): there is no such setting"),
    ],
)
def test_bad_settings_are_one_sentence(
    tmp_path: Path, arguments: list[str], environment: dict[str, str], sentence: str
) -> None:
    (tmp_path / "bad.toml").write_text('colour = "blue"\n')
    result = run("serve", *arguments, cwd=tmp_path, **environment)
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {sentence}")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "sessions.db").exists()


def test_a_file_that_is_not_a_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sessions.db").write_bytes(b"these are not the bytes of a database" * 100)
    refused = run("serve", "--listen", "127.0.0.1:0", cwd=tmp_path)
    assert refused.returncode == 5
    assert last_line(refused) == "error: cannot open sessions.db: file is not a database"


def test_a_newer_schema_and_lost_commits_are_refused(
    start: Start, client_of: Callable[..., StateProvider], tmp_path: Path
) -> None:
    path = tmp_path / "sessions.db"
    server = start()
    fill(client_of(server))
    assert server.terminate(DEADLINE_S) == 0
    shutil.copy(path, tmp_path / "older.db")
    server = start()
    client_of(server).set_variable("s", "n", 2)
    assert server.terminate(DEADLINE_S) == 0

    shutil.copy(tmp_path / "older.db", path)
    refused = run("serve", "--listen", "127.0.0.1:0", cwd=tmp_path)
    assert refused.returncode == 5
    assert last_line(refused).startswith("error: sessions.db has lost acknowledged commits")

    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    refused = run("serve", "--listen", "127.0.0.1:0", cwd=tmp_path)
    assert refused.returncode == 5
    assert "it was written by a newer release" in last_line(refused)


# --- The end ---


def hold_writes(stack: ExitStack, path: Path) -> sqlite3.Connection:
    """Keep the server's writer waiting: its calls stay in flight until the connection rolls back."""
    connection = stack.enter_context(closing(sqlite3.connect(path, isolation_level=None)))
    connection.execute("BEGIN IMMEDIATE")
    return connection


def write_in_flight(server: ServerProcess, client: StateProvider) -> Any:
    """The future of a write that the server has received."""
    future = client.submit(SetVariable("s", "n", Value("42")))
    # On the same connection, so behind it.
    client.heartbeat("s")
    assert not future.done()
    return future


def test_sigterm_lets_calls_finish_ends_watches_and_leaves_no_wal(
    start: Start, client_of: Callable[..., StateProvider], stack: ExitStack, tmp_path: Path
) -> None:
    server = start()
    client = client_of(server)
    fill(client)
    health: Any = health_pb2_grpc.HealthStub(stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{server.port}")))
    states = health.Watch(health_pb2.HealthCheckRequest(service="snakepit.bridge.BridgeService"), timeout=DEADLINE_S)
    assert next(states).status == health_pb2.HealthCheckResponse.SERVING
    watch = stack.enter_context(client_of(server, watch_patience_s=0).watch("s"))
    blocker = hold_writes(stack, tmp_path / "sessions.db")
    future = write_in_flight(server, client)
    server.send_signal(signal.SIGTERM)
    assert [state.status for state in states] == [health_pb2.HealthCheckResponse.NOT_SERVING]
    with pytest.raises(UnavailableError, match="resume with after_sequence=3"):
        watch.next(DEADLINE_S)
    blocker.rollback()
    assert future.result(DEADLINE_S) == 2
    assert server.wait(DEADLINE_S) == 0
    blocker.close()
    assert not (tmp_path / "sessions.db-wal").exists()
    assert client_of(start()).get_value("s", "n") == 42


def test_a_second_signal_ends_it_at_once(
    start: Start, client_of: Callable[..., StateProvider], stack: ExitStack, tmp_path: Path
) -> None:
    server = start()
    client = client_of(server, timeout_s=within(5))
    fill(client)
    hold_writes(stack, tmp_path / "sessions.db")
    future = write_in_flight(server, client)
    server.send_signal(signal.SIGINT)
    wait_until(lambda: "draining" in server.stderr_tail, "the log says that it drains")
    server.send_signal(signal.SIGTERM)
    assert server.wait(within(3)) == -signal.SIGTERM
    with pytest.raises(OutcomeUnknownError):
        future.result(DEADLINE_S)


def test_a_kill_loses_nothing_that_was_acknowledged(start: Start, client_of: Callable[..., StateProvider]) -> None:
    server = start()
    fill(client_of(server), 7)
    server.kill()
    client = client_of(start())
    assert client.get_value("s", "n") == 7
    assert [entry.version for entry in client.get_variable_history("s", "n")] == [1, 0]


def test_storage_that_fails_ends_the_server_and_callers_hear_that_the_outcome_is_unknown(
    start: Start, client_of: Callable[..., StateProvider], tmp_path: Path
) -> None:
    server = start()
    client = client_of(server)
    fill(client)
    # From here on the WAL cannot grow: write() gives EFBIG, which SQLite calls an I/O error.
    size_bytes = (tmp_path / "sessions.db-wal").stat().st_size
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (size_bytes, size_bytes))
    with pytest.raises(OutcomeUnknownError, match="I/O error"):
        client.set_variable("s", "n", 2)
    assert server.wait(within(5)) == 70
    assert re.search(
        r"^error: the storage of sessions\.db failed, so the server ended: .*I/O", server.stderr_tail, re.M
    )
    assert "Traceback" not in server.stderr_tail
    assert client_of(start()).get_value("s", "n") == 1


@pytest.mark.parametrize(("suffix", "what"), [("", "removed or renamed"), ("-wal", "removed or renamed")])
def test_a_file_that_goes_while_it_is_served_ends_the_server(
    start: Start, client_of: Callable[..., StateProvider], tmp_path: Path, suffix: str, what: str
) -> None:
    server = start()
    fill(client_of(server))
    (tmp_path / f"sessions.db{suffix}").unlink()
    assert server.wait(within(10)) == 70
    error = f"error: the storage of sessions.db failed, so the server ended: .*sessions.db{suffix} was {what}"
    assert re.search(error, server.stderr_tail)
    assert "what was acknowledged is safe" not in server.stderr_tail
    assert "Traceback" not in server.stderr_tail


def test_storage_that_fails_in_the_drain_is_one_sentence(start: Start, client_of: Callable[..., StateProvider]) -> None:
    server = start()
    fill(client_of(server))
    # The WAL, which holds everything, cannot be brought into the file.
    resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (100, 100))
    server.send_signal(signal.SIGTERM)
    assert server.wait(DEADLINE_S) == 70
    assert (
        "error: the storage of sessions.db failed, so the server ended: the write-ahead log of sessions.db could not "
        "be moved into the file" in server.stderr_tail
    )
    assert "Traceback" not in server.stderr_tail
    assert client_of(start()).get_value("s", "n") == 1


def test_storage_that_fails_ends_the_process_even_if_the_event_loop_is_stuck() -> None:
    script = (
        "import asyncio, threading; from dspex_persist.wiring.ending import ServerEnd;"
        "end = ServerEnd(asyncio.new_event_loop(), 'a.db');"
        "end.on_storage_failed(OSError('the disk is gone')); threading.Event().wait()"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=within(60), check=False
    )
    assert result.returncode == 70
    assert "the disk is gone" in result.stdout + result.stderr


# --- connect ---


def test_connect_opens_a_file_by_path_and_by_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for url in (tmp_path / "a.db", str(tmp_path / "a.db"), "a.db", "sqlite:///a.db", f"sqlite:///{tmp_path / 'a.db'}"):
        with connect(url, durability="normal", sweep_interval_s=5) as state:
            view = state.initialize_session("s")
        assert view.resumed is (url != tmp_path / "a.db")
    assert sorted(path.name for path in tmp_path.glob("*.db")) == ["a.db"]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "sqlite:///",
        "sqlite://a.db",
        "grpc://localhost",
        "grpc://:1",
        "grpc+unix:",
        "http://a:1",
        "grpc:a:1",
    ],
)
def test_connect_refuses_other_addresses(url: str) -> None:
    with pytest.raises(InvalidArgumentError, match=r"a path, sqlite:///PATH, .* or grpc\+unix:/PATH"):
        connect(url)


@pytest.mark.parametrize(
    ("url", "meant"),
    [
        ("127.0.0.1:50051", "grpc://127.0.0.1:50051"),
        ("localhost:50051", "grpc://localhost:50051"),
        ("[::1]:50051", "grpc://[::1]:50051"),
        ("my-host.example:1", "grpc://my-host.example:1"),
        (":50051", "grpc://127.0.0.1:50051"),
        ("grcp://127.0.0.1:50051", "'grpc://127.0.0.1:50051'"),
        ("gprc://shop", "'grpc://HOST:PORT'"),
        ("grpc+unx:/run/s.sock", "'grpc+unix:/run/s.sock'"),
        ("sqllite:///s.db", "'sqlite:///s.db'"),
        ("127.0.0.1:50051/", "grpc://127.0.0.1:50051"),
        ("grpc://127.0.0.1:50051/", "grpc://127.0.0.1:50051"),
        ("GRPC://127.0.0.1:50051/", "grpc://127.0.0.1:50051"),
        ("http://localhost:50051", "grpc://localhost:50051"),
        ("grpc:localhost:50051", "grpc://localhost:50051"),
        ("unix:/run/dspex.sock", "grpc+unix:/run/dspex.sock"),
        ("UNIX:/run/dspex.sock", "grpc+unix:/run/dspex.sock"),
    ],
)
def test_connect_creates_no_file_for_the_address_of_a_server(
    url: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for ask in (connect, dspex_persist.open_audit):
        with pytest.raises(InvalidArgumentError) as error:
            ask(url)
        assert str(error.value).endswith(f"did you mean {meant}?")
    assert not list(tmp_path.iterdir())
    with connect(Path(url.replace("/", "_"))) as state:  # A file may have any name.
        state.initialize_session("s")


@pytest.mark.parametrize("wrong", [b"a.db", 5, None])
def test_connect_says_what_an_address_is(wrong: Any) -> None:
    with pytest.raises(InvalidArgumentError, match=f"not {type(wrong).__name__}"):
        connect(wrong)


def test_wherever_a_server_is_named_its_url_will_do(tmp_path: Path) -> None:
    assert url_of("grpc://127.0.0.1:5") == url_of("127.0.0.1:5") == "grpc://127.0.0.1:5"
    assert url_of("grpc+unix:///run/a.sock") == url_of("unix:/run/a.sock") == "grpc+unix:/run/a.sock"
    with ServedDatabase(tmp_path / "a.db") as served, dspex_persist.BridgedState(served.url) as state:
        assert not state.initialize_session("s").resumed


def test_connect_refuses_unknown_options_and_bad_files(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="colour"):
        connect(tmp_path / "a.db", colour="blue")
    (tmp_path / "b.db").mkdir()
    with pytest.raises(NotADatabaseError):
        connect(tmp_path / "b.db")


def test_serve_refuses_a_listen_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="port 70000 is above 65535"):
        serve(dspex_persist.Settings(db=tmp_path / "a.db", listen="127.0.0.1:70000"))
    assert list(tmp_path.iterdir()) == []


# --- The command line itself ---


def commands_under(group: typer.core.TyperGroup, *path: str) -> Iterator[tuple[str, ...]]:
    yield path
    for name, command in group.commands.items():
        if isinstance(command, typer.core.TyperGroup):
            yield from commands_under(command, *path, name)
        else:
            yield (*path, name)


def all_commands() -> list[tuple[str, ...]]:
    root = typer.main.get_command(cli.app)
    assert isinstance(root, typer.core.TyperGroup)
    return list(commands_under(root))


@pytest.mark.parametrize("command", all_commands(), ids=" ".join)
def test_every_command_has_help_that_fits_and_says_something(command: tuple[str, ...]) -> None:
    result = CliRunner().invoke(cli.app, [*command, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0
    assert max(map(len, result.output.splitlines())) <= 80
    usage, _, rest = result.output.partition("[OPTIONS]")
    assert "Usage: " in usage
    description = rest.partition("╭")[0]
    assert len(description.split()) > 4, result.output


def test_there_are_the_commands_that_the_readme_names() -> None:
    expected = {("serve",), ("demo",), ("db", "check"), ("db", "current"), ("db", "upgrade"), ("db", "backup")}
    assert expected <= set(all_commands())


def test_version_and_help_as_a_process(tmp_path: Path) -> None:
    result = run("--version", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, f"dspex-persist {dspex_persist.__version__}\n")
    assert run("--help", cwd=tmp_path).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys, dspex_persist.cli; print(sorted({'grpc', 'sqlalchemy', 'pydantic', 'alembic'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=within(60), check=True
    )
    assert result.stdout == "[]\n"


def test_the_package_imports_nothing_heavy_and_has_its_names() -> None:
    script = (
        "import sys, dspex_persist; print(sorted({'grpc', 'sqlalchemy', 'pydantic'} & set(sys.modules)));"
        "print([name for name in dspex_persist.__all__ if getattr(dspex_persist, name, None) is None])"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=within(60), check=True
    )
    assert result.stdout == "[]\n[]\n"


def test_a_client_imports_no_shell_and_no_log_output() -> None:
    """The rules take only what compiles from the package of CEL, which stays usable."""
    script = (
        "import sys, dspex_persist.wiring.serving; from dspex_persist.state.rules import compile_expression;"
        "program = compile_expression('a <= b').program;"
        "print(sorted({'prompt_toolkit', 'structlog', 'grpc', 'sqlalchemy'} & set(sys.modules)));"
        "import cel; print(type(program) is cel.Program)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=within(60), check=True
    )
    assert result.stdout == "[]\nTrue\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["serv"], "Did you mean 'serve'?"),
        (["serve", "--listn", "x"], "--listen"),
        (["demo", "extra"], "unexpected extra argument"),
    ],
)
def test_wrong_usage_says_what_was_meant(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.replace("│", " ").split())


def test_an_error_of_ours_at_start_shows_no_traceback(start: Start, tmp_path: Path) -> None:
    (tmp_path / "sessions.db").mkdir()
    with pytest.raises(ProcessFailedError) as caught:
        start()
    assert caught.value.exit_code == 5
    assert caught.value.stderr_tail == "error: cannot open sessions.db: Is a directory"


AFTERWARDS = """
import sys, threading
import dspex_persist
from dspex_persist.settings import Settings
from dspex_persist.state.embedded import SqliteState

dspex_persist.serve(Settings(db=sys.argv[1], listen="127.0.0.1:0"))
with SqliteState(sys.argv[1]) as state:
    write_group = state._writer._write_group
    def tell(jobs, *, wait=True):
        print(threading.current_thread().name)
        return write_group(jobs, wait=wait)
    state._writer._write_group = tell
    state.initialize_session("s")
"""


def test_after_serving_ctrl_c_interrupts_no_group_of_the_process(tmp_path: Path) -> None:
    """The server's loop took the signals only while it served."""
    argv = [sys.executable, "-c", AFTERWARDS, str(tmp_path / "s.db")]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("GRPC_READY:")
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=DEADLINE_S)[0] == "dspex-persist-writer\n"
