"""dspex-persist get, set, watch, call, sessions: on a server, on a file, and on a file that a server has open."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from dspex_persist import cli
from dspex_persist.infra.process import ServerProcess
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.model import REASON
from dspex_persist.wiring.connecting import connect
from tests.deadline import within
from tests.end_to_end.old_style import Gate, environment, serve, target_of
from tests.end_to_end.test_db_commands import FAILED, FINE, IN_USE, UNUSABLE, USAGE, assert_one_sentence, document_of
from tests.prepared import Started

TOOLS = "tests.end_to_end.served_tools"
CONFLICT, UNFINISHED = 7, 8

Result: TypeAlias = subprocess.CompletedProcess[str]
Run: TypeAlias = Callable[..., Result]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with serve(tmp_path_factory.mktemp("served") / "sessions.db", "--tools", TOOLS) as started:
        yield started


@pytest.fixture(params=["server", "file"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The options that name a server, or a file."""
    if request.param == "file":
        return ["--db", str(tmp_path / "sessions.db")]
    return ["--target", target_of(request.getfixturevalue("server"))]


@pytest.fixture
def session(request: pytest.FixtureRequest) -> str:
    """A session of the test's own."""
    return re.sub(r"\W+", "-", request.node.name)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command within this process, which takes a tenth of the time."""
    for name in [name for name in os.environ if name.startswith("DSPEX_PERSIST_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, text: bytes = b"") -> Result:
        monkeypatch.setattr(sys, "argv", ["dspex-persist", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        stdout, stderr = capsys.readouterr()
        return Result(arguments, int(ended.value.code or 0), stdout, stderr)

    return run


def state_of(place: list[str]) -> Any:
    option, where = place
    return connect(f"grpc://{where}" if option == "--target" else where)


def fine(result: Result) -> str:
    assert (result.returncode, result.stderr) == (FINE, "")
    return result.stdout


# set and get


def test_a_value_is_set_and_read(place: list[str], session: str, run: Run) -> None:
    assert fine(run("set", session, "temperature", "0.7", "--create", *place)) == (
        "temperature = 0.7  (v0, new, float)\n"
    )
    words = ("--why", "too creative", "--actor", "ann")
    assert fine(run("set", session, "temperature", "0.3", *words, *place)) == "temperature = 0.3  (v1, was 0.7)\n"
    assert fine(run("get", session, "temperature", *place)) == "0.3\n"
    with state_of(place) as state:
        newest, _ = state.get_variable_history(session, "temperature")
    assert (newest.actor, newest.metadata[REASON]) == ("ann", "too creative")


@pytest.mark.parametrize(
    ("text", "options", "type_name", "value"),
    [
        ("3", [], "integer", 3),
        ("3", ["--type", "float"], "float", 3.0),
        ("3", ["--type", "string"], "string", "3"),
        ("-3", [], "integer", -3),
        ("-0.5", [], "float", -0.5),
        ("Infinity", ["--type", "float"], "float", "Infinity"),
        ("true", [], "boolean", True),
        ("[1, 2]", [], "list", [1, 2]),
        ("[1, 2]", ["--type", "embedding"], "embedding", [1.0, 2.0]),
        ('{"a": 1}', [], "map", {"a": 1}),
        ("two words", [], "string", "two words"),
        ('"quoted"', ["--type", "string"], "string", '"quoted"'),
        ("null", [], "string", "null"),
        ("", [], "string", ""),
    ],
)
def test_texts_become_values(text: str, options: list[str], type_name: str, value: object, run: Run) -> None:
    document = document_of(run("set", "s", "x", text, "--create", *options, "--json"))
    assert (document["ok"], document["type"], document["value"]) == (True, type_name, value)
    assert (document["created"], document["version"]) == (True, 0)
    # Now the type of the variable says how the text is read.
    again = document_of(run("set", "s", "x", text, "--json"))
    assert (again["value"], again["before"], again["version"], again["created"]) == (value, value, 1, False)


def test_a_value_comes_from_standard_input(run: Run) -> None:
    fine(run("set", "s", "prompt", "-", "--create", text="Be brief.\nAnswer in German: größer\n".encode()))
    assert fine(run("get", "s", "prompt")) == "Be brief.\nAnswer in German: größer\n"
    assert_one_sentence(run("set", "s", "prompt", "-", text=b"\xff"), FAILED)


def test_get_prints_a_table_or_one_object(place: list[str], session: str, run: Run) -> None:
    for name, text in (("temperature", "0.7"), ("prompt", "Be brief."), ("prompt_2", "Be kind.")):
        fine(run("set", session, name, text, "--create", *place))
    lines = fine(run("get", session, *place)).splitlines()
    assert [line.split()[0] for line in lines if "─" not in line] == ["variable", "temperature", "prompt", "prompt_2"]
    table = fine(run("get", session, "prompt*", *place))
    assert '"Be brief."' in table
    assert "temperature" not in table
    document = document_of(run("get", session, "prompt_2", "temp*", "--json", *place))
    assert [(each["name"], each["value"]) for each in document["variables"]] == [
        ("prompt_2", "Be kind."),
        ("temperature", 0.7),
    ]


def test_sensitive_values_are_masked(place: list[str], session: str, run: Run) -> None:
    with state_of(place) as state:
        state.initialize_session(session)
        state.register_variable(session, "key", "string", "hush", metadata={"sensitive": "true"})
    assert "hush" not in fine(run("get", session, *place))
    assert "add --reveal to print its value" in assert_one_sentence(run("get", session, "key", *place), FAILED)
    (masked,) = document_of(run("get", session, "--json", *place))["variables"]
    assert (masked["masked"], masked["value"]) == (True, None)
    assert fine(run("get", session, "key", "--reveal", *place)) == "hush\n"
    assert "hush" not in fine(run("set", session, "key", "hush!", *place))


def test_pairs_are_answered_with_the_command_that_was_meant(place: list[str], session: str, run: Run) -> None:
    fine(run("set", session, "temperature", "0.3", "--create", *place))
    for words, code, command in (
        (("temperature=0.7",), USAGE, f"set {session} temperature 0.7"),
        (("temperature=0.7", "--create"), USAGE, f"set {session} temperature 0.7"),
        (("a=1", "b=2", "c=3"), USAGE, f"set {session} a 1"),
        (("temperature=-1", "b=2", "--create"), FAILED, f"set {session} temperature -- -1"),
        (("text=two words", "b=2"), FAILED, f"set {session} text 'two words'"),
    ):
        result = run("set", session, *words, *place)
        assert result.returncode == code, result
        printed = " ".join(result.stderr.replace("│", " ").split())
        assert "as two words" in printed
        assert f"dspex-persist {command}" in printed
    with state_of(place) as state:
        state.register_variable(session, "a=b", "integer", 1)
    assert fine(run("set", session, "a=b", "2", *place)) == "a=b = 2  (v1, was 1)\n"
    assert fine(run("set", session, "equation", "y=2x", "--create", *place)) == 'equation = "y=2x"  (v0, new, string)\n'


def test_a_pair_creates_no_file(run: Run, tmp_path: Path) -> None:
    assert_one_sentence(run("set", "s", "x=1", "y=2", "--create", "--db", "new.db"), FAILED)
    assert not (tmp_path / "new.db").exists()


def test_errors_say_what_to_do(place: list[str], session: str, run: Run) -> None:
    fine(run("set", session, "temperature", "0.7", "--create", *place))
    for words, sentence in (
        (("get", session, "temprature"), "did you mean 'temperature'?"),
        (("set", session, "temprature", "1"), "did you mean 'temperature'?"),
        (("get", f"{session}x"), f"did you mean '{session}'?"),
        (("set", f"{session}x", "y", "1"), f"did you mean '{session}'?"),
        (("set", session, "temperature", "warm"), 'a float is a number, "NaN", "Infinity" or "-Infinity", not "warm"'),
        (("set", session, "temperature", "1", "--expected-version", "7"), "expected version 7, current version is 0"),
        (
            ("set", session, "temperature", "1", "--type", "map"),
            "invalid --type: temperature is a variable of the type",
        ),
        (("set", session, "x", "[1", "--type", "list", "--create"), "a list is written as JSON, and this is not JSON"),
        (("set", session, "x", "1", "--type", "flaot", "--create"), "unknown type 'flaot'"),
    ):
        assert sentence in assert_one_sentence(run(*words, *place), FAILED)
    assert fine(run("get", session, "temperature", *place)) == "0.7\n"


def test_what_is_missing_is_only_created_on_request(tmp_path: Path, run: Run) -> None:
    assert_one_sentence(run("set", "s", "x", "1"), UNUSABLE)
    assert list(tmp_path.iterdir()) == []
    fine(run("set", "s", "x", "1", "--create"))
    assert "--create" in assert_one_sentence(run("set", "another one", "x", "1"), FAILED)
    assert "did you mean" not in assert_one_sentence(run("set", "s", "temperature", "1"), FAILED)


def test_a_file_that_a_server_has_open(run: Run, tmp_path: Path) -> None:
    with EmbeddedState(tmp_path / "sessions.db") as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 1)
    with serve(tmp_path / "sessions.db") as server:
        assert fine(run("get", "s", "x")) == "1\n"
        assert "s" in fine(run("sessions", "list"))
        for words in (("set", "s", "x", "2"), ("call", "s", "add"), ("sessions", "end", "s")):
            sentence = assert_one_sentence(run(*words), IN_USE)
            assert f"is in use by process {server.pid}, the server at {target_of(server)}: " in sentence
            assert f"reach it with --target {target_of(server)}" in sentence
        fine(run("set", "s", "x", "2", "--target", target_of(server)))
        assert fine(run("get", "s", "x")) == "2\n"
    without = run("call", "s", "add")
    assert (without.returncode, "a database has no tools" in without.stderr) == (USAGE, True)


def test_one_place_at_a_time(run: Run) -> None:
    for words in (("get", "s"), ("set", "s", "x", "1"), ("watch", "s"), ("call", "s", "t"), ("sessions", "list")):
        assert run(*words, "--db", "x.db", "--target", "127.0.0.1:1").returncode == USAGE
    assert run("call", "s", "t", "--tools", TOOLS, "--target", "127.0.0.1:1").returncode == USAGE


@pytest.mark.parametrize("words", [(), ("get",), ("sessions",), ("sessions", "end"), ("audit", "history")])
def test_both_names_of_the_help_option(words: tuple[str, ...], run: Run) -> None:
    short, long = (run(*words, option) for option in ("-h", "--help"))
    assert fine(short) == fine(long)
    assert "Usage: dspex-persist" in short.stdout


# call


@pytest.fixture
def tools(place: list[str]) -> list[str]:
    """The options that name a place with tools."""
    return place if place[0] == "--target" else [*place, "--tools", TOOLS]


def test_a_tool_is_called(tools: list[str], place: list[str], session: str, run: Run) -> None:
    fine(run("set", session, "a", "1", "--create", *place))
    assert fine(run("call", session, "add", "name=a", "amount=2", "--why", "a gift", "--actor", "ann", *tools)) == "3\n"
    with state_of(place) as state:
        newest, _ = state.get_variable_history(session, "a")
    assert (newest.actor, newest.metadata[REASON]) == ("ann", "a gift")
    first, second = (document_of(run("call", session, "add", "name=a", "--key", "k", "--json", *tools)) for _ in "12")
    assert (first["ok"], first["status"], first["result"], first["repeated"]) == (True, "committed", 4, False)
    assert (second["execution_id"], second["repeated"]) == (first["execution_id"], True)


def test_arguments_are_read_by_the_types_of_the_parameters(tools: list[str], place: list[str], run: Run) -> None:
    fine(run("set", "arguments", "a", "1", "--create", *place))
    words = ("city=7", "days=7", "scale=f", "ratio=7", "wet=true", 'tags=["x"]', 'extra={"a": 1}')
    assert document_of(run("call", "arguments", "describe", *words, "--json", *tools))["result"] == {
        "city": ["str", "7"],
        "days": ["int", 7],
        "scale": ["str", "f"],
        "ratio": ["float", 7.0],
        "wet": ["bool", True],
        "tags": ["list", ["x"]],
        "extra": ["dict", {"a": 1}],
    }
    assert fine(run("call", "arguments", "echo", "value=[1, 2]", *tools)) == "[1, 2]\n"
    assert fine(run("call", "arguments", "echo", "value=1, 2", *tools)) == "1, 2\n"
    assert fine(run("call", "arguments", "echo", "value=a=b", *tools)) == "a=b\n"


def test_a_stream_is_printed_as_it_comes(tools: list[str], place: list[str], run: Run) -> None:
    fine(run("set", "streams", "a", "0", "--create", *place))
    assert fine(run("call", "streams", "count", "to=3", "name=a", *tools)) == "1\n2\n3\n"
    assert fine(run("get", "streams", "a", *place)) == "3\n"
    assert document_of(run("call", "streams", "count_later", "to=1", "--json", *tools))["result"] == [{"n": 1}]


def test_a_call_that_fails(tools: list[str], place: list[str], run: Run, tmp_path: Path) -> None:
    fine(run("set", "failures", "a", "0", "--create", *place))
    for words, code, sentence in (
        (("fail",), FAILED, ""),
        (("ad", "name=a"), FAILED, "did you mean add?"),
        (("add", "nam=a"), USAGE, "did you mean 'name'?"),
        (("add", "name=a", "amount=many"), USAGE, 'an integer is a whole number, not "many"'),
        (("slow_later", f"gate={tmp_path}", "--timeout", "0.2"), UNFINISHED, "timed out"),
    ):
        result = run("call", "failures", *words, *tools)
        assert sentence in assert_one_sentence(result, code)
        document = document_of(failed := run("call", "failures", *words, "--json", *tools))
        assert (failed.returncode, document["ok"]) == (code, False)
        assert sentence in document["error"]
    assert run("call", "failures", "add", "amount", *tools).returncode == USAGE
    assert run("call", "failures", "add", "name=a", "name=b", *tools).returncode == USAGE


def test_a_call_that_conflicts(server: ServerProcess, run: Run, tmp_path: Path) -> None:
    gate, place = Gate(tmp_path / "gate"), ["--target", target_of(server)]
    fine(run("set", "conflicts", "a", "1", "--create", *place))
    argv = [sys.executable, "-m", "dspex_persist", "call", "conflicts", "add_at_gate", f"gate={gate}", *place]
    with subprocess.Popen(
        argv, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as calling:
        gate.wait()
        fine(run("set", "conflicts", "a", "5", *place))
        gate.open()
        out, err = calling.communicate(timeout=within(30))
    assert (calling.returncode, out) == (CONFLICT, "")
    assert err.startswith("error: conflict: meanwhile others changed a ")
    assert fine(run("get", "conflicts", "a", *place)) == "5\n"


# sessions


def test_sessions_are_listed_and_ended(place: list[str], session: str, run: Run) -> None:
    ids = [f"{session}-{number}" for number in range(3)]
    for each in ids:
        fine(run("set", each, "x", "1", "--create", *place))
    fine(run("set", ids[1], "x", "2", *place))
    listed = document_of(run("sessions", "list", f"{session}-*", "--json", *place))["sessions"]
    assert [each["session_id"] for each in listed] == [ids[1], ids[2], ids[0]]
    assert [each["variables"] for each in listed] == [1, 1, 1]
    assert ids[0] in fine(run("sessions", "list", *place))

    assert f"did you mean '{ids[0]}'?" in assert_one_sentence(
        run("sessions", "end", ids[1], f"x{ids[0]}", *place), FAILED
    )
    assert fine(run("sessions", "end", ids[1], ids[2], "--actor", "ann", *place)) == (
        f"session {ids[1]} ended, with 1 variable\nsession {ids[2]} ended, with 1 variable\n"
    )
    assert len(document_of(run("sessions", "list", f"{session}-*", "--json", *place))["sessions"]) == 1


def test_a_session_that_has_ended(place: list[str], run: Run) -> None:
    fine(run("set", "gone", "x", "1", "--create", *place))
    fine(run("sessions", "end", "gone", *place))
    for words in (("get", "gone"), ("set", "gone", "x", "1"), ("watch", "gone"), ("sessions", "end", "gone")):
        assert assert_one_sentence(run(*words, *place), FAILED).startswith("error: session not found: 'gone'; ")


# watch


class Watching:
    """`dspex-persist watch` as a process."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        argv = [sys.executable, "-m", "dspex_persist", "watch", *arguments]
        self._process = Started(
            argv, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def line(self) -> str:
        """Wait for the next line."""
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def document(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.line())
        return document

    def complaint(self) -> str:
        """Wait for the next line on stderr."""
        assert self._process.stderr is not None
        return self._process.stderr.readline()

    def interrupt(self) -> None:
        """Press Ctrl-C."""
        self._process.send_signal(signal.SIGINT)

    def end(self) -> tuple[int, str, str]:
        """Wait for its end; return the exit code and the rest of its output."""
        out, err = self._process.communicate(timeout=within(30))
        return self._process.returncode, out, err

    def __enter__(self) -> "Watching":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.communicate()


def test_changes_are_printed_as_they_come(place: list[str], session: str, run: Run, tmp_path: Path) -> None:
    fine(run("set", session, "temperature", "0.7", "--create", *place))
    fine(run("set", session, "prompt", "Be brief.", "--create", *place))
    with (
        Watching(tmp_path, session, "temp*", *place) as watching,
        Watching(tmp_path, session, "--json", *place) as all_,
    ):
        assert re.fullmatch(r"\d\d:\d\d:\d\d  temperature = 0.7  v0\n", watching.line())
        assert [all_.document()["kind"] for _ in "12"] == ["initial", "initial"]
        fine(run("set", session, "prompt", "Be kind.", *place))
        fine(run("set", session, "temperature", "0.3", "--why", "too hot", "--actor", "ann", *place))
        assert watching.line()[10:] == 'temperature = 0.3  v1  was 0.7  by ann  "too hot"\n'
        change, _ = all_.document(), all_.document()
        assert (change["name"], change["value"], change["version"], change["kind"]) == ("prompt", "Be kind.", 1, "set")
        assert change["previous"] == "Be brief."
        fine(run("set", session, "new", "1", "--create", *place))
        assert all_.document()["kind"] == "registered"
        watching.interrupt()
        assert watching.end() == (FINE, "", "")
        fine(run("sessions", "end", session, *place))
        assert all_.end() == (FINE, "", f"session {session} has ended\n")


def test_a_watch_waits_for_one_change(place: list[str], session: str, run: Run, tmp_path: Path) -> None:
    fine(run("set", session, "done", "false", "--create", *place))
    fine(run("set", session, "x", "1", "--create", *place))
    with Watching(tmp_path, session, "--limit", "1", "--json", "done", *place) as watching:
        assert watching.document()["kind"] == "initial"
        fine(run("set", session, "x", "2", *place))
        fine(run("set", session, "done", "true", *place))
        code, out, _ = watching.end()
        assert (code, json.loads(out)["value"]) == (FINE, True)
    assert "did you mean 'done'?" in assert_one_sentence(run("watch", session, "dne", *place), FAILED)


def test_a_watch_goes_on_after_a_commit(place: list[str], session: str, run: Run, tmp_path: Path) -> None:
    fine(run("set", session, "x", "0", "--create", *place))
    fine(run("sessions", "end", session, *place))
    fine(run("set", session, "x", "1", "--create", *place))
    # From the beginning, but nothing of an earlier session of this id.
    with Watching(tmp_path, session, "--since", "0", "--limit", "1", "--json", *place) as watching:
        first = watching.document()
        assert (first["value"], first["kind"]) == (1, "registered")
    fine(run("set", session, "x", "2", *place))
    with Watching(tmp_path, session, "--since", str(first["sequence"]), "--json", *place) as watching:
        assert watching.document()["value"] == 2
        fine(run("set", session, "x", "3", *place))
        assert watching.document()["value"] == 3
    refused = assert_one_sentence(run("watch", session, "--since", "999", *place), USAGE)
    assert "invalid --since: 999 is not between 0 and the store's last commit" in refused


def test_a_watch_goes_on_after_a_restart(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "sessions.db"
    with serve(path) as first:
        place = ["--target", target_of(first)]
        fine(run("set", "s", "x", "1", "--create", *place))
        with Watching(tmp_path, "s", *place) as of_server, Watching(tmp_path, "s") as of_file:
            assert [watching.line()[10:] for watching in (of_server, of_file)] == ["x = 1  v0\n"] * 2
            first.kill()
            assert of_server.complaint().startswith("waiting: unavailable: ")
            with EmbeddedState(path) as state:
                state.set_variable("s", "x", 2)
            with serve(path, "--listen", target_of(first)) as second, BridgedState(target_of(second)) as state:
                state.set_variable("s", "x", 3)
                for watching in (of_server, of_file):
                    assert [watching.line()[10:19] for _ in "12"] == ["x = 2  v1", "x = 3  v2"]
