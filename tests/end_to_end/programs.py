"""The programs in the documentation, run as a newcomer would run them."""

import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tests.deadline import within
from tests.end_to_end.old_style import ROOT, environment
from tests.prepared import commands


class Program(NamedTuple):
    """A Python block of a page. `output`: the block after it, if that is a text block, otherwise empty."""

    page: str
    line: int
    text: str
    output: str

    @property
    def is_whole(self) -> bool:
        """Whether the block is a complete program, rather than a part of one."""
        return "import dspex_persist\n" in self.text

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def programs_of(page: str) -> list[Program]:
    """Return the Python blocks of a page, such as "docs/tools.md"."""
    return list(_programs(page, (ROOT / page).read_text()))


def _programs(page: str, text: str) -> Iterator[Program]:
    blocks = list(re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        if block[1] == "python":
            output = following[2] if following is not None and following[1] == "text" else ""
            yield Program(page, text.count("\n", 0, block.start()) + 1, block[2], output)


class Step(NamedTuple):
    """Something that a page has its reader do: save a program (`saved_as`), or type commands, some with an answer."""

    line: int
    saved_as: str = ""
    program: str = ""
    commands: tuple[tuple[str, str | None], ...] = ()


def steps_of(page: str) -> list[Step]:
    """Return the steps of a page, in its order."""
    text = (ROOT / page).read_text()
    steps = []
    for block in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, block.start()) + 1
        before = text[: block.start()].rsplit("\n\n", 2)[-2]
        if block[1] == "python":
            (name,) = re.findall(r"Save this as `([^`]+)`", before.replace("\n", " "))
            steps.append(Step(line, name, block[2]))
        elif block[1] == "sh":
            steps.append(Step(line, commands=tuple((command, None) for command in block[2].splitlines())))
        elif block[1] == "console":
            typed = re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n)*)", block[2], re.MULTILINE)
            steps.append(Step(line, commands=tuple(typed)))
    return steps


def run(program: str, folder: Path) -> str:
    """Run a program in a folder, in a new interpreter, and return its output."""
    return run_python(["-c", program], folder)


def run_python(arguments: Sequence[str], folder: Path, **more: str) -> str:
    """Run Python without errors and warnings, and return its output; `more` is added to its environment."""
    done = subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        env=environment(**more),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=within(60),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_prepared(arguments: Sequence[str], folder: Path, **more: str) -> str:
    """Do the same where it does not matter that the package has been imported before: some 0.4 s of CPU time less."""
    words = ["-W", "error", *arguments]
    done = commands().run_python(words, cwd=folder, env=environment(**more), timeout_s=within(60))
    assert done.returncode == 0, done.stderr
    return done.stdout
