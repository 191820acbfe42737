"""The commands that pages, and the advice of errors, name are there, with the options that they name."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import typer

from dspex_persist import cli
from dspex_persist.cli.hints import IN_COMMANDS

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = ("README.md", "examples/README.md", *(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*.md")))
_BLOCK: Final = re.compile(r"^```(?:sh|console)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_NAME: Final = "dspex-persist"
# A command with all its words, up to what the shell does with its output, or to the next command.
_COMMAND: Final = re.compile(rf"(?:^|[\s`(=]){_NAME} ((?:[^\n|>&;#`']|'[^'\n]*')*)")


def commands_in(text: str) -> Iterator[list[str]]:
    """Yield the words of each command, as in a block, or between backticks."""
    for match in _COMMAND.finditer(text.replace("\\\n", " ")):
        words = shlex.split(match[1].strip().rstrip(")"))
        if words and words[0].isascii() and words[0].islower():
            yield words


def fault_of(words: list[str]) -> str | None:
    """Why a command line does not take these words, but for those that are missing: a sentence may leave some out."""
    command: Any = typer.main.get_command(cli.app)
    context, left = None, words
    while True:
        try:
            context = command.make_context(command.name, list(left), parent=context)
        except typer.Exit:
            return None
        except Exception as error:  # noqa: BLE001 - what is said is judged
            said = str(getattr(error, "message", "")) or str(error)
            return said if re.search("No such option|unexpected extra argument|No such command", said) else None
        if not hasattr(command, "commands"):
            return None
        left = [*context._protected_args, *context.args]
        if not left:
            return None
        if left[0] not in command.commands:
            return f"No such command {left[0]}"
        command, left = command.commands[left[0]], left[1:]


def is_refused(words: list[str]) -> bool:
    """Whether it is a server that others can reach, without what that takes."""
    listens = words[words.index("--listen") + 1] if "--listen" in words[:-1] else ""
    is_here = listens.startswith(("127.", "localhost:", "[::1]", "unix:")) or ":" not in listens
    return words[0] == "serve" and not is_here and not {"--tls-cert", "--insecure"} & set(words)


@pytest.mark.parametrize("page", PAGES)
def test_pages(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = "\n".join(re.sub(r"^\$ ", "", block, flags=re.MULTILINE) for block in _BLOCK.findall(text))
    quoted = "\n".join(re.findall(rf"`{_NAME} [^`]+`", " ".join(text.split())))
    found = list(commands_in(f"{blocks}\n{quoted}"))
    faults = {shlex.join(words): fault_of(words) for words in found}
    assert not {line: fault for line, fault in faults.items() if fault is not None}
    assert not [words for words in found if is_refused(words)]


def test_advice() -> None:
    named = [words for text in IN_COMMANDS.values() for words in commands_in(text)]
    assert len(named) > 5
    assert not {shlex.join(words): fault for words in named if (fault := fault_of(words)) is not None}


@pytest.mark.parametrize(
    "line", ["db check redis://store", "db check --dbb x", "db chekc", "audit verify --target x", "sessions"]
)
def test_what_is_not_there_is_found(line: str) -> None:
    fault = fault_of(line.split())
    assert (fault is None) == (line == "sessions"), fault
