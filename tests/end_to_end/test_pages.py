"""The pages that a newcomer follows, typed as they stand."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from dspex_persist import Context, cli
from tests.deadline import within
from tests.end_to_end.old_style import ROOT, environment, serve, target_of
from tests.end_to_end.programs import run
from tests.end_to_end.reading import ADDRESS, blocks_of, reader

SERVICE = "docs/fastapi.md"
TUNING = """
from dspex_persist import ToolContext, tool

@tool
def improve(ctx: ToolContext, by: float) -> None:
    ctx["temperature"] += by
"""
DOCS = list((ROOT / "docs").glob("*.md"))


@pytest.mark.parametrize(("page", "until"), [("docs/quickstart.md", ""), ("docs/command-line.md", "## Changes")])
def test_a_page_can_be_typed_as_it_stands(page: str, until: str, tmp_path: Path) -> None:
    with reader(tmp_path) as reading:
        assert reading.read(page, until=until) > 3


# Every command


def commands_in(text: str) -> Iterator[list[str]]:
    """Yield the words of each `dspex-persist` command, without what a shell does with it."""
    for line in re.findall(r"^(?:\$ |.*\| )?(?:[A-Z_]+=\S+ )*dspex-persist (.*)$", text, re.MULTILINE):
        lexer = shlex.shlex(re.split(" {4}", line)[0], posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        ends = [index for index, word in enumerate(words) if set(word) <= set("|&;<>")]
        yield words[: ends[0]] if ends else words


def documented() -> list[tuple[str, list[str]]]:
    pages = ["README.md", "CONTRIBUTING.md", "examples/README.md", *sorted(f"docs/{path.name}" for path in DOCS)]
    found = [
        (str(block), words)
        for page in pages
        for block in blocks_of(page)
        if block.language in ("sh", "console")
        for words in commands_in(block.text)
    ]
    helped = [
        (f"help of {name}", words)
        for name, command in all_commands(typer.main.get_command(cli.app))
        for words in commands_in(getattr(command, "epilog", "") or "")
    ]
    return [*found, *helped]


def all_commands(command: Any, name: str = "dspex-persist") -> Iterator[tuple[str, Any]]:
    yield name, command
    for each, subcommand in getattr(command, "commands", {}).items():
        yield from all_commands(subcommand, f"{name} {each}")


def test_every_command_in_the_pages_and_in_the_help_can_be_parsed() -> None:
    commands = documented()
    assert len(commands) > 100
    whole: Any = typer.main.get_command(cli.app)
    for where, words in commands:
        command, rest = whole, list(words)
        while rest and hasattr(command, "commands"):
            if rest[0].startswith("-"):
                break
            assert rest[0] in command.commands, (where, words)
            command = command.commands[rest.pop(0)]
        if hasattr(command, "commands"):
            continue
        try:
            command.make_context(" ".join(words), rest)
        except Exception as error:  # noqa: BLE001 -- whatever it is, the page is wrong
            pytest.fail(f"{where}: dspex-persist {' '.join(words)}: {error!r}")


def test_the_quickstart_installs_as_the_readme_does() -> None:
    def lines(page: str) -> list[str]:
        (block,) = [each for each in blocks_of(page) if "pip install ../dspex-persist\n" in each.text]
        return block.text.splitlines()[1:]

    assert lines("docs/quickstart.md") == lines("README.md")


# FastAPI


@pytest.fixture
def service(tmp_path: Path) -> Path:
    """A folder with the programs of the page."""
    app, tests = [each.text for each in blocks_of(SERVICE) if each.language == "python"]
    (tmp_path / "service.py").write_text(app)
    (tmp_path / "test_service.py").write_text(tests)
    return tmp_path


def run_tests(folder: Path) -> str:
    argv = [sys.executable, "-W", "error", "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    path = f"{folder}:{ROOT}"
    done = subprocess.run(
        argv,
        cwd=folder,
        env=environment(PYTHONPATH=path),
        capture_output=True,
        text=True,
        timeout=within(120),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_web_service_on_a_file(service: Path) -> None:
    assert "4 passed" in run_tests(service)


def test_the_same_web_service_on_a_server(service: Path) -> None:
    place, tests = 'str(tmp_path / "customers.db")', service / "test_service.py"
    with serve(service / "customers.db", "--tools", "service") as server:
        assert place in tests.read_text()
        tests.write_text(tests.read_text().replace(place, repr(f"grpc://{target_of(server)}")))
        assert "4 passed" in run_tests(service)


# Clients of a server


def test_the_parts_of_the_page_on_clients(tmp_path: Path) -> None:
    begin, *others = [each.text for each in blocks_of("docs/clients.md") if each.language == "python"]
    (tmp_path / "tuning.py").write_text(TUNING)
    session = 'state.initialize_session("s")\nstate.register_variable("s", "temperature", "float", 0.7)\n'
    end = 'print(*(each.reason for each in state.get_variable_history("s", "temperature")), sep="; ")\nstate.close()\n'
    with serve(tmp_path / "sessions.db", "--tools", "tuning") as server:
        program = "".join((begin, session, *others, end)).replace(ADDRESS, target_of(server))
        output = run(program, tmp_path)
    assert output == "nightly tuning; ticket 1201: the answers were too long; None\n"


# Coming from DSPex


def test_the_names_in_the_table_are_there() -> None:
    page = (ROOT / "docs/from-dspex.md").read_text(encoding="utf-8")
    table = "\n".join(line for line in page.splitlines() if line.startswith("|"))
    names = set(re.findall(r"\bctx\.(\w+)\(", table))
    assert {"define", "get_many", "transaction", "history"} <= names
    assert [name for name in sorted(names) if not hasattr(Context, name)] == []
