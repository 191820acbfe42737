"""A reader of a page, who saves its programs and types its commands in a terminal, in the order of the page."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.deadline import within
from tests.end_to_end.old_style import ROOT, environment, wait_until

ADDRESS = "127.0.0.1:50051"
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SAVE = re.compile(r"Save this as `([^`]+)`")
# What installs the package: it is there already.
_INSTALLS = re.compile(r"mkdir \.\./|python3 -m venv|source \.venv|pip install")
_LASTING = re.compile(r"dspex-persist (serve|watch|audit web)\b")


@dataclass(frozen=True)
class Block:
    """A block of code of a page, and the paragraph before it."""

    page: str
    line: int
    language: str
    text: str
    before: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(page: str) -> Iterator[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in _BLOCK.finditer(text):
        before = text[: match.start()].rstrip().rsplit("\n\n", 1)[-1].replace("\n", " ")
        yield Block(page, text.count("\n", 0, match.start()) + 1, match[1], match[2], before)


class Reader:
    """A terminal in a folder, and what the reader keeps running in others."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        commands = folder / ".commands"
        commands.mkdir()
        for name, words in {"dspex-persist": "-m dspex_persist ", "python": ""}.items():
            (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words}"$@"\n')
            (commands / name).chmod(0o755)
        path = f"{ROOT}{os.pathsep}{folder}"
        self._environment = environment(
            PATH=f"{commands}{os.pathsep}{os.environ['PATH']}", PYTHONPATH=path, COLUMNS="80", HOME=str(folder)
        )
        self._running: list[tuple[subprocess.Popen[bytes], Path]] = []
        self._address = ADDRESS

    def read(self, page: str, *, until: str = "") -> int:
        """Do what a page says, and compare what it shows; return how many commands were typed.

        Args:
            page: The page.
            until: The heading at which to stop.
        """
        typed = 0
        lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
        last = lines.index(until) if until else len(lines)
        for block in blocks_of(page):
            if block.line > last:
                break
            saved = _SAVE.search(block.before)
            if saved:
                self.save(saved[1], block.text)
            elif block.language == "sh":
                for command in block.text.splitlines():
                    if command and not _INSTALLS.match(command):
                        self.type(command)
                        typed += 1
            elif block.language == "console":
                for command, shown in re.findall(r"^\$ (.*)\n((?:(?!\$ ).*\n?)*)", block.text, re.MULTILINE):
                    output = self.type(command)
                    assert lasting(output) == lasting(shown), f"{block}: {command}\n{output}"
                    typed += 1
            elif block.language == "text" and self._running:
                self._compare_running(block)
        return typed

    def save(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text.replace(ADDRESS, self._address), encoding="utf-8")

    def type(self, command: str) -> str:
        """Type a command, and return its output; one that lasts goes on in another terminal."""
        command = command.replace(ADDRESS, self._address)
        if _LASTING.match(command) and "--limit" not in command:
            self._start(command)
            return ""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=within(60),
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        return done.stdout

    def _start(self, command: str) -> None:
        output = self.folder / f".output-{len(self._running)}"
        serves = command.startswith("dspex-persist serve")
        listen = " --listen 127.0.0.1:0" if serves else ""
        with output.open("wb") as out:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}{listen}"], cwd=self.folder, env=self._environment, stdout=out
            )
        self._running.append((process, output))
        if serves:
            text = wait_until(lambda: re.search(r"GRPC_READY:(\d+)", output.read_text()), command)
            self._address = f"127.0.0.1:{text[1]}"
        else:
            wait_until(lambda: output.read_text().endswith("\n"), command)

    def _compare_running(self, block: Block) -> None:
        """Compare with what is running in the last terminal, once it has printed as much."""
        _, output = self._running[-1]
        lines: Callable[[str], int] = lambda text: text.count("\n")  # noqa: E731
        wait_until(lambda: lines(output.read_text()) >= lines(block.text), str(block))
        assert lasting(output.read_text()) == lasting(block.text), str(block)

    def close(self) -> None:
        """Press Ctrl-C in the other terminals."""
        for process, _ in reversed(self._running):
            process.terminate()
            process.wait(within(30))


@contextmanager
def reader(folder: Path) -> Iterator[Reader]:
    opened = Reader(folder)
    try:
        yield opened
    finally:
        opened.close()


def lasting(output: str) -> str:
    """Return an output without what differs between runs: times, users, line breaks, widths of columns."""
    output = re.sub(r"\x1b\[[0-9;]*m", "", output)
    output = re.sub(r"[─│├└]+", " ", output)
    output = re.sub(r"(\d\d-\d\d\s+)?\d\d:\d\d:\d\d", "TIME", output)
    output = re.sub(r"[\d.]+ m?s\b", "TOOK", output)
    output = re.sub(r"user:[\w.-]+", "user:NAME", output)
    return " ".join(output.split())
