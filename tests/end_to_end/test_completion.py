"""Completion in real shells: a key is pressed in a terminal, and the name appears."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from dspex_persist import cli
from dspex_persist.cli import shells
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.store import names
from dspex_persist.wiring.connecting import connect
from tests.deadline import within
from tests.end_to_end.old_style import ROOT, environment, serve, target_of

SHELLS = {
    "bash": ("bash", "--norc", "--noprofile", "-i"),
    "zsh": ("zsh", "-f", "-i"),
    "fish": ("fish", "--no-config", "-i"),
}
# What a shell reads before its first prompt, with the script that the command prints.
BEGINNING = {
    "bash": "source {script}",
    "zsh": "autoload -U compinit; compinit -D; source {script}",
    "fish": "source {script}",
}
HEAVY = ("sqlalchemy", "alembic", "grpc", "pydantic_settings", "dspex_persist.wiring", "dspex_persist.state.embedded")


# Each begins with another letter.
SPECIAL = (
    *("it's", 'quo"te', "$HOME", "~root", "#hash", "back\\slash", "`tick`", "!bang", "ünï", "[a]*?", "-dash"),
    "{a,b}",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a database, and the command to complete."""
    folder = tmp_path_factory.mktemp("completion")
    with connect(folder / "sessions.db") as state:
        for session in ("knobs", "shop-1", "shop-2", "danger;$(touch oops)", "two words", "user:42", *SPECIAL):
            state.initialize_session(session)
        for name in ("temperature", "top_p", "prompt"):
            state.register_variable("knobs", name, "string", "")
        state.register_variable("two words", "it's a:name", "string", "")
        state.delete_variable("knobs", "prompt")
        state.cleanup_session("shop-2")
    (folder / "bin").mkdir()
    command = folder / "bin" / "dspex-persist"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dspex_persist "$@"\n')
    command.chmod(0o755)
    return folder


def around(folder: Path, **more: str) -> dict[str, str]:
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return environment(PATH=path, HOME=str(folder), TERM="xterm", PS1="$ ", **more)


Completed = Callable[..., list[str]]


@pytest.fixture
def completed(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Completed:
    """Returns what bash would be told for the last of some words, which it replaces as a whole, in this process."""
    for name in [name for name in os.environ if name.startswith("DSPEX_PERSIST_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setattr(sys, "argv", ["dspex-persist"])

    def completed(*words: str) -> list[str]:
        # What bash replaces begins after an open quote.
        replaced = words[-1].lstrip("'\"")
        asked = {"_DSPEX_PERSIST_LINE": " ".join(("dspex-persist", *words)), "_DSPEX_PERSIST_REPLACED": replaced}
        capsys.readouterr()
        with monkeypatch.context() as patch:
            for name, text in {"_DSPEX_PERSIST_COMPLETE": "complete_bash", **asked}.items():
                patch.setenv(name, text)
            with pytest.raises(SystemExit) as ended:
                cli.main()
        stdout, stderr = capsys.readouterr()
        assert (ended.value.code, stderr) == (0, "")
        files, *offers = stdout.splitlines()
        assert files == ""
        return offers

    return completed


def test_commands_and_options(completed: Completed) -> None:
    assert completed("se") == ["serve", "set", "sessions", "session"]
    assert completed("sessions", "") == ["list", "end"]
    assert completed("set", "knobs", "temperature", "1", "--w") == ["--why"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (("get", "kn"), ["knobs"]),
        # Not one that has ended.
        (("get", "s"), ["shop-1"]),
        # A shell would run or split these.
        (("get", "d"), [r"danger\;\$\(touch\ oops\)"]),
        (("get", "tw"), [r"two\ words"]),
        (("get", "'tw"), ["two words"]),
        (("get", '"dan'), [r"danger;\$(touch oops)"]),
        (("get", r"two\ words", ""), [r"it\'s\ a:name"]),
        (("get", "knobs", "t"), ["temperature", "top_p"]),
        (("get", "knobs", "temperature", "to"), ["top_p"]),
        (("set", "--db", "sessions.db", "knobs", ""), ["temperature", "top_p"]),
        (("watch", "knobs", "te"), ["temperature"]),
        (("audit", "history", "knobs", "te"), ["temperature"]),
        (("session", "export", "sh"), ["shop-1"]),
        (("sessions", "end", "sh"), ["shop-1"]),
        (("get", "--db=sessions.db", "kn"), ["knobs"]),
        (("get", "--db", "~/sessions.db", "kn"), ["knobs"]),
        (("get", "--db", '"$HOME"/sessions.db', "kn"), ["knobs"]),
        (("get", "--db", "nothing.db", ""), []),
        (("get", "--target", "nowhere", ""), []),
    ],
)
def test_names_of_a_file(folder: Path, completed: Completed, words: Sequence[str], offered: list[str]) -> None:
    before = sorted(folder.iterdir())
    assert completed(*words) == offered
    assert sorted(folder.iterdir()) == before


def test_names_of_a_server(completed: Completed, tmp_path: Path) -> None:
    with (
        serve(tmp_path / "sessions.db", "--tools", "tests.end_to_end.served_tools") as server,
        BridgedState(target_of(server)) as state,
    ):
        state.initialize_session("remote")
        state.register_variable("remote", "a", "integer", 0)
        state.execute_tool("remote", "add", {"name": "a"})
        place = ("--target", target_of(server))
        assert completed("get", *place, "r") == ["remote"]
        assert completed("get", *place, "remote", "") == ["a"]
        assert "echo" in completed("call", *place, "remote", "e")
        # The names in its file can be read meanwhile.
        assert names.live_sessions(tmp_path / "sessions.db", "") == ["remote"]
        assert names.variables(tmp_path / "sessions.db", "remote", "") == ["a"]
        assert names.tools(tmp_path / "sessions.db", "a") == ["add"]


def test_completing_names_of_a_file_imports_nothing_heavy(folder: Path) -> None:
    program = (
        "import sys; from dspex_persist import cli; sys.argv[1:] = []\n"
        "try: cli.main()\nexcept SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    asked = {"_DSPEX_PERSIST_LINE": "dspex-persist get knobs te", "_DSPEX_PERSIST_REPLACED": "te"}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=environment(_DSPEX_PERSIST_COMPLETE="complete_bash", **asked),
        capture_output=True,
        text=True,
        timeout=within(60),
        check=True,
    )
    assert done.stdout.split() == ["temperature", "[]"]


@pytest.mark.parametrize(
    ("line", "words", "last", "quote"),
    [
        ("d get kn", ("get",), "kn", ""),
        ("d get ", ("get",), "", ""),
        ("A=1 B='x y' d get k", ("get",), "k", ""),
        (r"d get two\ w", ("get",), "two w", ""),
        ("d get 'two w", ("get",), "two w", "'"),
        ("d get 'two words' \"it's", ("get", "two words"), "it's", '"'),
        (r'd get "a\$b\c', ("get",), r"a$b\c", '"'),
        ("d get us'er:'4", ("get",), "user:4", ""),
        ("d get '' x", ("get", ""), "x", ""),
        ("d get back\\", ("get",), "back", ""),
    ],
)
def test_a_line_is_split_as_a_shell_does(line: str, words: tuple[str, ...], last: str, quote: str) -> None:
    typed = shells.split(line)
    assert (typed.words, typed.last, typed.quote) == (words, last, quote)


@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_what_bash_inserts_is_the_name(monkeypatch: pytest.MonkeyPatch, quote: str) -> None:
    expected, words = [], []
    for name in (*SPECIAL, "danger;$(touch oops)", "two words", "user:42", "a&b|c<d>e(f)"):
        for place in range(len(name)):
            # Up to here it was typed, and the rest is inserted.
            begun = shells.quoted(name[:place], quote)
            monkeypatch.setenv("_DSPEX_PERSIST_REPLACED", begun)
            (inserted,) = shells.for_bash(shells.split(f"d get {quote}{begun}"), name)
            expected.append(name)
            words.append(f"{quote}{inserted}{quote}")
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {' '.join(words)}"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == expected


def test_options_and_files(folder: Path) -> None:
    import typer

    def offered(*words: str) -> tuple[list[str], bool]:
        offers, are_files = shells.offers_for(typer.main.get_command(cli.app), words[:-1], words[-1])
        return [offer.word for offer in offers], are_files

    assert offered("get", "--db", "se") == ([], True)
    assert offered("get", "--db=se") == ([], True)
    assert offered("db", "restore", "") == ([], True)
    assert offered("get", "knobs", "--db", "x.db", "--d") == ([], False)
    assert offered("watch", "s", "--s") == (["--since"], False)
    assert offered("get", "--", "--d") == ([], False)
    assert offered("nothing", "") == ([], False)
    assert offered("set", "s", "x", "") == ([], False)
    # No part of them is markup, and each has its sentence.
    abouts = [offer.about for offer in shells.offers_for(typer.main.get_command(cli.app), (), "")[0]]
    assert all(abouts)
    assert not any("[" in about for about in abouts)


# In a terminal


class Terminal:
    """An interactive shell."""

    def __init__(self, argv: Sequence[str], folder: Path) -> None:
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.chdir(folder)
            os.execvpe(argv[0], list(argv), around(folder))
        self._seen = ""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait_for(self, text: str) -> None:
        """Wait until this appears after what was waited for before."""
        deadline = time.monotonic() + within(60)
        while text not in self._seen:
            assert time.monotonic() < deadline, f"no {text!r} in {self._seen!r}"
            if select.select([self._terminal], [], [], 0.1)[0]:
                self._seen += os.read(self._terminal, 65_536).decode(errors="replace")
        self._seen = self._seen.split(text, 1)[1]

    def close(self) -> None:
        with suppress(OSError):
            os.close(self._terminal)
        with suppress(ProcessLookupError):
            os.kill(self._pid, 9)
        os.waitpid(self._pid, 0)


@pytest.fixture(params=SHELLS)
def shell(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    return name


@pytest.fixture
def open_terminal(shell: str, folder: Path) -> Iterator[Callable[[], Terminal]]:
    opened: list[Terminal] = []

    def open_() -> Terminal:
        opened.append(Terminal(SHELLS[shell], folder))
        return opened[-1]

    yield open_
    for each in opened:
        each.close()


def test_a_key_completes_names(shell: str, folder: Path, open_terminal: Callable[[], Terminal]) -> None:
    script = folder / f"completion.{shell}"
    with script.open("w") as output:
        subprocess.run(
            [folder / "bin" / "dspex-persist"],
            env=around(folder, _DSPEX_PERSIST_COMPLETE=f"source_{shell}"),
            stdout=output,
            timeout=within(60),
            check=True,
        )
    terminal = open_terminal()
    # Written in two parts, so that the echo of the command is not taken for its output.
    terminal.type(f"{BEGINNING[shell].format(script=script)}; echo rea''dy\n")
    terminal.wait_for("ready")
    terminal.type("dspex-persist get kno\t")
    terminal.wait_for("get knobs")
    terminal.type("temp\t")
    terminal.wait_for("temperature")
    terminal.type("--reve\t")
    terminal.wait_for("--reveal")


INSERTED = {
    "tw": "two words",
    "'tw": "two words",
    r"two\ words it": "two words><it's a:name",
    "user:4": "user:42",
    '"user:4': "user:42",
    "--db=sessions.db kno": "--db=sessions.db><knobs",
    "da": "danger;$(touch oops)",
    "it": "it's",
    "qu": 'quo"te',
    r"\$": "$HOME",
    r"\~": "~root",
    r"\#": "#hash",
    "ba": "back\\slash",
    r"\`": "`tick`",
    r"\!": "!bang",
    "ü": "ünï",
    r"\[": "[a]*?",
    r"\{": "{a,b}",
}
IN_BRIEF = ("tw", '"user:4', "--db=sessions.db kno", "da", "it", r"\$")
"""The others are thorough."""


@pytest.mark.parametrize(
    "typed", [pytest.param(IN_BRIEF, id="some"), pytest.param(tuple(INSERTED), id="all", marks=pytest.mark.thorough)]
)
def test_names_with_special_characters_are_what_the_command_gets(
    shell: str, folder: Path, open_terminal: Callable[[], Terminal], typed: Sequence[str]
) -> None:
    """As the completion is installed, and whatever was typed before."""
    script = shells.install(shell, folder)
    begin = {"bash": "source ~/.bashrc", "zsh": "source ~/.zshrc", "fish": f"source {script}"}[shell]
    terminal = open_terminal()
    terminal.type(f"{begin}; echo rea''dy\n")
    terminal.wait_for("ready")
    for text in typed:
        # The shell shows the words of the line, instead of running it.
        terminal.type(f"dspex-persist get {text}\t\x01printf '<%s>' \n")
        terminal.wait_for(f"<get><{INSERTED[text]}>")
    assert not (folder / "oops").exists()


@pytest.mark.parametrize(
    "shell",
    ["bash", *(pytest.param(name, marks=pytest.mark.thorough) for name in SHELLS if name != "bash")],
    indirect=True,
)
def test_names_of_a_server_in_a_terminal(
    shell: str, folder: Path, open_terminal: Callable[[], Terminal], tmp_path: Path
) -> None:
    """bash takes the colon of the address for the end of a word."""
    script = shells.install(shell, folder)
    begin = {"bash": "source ~/.bashrc", "zsh": "source ~/.zshrc", "fish": f"source {script}"}[shell]
    with serve(tmp_path / "sessions.db") as server, BridgedState(target_of(server)) as state:
        state.initialize_session("remote:1")
        terminal = open_terminal()
        terminal.type(f"{begin}; echo rea''dy\n")
        terminal.wait_for("ready")
        terminal.type(f"dspex-persist get --target {target_of(server)} rem\t\x01printf '<%s>' \n")
        terminal.wait_for("><remote:1>")


def test_the_command_installs_the_completion(folder: Path) -> None:
    """In the configuration of the shell that runs it."""
    done = subprocess.run(
        ["bash", "--norc", "-c", "dspex-persist --install-completion && true"],
        cwd=folder,
        env=around(folder),
        capture_output=True,
        text=True,
        timeout=within(60),
        check=True,
    )
    assert "bash completion installed in" in done.stdout
    assert str(folder) in (folder / ".bashrc").read_text()


def test_the_page_names_every_shell() -> None:
    page = (ROOT / "docs/command-line.md").read_text(encoding="utf-8")
    assert all(f"source_{shell}" in page for shell in SHELLS)
