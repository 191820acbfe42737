"""Every command in all kinds of shells: no traceback, and an exit code that docs/exit-codes.md has.

Each command in each of them is thorough; `make test` has each command in every second one, and so each of them with
every second command.
"""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import typer

from dspex_persist import Context, cli, connect
from dspex_persist.infra.process import ServerProcess
from tests.prepared import commands

PROGRAM = (sys.executable, "-m", "dspex_persist")
DEADLINE_S = 60
ROOT = Path(__file__).parents[2]
CODES = {int(code) for code in re.findall(r"^\| ([0-9]+) \|", (ROOT / "docs/exit-codes.md").read_text(), re.M)}

# What each command is asked for; "DB" and "NEW" are a file that is there and one that is not.
COMMANDS: dict[str, list[str]] = {
    # A setting that cannot be: that it serves is another test's concern.
    "serve": ["--db", "DB", "--listen", "nowhere"],
    "worker": ["--help"],
    "health": ["--target", "127.0.0.1:1"],
    "workers": ["--target", "127.0.0.1:1"],
    "protocol": [],
    "demo": ["--help"],
    "replay": ["DB.jsonl", "--tools", "nothing_here"],
    "get": ["é✓", "--db", "DB"],
    "set": ["é✓", "größe", "-", "--create", "--db", "NEW"],
    "watch": ["nothing", "--db", "DB"],
    "call": ["é✓", "nothing", "größe=1", "--db", "DB"],
    "sessions list": ["--db", "DB"],
    "sessions end": ["nothing", "--db", "DB"],
    "db check": ["--db", "DB"],
    "db current": ["--db", "DB"],
    "db upgrade": ["--db", "DB"],
    "db backup": ["NEW", "--db", "DB"],
    "db restore": ["DB", "--db", "NEW"],
    "db stats": ["--db", "DB"],
    "db prune": ["--db", "DB", "--keep-versions", "1"],
    "db vacuum": ["--db", "DB"],
    "session show": ["é✓", "--db", "DB"],
    "session export": ["é✓", "--db", "DB", "-o", "-"],
    "session import": ["DB.jsonl", "--db", "NEW"],
    "session fork": ["é✓", "NEW", "--db", "DB"],
    "session migrate": ["nothing_here", "--db", "DB"],
    "tools list": ["--tools", "nothing_here"],
    "tools unregister": ["é✓", "--session", "é✓", "--target", "127.0.0.1:1"],
    "token new": ["checkout", "--scopes", "read", "--token-file", "NEW"],
    "token list": ["--token-file", "NEW"],
    "token revoke": ["checkout", "--token-file", "NEW"],
    "audit compare": ["exec_1", "exec_2", "--db", "DB"],
    "audit history": ["é✓", "--db", "DB"],
    "audit executions": ["--db", "DB"],
    "audit commits": ["--db", "DB"],
    "audit sessions": ["--db", "DB"],
    "audit show": ["exec_1", "--db", "DB"],
    "audit state": ["é✓", "--db", "DB"],
    "audit diff": ["é✓", "--from", "1", "--db", "DB"],
    "audit blame": ["é✓", "--db", "DB"],
    "audit usage": ["--db", "DB"],
    "audit denials": ["--db", "DB"],
    "audit verify": ["--db", "DB"],
    "audit report": ["é✓", "--db", "DB", "-o", "-"],
    "audit web": ["--db", "NEW"],
    "program diff": ["é✓", "program", "1", "2", "--db", "DB"],
    "program history": ["é✓", "program", "--db", "DB"],
    "program list": ["é✓", "--db", "DB"],
    "program rollback": ["é✓", "program", "1", "--db", "DB"],
    "program show": ["é✓", "program", "--db", "DB"],
    "program tag": ["é✓", "program", "best", "1", "--db", "DB"],
}


def names_of(command: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    if not hasattr(command, "commands"):
        yield " ".join(path)
        return
    for name, each in command.commands.items():
        yield from names_of(each, (*path, name))


def test_every_command_is_here() -> None:
    assert sorted(names_of(typer.main.get_command(cli.app))) == sorted(COMMANDS)


@dataclass
class Shell:
    """How a command is started: its streams (None: closed), the terminal's encoding, words that come on top."""

    stdin: str | None = os.devnull
    stdout: str | None = "out"
    stderr: str | None = "err"
    encoding: str = "utf-8"
    words: Sequence[bytes] = ()
    db: str | None = None
    codes: frozenset[int] = field(default_factory=frozenset)
    """The exit codes that every command may have; empty: any documented one."""


SHELLS = {
    "as usual": Shell(),
    "not UTF-8": Shell(encoding="ascii"),
    "a word that is not UTF-8": Shell(words=[b"\xff"], codes=frozenset({2})),
    "an option that is not UTF-8": Shell(words=[b"--db", b"\xff.db"], codes=frozenset({2})),
    "a NUL device as file": Shell(db="/dev/null"),
    "a folder as file": Shell(db="."),
    ":memory: as file": Shell(db=":memory:"),
    "no room for stdout": Shell(stdout="/dev/full"),
    "no room for stderr": Shell(stderr="/dev/full"),
    "no room for both": Shell(stdout="/dev/full", stderr="/dev/full"),
    "stdout without a reader": Shell(stdout="pipe"),
    "both without a reader": Shell(stdout="pipe", stderr="pipe"),
    "stdin closed": Shell(stdin=None),
    "stdout closed": Shell(stdout=None),
    "stderr closed": Shell(stderr=None),
    "all closed": Shell(stdin=None, stdout=None, stderr=None),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database and a recording."""
    folder = tmp_path_factory.mktemp("shell")
    with connect(folder / "s.db") as state:
        Context("é✓", state).define("größe", "é✓\x1b[31m")
        state.set_variable("é✓", "größe", "zwei")
    argv = [*PROGRAM, "session", "export", "é✓", "--db", "s.db", "-o", "s.db.jsonl"]
    subprocess.run(argv, cwd=folder, check=True, capture_output=True, timeout=DEADLINE_S)
    return folder


def commands_in_shells() -> Iterator[Any]:
    for row, command in enumerate(COMMANDS):
        for column, shell in enumerate(SHELLS):
            marks = [pytest.mark.thorough] if (row + column) % 2 else []
            yield pytest.param(command, shell, marks=marks, id=f"{command}-{shell}")


@pytest.mark.parametrize(("command", "shell"), list(commands_in_shells()))
def test_no_traceback_and_a_code_that_is_documented(command: str, shell: str, place: Path, tmp_path: Path) -> None:
    how = SHELLS[shell]
    replaced = {
        "DB": how.db or str(place / "s.db"),
        "NEW": str(tmp_path / "new.db"),
        "DB.jsonl": str(place / "s.db.jsonl"),
    }
    words = [replaced.get(word, word) for word in COMMANDS[command]]
    code, out, err = run_forked([*command.split(), *words], how, tmp_path)
    assert "Traceback" not in out + err, err
    assert "Exception ignored" not in err
    assert code in CODES, (code, err)
    if how.codes and COMMANDS[command] != ["--help"]:
        assert code in how.codes, err
    if code not in (0, 141) and how.stderr == "err":
        assert err.strip(), "stderr is empty"


def options_of(name: str) -> list[Any]:
    command: Any = typer.main.get_command(cli.app)
    for word in name.split():
        command = command.commands[word]
    return [each for each in command.params if each.param_type_name == "option"]


def options_with(metavar: str) -> Iterator[tuple[str, str]]:
    for name in COMMANDS:
        yield from ((name, option.opts[-1]) for option in options_of(name) if option.metavar == metavar)


@pytest.mark.parametrize(("command", "option"), list(options_with("POINT")))
def test_what_is_no_point_is_wrong_usage(command: str, option: str, place: Path, tmp_path: Path) -> None:
    words = [
        {"DB": str(place / "s.db"), "DB.jsonl": str(place / "s.db.jsonl")}.get(word, word) for word in COMMANDS[command]
    ]
    code, _, err = run_forked([*command.split(), *words, option, "soon"], SHELLS["as usual"], tmp_path)
    assert code == 2, err


WITH_JSON = [name for name in COMMANDS if any("--json" in each.opts for each in options_of(name))]
WRONG = [*((name, "--nonsense", "--json") for name in WITH_JSON), ("audit", "nonsense", "--json"), ("get", "--json")]


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_wrong_usage_is_told_as_json_too(words: tuple[str, ...], tmp_path: Path) -> None:
    code, out, err = run_forked([each for word in words for each in word.split()], SHELLS["as usual"], tmp_path)
    assert (code, "Usage" in err) == (2, True), err
    document = json.loads(out)
    assert (document["ok"], list(document)) == (False, ["ok", "error"])
    assert "nonsense" in document["error"] or "SESSION" in document["error"]


@pytest.mark.parametrize("words", [("set", "s", "x", "--", "--json"), ("serve", "--json")], ids=" ".join)
def test_who_has_not_asked_for_json_gets_none(words: tuple[str, ...], tmp_path: Path) -> None:
    code, out, _ = run_forked(words, SHELLS["as usual"], tmp_path)
    assert (code > 0, out) == (True, "")


@pytest.mark.parametrize("command", WITH_JSON)
def test_an_address_that_is_none_is_told_as_json(command: str, tmp_path: Path) -> None:
    names = {name for each in options_of(command) for name in each.opts}
    option = next((each for each in ("--target", "--db", "--token-file") if each in names), "")
    words = [each for each in COMMANDS[command] if each not in ("--db", "--target", "--token-file", "DB", "NEW")]
    code, out, err = run_forked(
        [*command.split(), *words, *filter(None, (option, "/not/there")), "--json"], SHELLS["as usual"], tmp_path
    )
    assert code not in (0, 141), err
    document = json.loads(out)
    assert (document["ok"], bool(document["error"])) == (False, True)


def run_forked(words: Sequence[str], how: Shell, folder: Path) -> tuple[int, str, str]:
    """Run the command line in a fork that has imported it, as a new interpreter would."""
    env = {name: text for name, text in os.environ.items() if not name.startswith("DSPEX_PERSIST_")}
    with ExitStack() as stack:
        streams = [
            _opened(number, name, folder, stack) for number, name in enumerate((how.stdin, how.stdout, how.stderr))
        ]
        code = commands().start(
            [*(word.encode() for word in words), *how.words],
            streams,
            cwd=folder,
            env=env,
            timeout_s=DEADLINE_S,
            encoding=how.encoding,
        )
    files = [folder / name for name in ("out", "err")]
    out, err = (file.read_text(errors="replace") if file.exists() else "" for file in files)
    return code, out, err


def _opened(number: int, name: str | None, folder: Path, stack: ExitStack) -> int | None:
    """Open what the standard stream `number` is to be; `stack` closes it."""
    if name is None:
        return None
    if name == "pipe":
        reading, opened = os.pipe()
        os.close(reading)
    else:
        opened = os.open(folder / name, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    stack.callback(os.close, opened)
    return opened


# As processes of their own


def run(words: Sequence[str | bytes], **more: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*PROGRAM, *words], stderr=subprocess.PIPE, timeout=DEADLINE_S, check=False, **more)


def test_a_terminal_in_ascii_sees_escapes(place: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = run(["audit", "history", "é✓", "--db", str(place / "s.db")], stdout=subprocess.PIPE, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"gr\xf6\xdfe" in done.stdout


def test_a_word_that_is_no_utf8_is_named(place: Path) -> None:
    done = run(["audit", "history", "é✓", "--db", str(place / "s.db"), "--actor", b"a\xff"])
    assert (done.returncode, done.stderr) == (2, b"error: the argument a\\xff is not UTF-8: write it in UTF-8\n")


def test_output_that_cannot_be_written_is_a_failure(place: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = run(["audit", "history", "é✓", "--db", str(place / "s.db"), "--json"], stdout=full)
    assert done.returncode == 1
    assert done.stderr == b"error: the output cannot be written: No space left on device\n"


def test_head_is_no_failure_that_anybody_hears_of(place: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = run(["audit", "history", "é✓", "--db", str(place / "s.db")], stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full"])
def test_a_server_goes_on_without_its_streams(tmp_path: Path, closed: str) -> None:
    command = f'exec "$@" {closed}'
    address = f"unix:{tmp_path}/socket"
    argv = ["sh", "-c", command, "sh", *PROGRAM, "serve", "--db", str(tmp_path / "s.db"), "--listen", address]
    process = subprocess.Popen(argv, cwd=tmp_path)
    try:
        _await_server(process, address)
        with connect(f"grpc+{address}") as state:
            assert not state.initialize_session("s").resumed
        process.send_signal(signal.SIGTERM)
        assert process.wait(DEADLINE_S) == 0
    finally:
        process.kill()
        process.wait()
    with connect(tmp_path / "s.db") as state:
        assert state.initialize_session("s").resumed


def _await_server(process: subprocess.Popen[bytes], address: str) -> None:
    import grpc

    with grpc.insecure_channel(address) as channel:
        ready = grpc.channel_ready_future(channel)
        for _ in range(DEADLINE_S):
            try:
                ready.result(1)
            except grpc.FutureTimeoutError:
                assert process.poll() is None
            else:
                return
    raise AssertionError("it does not answer")


def test_a_server_continues_when_its_output_is_no_longer_read(tmp_path: Path) -> None:
    argv = [*PROGRAM, "serve", "--db", "s.db", "--listen", "127.0.0.1:0", "--log-level", "debug"]
    with ServerProcess(argv, cwd=tmp_path) as server:
        port = server.wait_ready(DEADLINE_S)
        # Its reading ends go; the process itself stays.
        server._output.close()
        with connect(f"grpc://127.0.0.1:{port}") as state:
            for number in range(5):
                state.initialize_session(f"s{number}")
        assert server.terminate(DEADLINE_S) == 0


# Help


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_no_noise(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, help_text, err = run_forked([*command.split(), "--help"], Shell(), tmp_path)
    assert (code, err) == (0, "")
    assert "<bool>" not in help_text
    assert "()" not in help_text
    assert "(they are told)" not in help_text
    assert not re.search(r"<[a-z_]+\|", help_text), "choices as a metavar are broken over lines"
