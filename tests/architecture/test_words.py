"""Where words may be written: each edge has its own, and the question whether another name was meant is asked once."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from dspex_persist import cli
from dspex_persist.audit import CommitQuery, ExecutionQuery, HistoryQuery, SessionQuery
from dspex_persist.cli.hints import IN_COMMANDS, text_of, use_options_of
from dspex_persist.state import errors
from dspex_persist.state.bridge.hints import IN_RPCS
from dspex_persist.state.errors import Hint, StateError
from dspex_persist.state.errors.base import names_in
from dspex_persist.state.errors.hints import IN_PYTHON
from dspex_persist.state.store.maintenance import PruneInUseError

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dspex_persist"
EDGES = {"Python": IN_PYTHON, "gRPC": IN_RPCS, "command line": IN_COMMANDS}
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, StateError)]
LEAVES = [*(kind for kind in KINDS if is_dataclass(kind)), PruneInUseError]

PROTOCOLS = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "proto").glob("*.proto"))
# Those of a single word, such as Ping, are words of other texts, too.
RPCS = sorted(name for name in re.findall(r"\brpc (\w+)", PROTOCOLS) if re.search("[a-z][A-Z]", name))
OPTION = re.compile(r"(?<![\w-])--[a-z]")
COMMAND = re.compile(r"dspex-persist (?:serve|demo|replay|get|set|watch|call|db|sessions?|tools|audit)\b")
HEADER = re.compile("x-dspex-")
RPC = re.compile(rf"\b(?:{'|'.join(RPCS)})\b")


def holding(text: str) -> list[str]:
    """The files of the package that have a text."""
    files = sorted(PACKAGE.rglob("*.py"))
    return [str(file.relative_to(PACKAGE)) for file in files if text in file.read_text(encoding="utf-8")]


def texts(*folders: str, but: str = "") -> Iterator[tuple[str, str]]:
    """The file and the text of each string in these folders that is no docstring; `but`: without this one."""
    for file in sorted(each for folder in folders for each in (PACKAGE / folder).rglob("*.py")):
        name = str(file.relative_to(PACKAGE))
        if but and name.startswith(but):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                yield name, node.value


def test_suggestions_are_made_in_one_place() -> None:
    assert holding("did you mean") == ["spelling.py"]
    assert holding("get_close_matches") == ["spelling.py"]


# --- Errors ---


def names_of(kind: type[StateError]) -> set[str]:
    """What a template may name of an error: its fields, and its class's properties."""
    own = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return own | {name for each in kind.__mro__ for name, item in vars(each).items() if isinstance(item, property)}


@pytest.mark.parametrize("kind", LEAVES, ids=lambda kind: kind.__name__)
def test_every_sentence_and_its_advice_are_made_of_fields(kind: type[StateError]) -> None:
    assert kind.template
    advice = [words[kind.advice] for words in EDGES.values()] if kind.advice else []
    for template in (kind.template, *advice):
        assert names_in(template) <= names_of(kind)


@pytest.mark.parametrize("edge", EDGES)
def test_every_edge_has_words_for_every_hint(edge: str) -> None:
    words = EDGES[edge]
    assert set(words) == set(Hint)
    assert all(words.values())
    # What an error may carry that is not its kind's is about a file, and those have paths.
    of_kinds = {kind.advice for kind in LEAVES}
    assert {name for hint in Hint if hint not in of_kinds for name in names_in(words[hint])} <= {"path"}


def test_every_hint_is_given() -> None:
    files = [file for file in (PACKAGE / "state").rglob("*.py") if file.name != "hints.py"]
    given = {name for file in files for name in re.findall(r"\bHint\.([A-Z_]+)", file.read_text(encoding="utf-8"))}
    assert given == set(Hint.__members__)


# --- Layers ---


@pytest.mark.parametrize("pattern", [OPTION, COMMAND, HEADER], ids=["option", "command", "header"])
def test_inner_layers_name_no_options_commands_or_headers(pattern: re.Pattern[str]) -> None:
    known = {
        # The name of a format of files, which never changes.
        ("state/recording.py", "dspex-persist session"),
    }
    found = {(name, text) for name, text in texts("state", "infra", but="state/bridge/") if pattern.search(text)}
    assert found - known == set()


@pytest.mark.parametrize("folders", [("state", "infra"), ("cli",)], ids=["below", "cli"])
def test_only_the_bridge_names_rpcs(folders: tuple[str, ...]) -> None:
    """In sentences: as a word of its own it is a command's name, which the history calls a cause."""
    known = {("cli/audit/options.py", "Only with this cause: SetVariable, an execution's id, ...")}
    sentences = ((name, text) for name, text in texts(*folders, but="state/bridge/") if re.search(r"\b[a-z]", text))
    found = {(name, text) for name, text in sentences if RPC.search(text)}
    assert found - known == set()


# --- Options ---


def commands_in(command: Any, *names: str) -> Iterator[tuple[str, Any]]:
    """Each command of the command line, as "audit history", with its options."""
    if hasattr(command, "commands"):
        for name, each in command.commands.items():
            yield from commands_in(each, *names, name)
    else:
        yield " ".join(names), command


COMMANDS = dict(commands_in(typer.main.get_command(cli.app)))
# Sessions and variables are arguments of commands. A switch cannot be invalid.
NO_OPTIONS = {"session", "variable", "newest_first", "children"}
QUERIES = {
    "audit history": HistoryQuery,
    "audit executions": ExecutionQuery,
    "audit commits": CommitQuery,
    "audit sessions": SessionQuery,
}


@pytest.fixture
def speaking_of() -> Iterator[Callable[[str], None]]:
    """Has errors name the options of a command."""
    yield lambda name: use_options_of(COMMANDS[name])
    use_options_of(COMMANDS["demo"])


@pytest.mark.parametrize("name", COMMANDS)
def test_an_error_names_the_option_of_an_argument(name: str, speaking_of: Callable[[str], None]) -> None:
    speaking_of(name)
    options = [each for each in COMMANDS[name].params if each.param_type_name == "option"]
    assert options or name == "demo"
    for option in options:
        flag = max(option.opts, key=len)
        assert text_of(errors.InvalidArgumentError(option.name, "x")) == f"invalid {flag}: x"
        assert text_of(errors.InvalidArgumentError(flag[2:].replace("-", "_"), "x")) == f"invalid {flag}: x"


@pytest.mark.parametrize("name", QUERIES)
def test_an_error_names_the_option_of_a_field_of_a_query(name: str, speaking_of: Callable[[str], None]) -> None:
    speaking_of(name)
    for field in {field.name for field in fields(QUERIES[name])} - NO_OPTIONS:
        assert re.match(r"invalid --[a-z-]+: x", text_of(errors.InvalidArgumentError(field, "x"))), field


def test_an_argument_without_an_option_keeps_its_name(speaking_of: Callable[[str], None]) -> None:
    speaking_of("audit blame")
    assert text_of(errors.InvalidArgumentError("execution_id", "x")) == "invalid execution_id: x"
    assert text_of(errors.InvalidArgumentError("at", "x")) == "invalid --at: x"
