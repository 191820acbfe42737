"""The README's programs and commands, run as a newcomer would."""

import os
import re
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from dspex_persist.infra.process import ServerProcess
from tests.deadline import within
from tests.end_to_end.old_style import ROOT, wait_until
from tests.end_to_end.programs import programs_of, run, steps_of

PROGRAMS = [program.text for program in programs_of("README.md")]


@pytest.fixture
def client() -> str:
    (program,) = [text for text in PROGRAMS if "grpc://" in text]
    assert len(program.strip().splitlines()) <= 10
    return str(program)


def test_a_client_finds_its_variable_again_after_a_kill(client: str, tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "dspex_persist", "serve", "--listen", "127.0.0.1:0"]
    outputs = []
    for _ in range(2):
        with ServerProcess.start(argv, cwd=tmp_path) as server:
            outputs.append(run(client.replace("50051", str(server.port)), tmp_path))
            server.kill()
    assert outputs == ["begun\ntemperature is 0.35 at version 1\n", "resumed\ntemperature is 0.175 at version 2\n"]


def test_the_library_program(tmp_path: Path) -> None:
    (program,) = [text for text in PROGRAMS if "library.db" in text]
    lines = run(program, tmp_path).splitlines()
    assert lines[0] == "invalid value for 'temperature': value 9.0 is above maximum 2"
    assert lines[-1] == "0.7"
    assert [line.split()[:2] for line in lines[1:3]] == [["1", "0.9"], ["0", "0.7"]]


def test_the_program_with_a_tool(tmp_path: Path) -> None:
    (program,) = [text for text in PROGRAMS if "shop.db" in text]
    assert run(program, tmp_path).splitlines() == ["1", "ValueError: only 1 left", "1 2"]


def test_an_editor_has_no_complaints(tmp_path: Path) -> None:
    for number, program in enumerate(PROGRAMS):
        (tmp_path / f"program_{number}.py").write_text(program)
    # As mypy is out of the box: what a variable holds is known at run time only, which --strict has one spell out.
    argv = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file=",
        "--check-untyped-defs",
        *map(str, sorted(tmp_path.iterdir())),
    ]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=within(100), check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- From the first line to the last ---

PYTHON = f"""#!/bin/bash
# The Python that the tests run on, whose new environments find what is installed there, pip too: nothing is fetched.
if [ "$1 $2" = "-m venv" ]; then
  {sys.executable} -m venv --without-pip "$3" || exit
  printf '#!/bin/sh\\nexec "$(dirname "$0")/python" -m pip "$@"\\n' > "$3/bin/pip" && chmod +x "$3/bin/pip"
  echo '{sysconfig.get_path("purelib")}' > "$(echo "$3"/lib/python*/site-packages)/dependencies.pth"
else
  exec {sys.executable} "$@"
fi
"""
PIP = {
    "PIP_NO_INDEX": "1",
    "PIP_NO_DEPS": "1",
    "PIP_NO_BUILD_ISOLATION": "0",  # "no" to "isolation", in pip's words
    "PIP_QUIET": "1",
    "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    "PIP_CONFIG_FILE": os.devnull,
}


class Reader:
    """A reader who types the commands of the README in a clone of the project."""

    def __init__(self, folder: Path) -> None:
        self.clone = folder / "dspex-persist"
        bin_ = folder / "bin"
        bin_.mkdir()
        for name in ("python3", "python3.11"):
            (bin_ / name).write_text(PYTHON)
            (bin_ / name).chmod(0o755)
        kept = {
            name: text
            for name, text in os.environ.items()
            if not re.match("DSPEX_|PYTHON|PYTEST|MAKE|MFLAGS|ARGS$|CI$", name)
        }
        path = f"{bin_}{os.pathsep}{os.environ['PATH']}"
        environment = {**kept, **PIP, "PATH": path, "COLUMNS": "80", "NO_COLOR": "1", "HOME": str(folder)}
        environment |= {"DSPEX_PERSIST_LISTEN": "127.0.0.1:0", "PYTHON": str(bin_ / "python3")}
        subprocess.run(["git", "clone", "-q", "--shared", str(ROOT), str(self.clone)], check=True, timeout=within(60))
        _bring_up_to_date(self.clone)
        self._shell = subprocess.Popen(
            ["bash"],
            cwd=self.clone,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self._folder = folder
        self._server: Path | None = None
        self._count = 0
        # As `make run` would, without fetching anything.
        self.type("python3 -m venv .venv")
        self.type(".venv/bin/python -m pip install -e .")
        self.type("touch .venv/.installed")

    def type(self, command: str) -> str:
        """Type a command, wait until it succeeds, and return its output. A server continues in the background."""
        self._count += 1
        output, ended = (self._folder / f"{self._count}.{suffix}" for suffix in ("output", "ended"))
        if re.match(r"dspex-persist serve\b", command):
            self._server = output
            self._send(f"{{ {command}\n}} >{output} 2>&1 &")
            wait_until(lambda: "GRPC_READY:" in output.read_text() if output.exists() else False, command)
            return ""
        # Renamed into place, so that it is complete once it exists.
        self._send(f"{{ {command}\n}} >{output} 2>&1 </dev/null; echo $? >{ended}.new; mv {ended}.new {ended}")
        wait_until(lambda: ended.exists() or self._shell.poll() is not None, command)
        assert ended.read_text() == "0\n", f"{command}\n{output.read_text()}"
        return output.read_text()

    def save(self, name: str, program: str) -> None:
        """Save a program in the shell's current folder, with the port of its server."""
        folder = Path(self.type("pwd").strip())
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(program.replace("50051", self._port()) if "50051" in program else program)

    def _port(self) -> str:
        assert self._server is not None, "a client needs a server"
        (port,) = re.findall(r"GRPC_READY:(\d+)", self._server.read_text())
        return str(port)

    def _send(self, line: str) -> None:
        assert self._shell.stdin is not None
        self._shell.stdin.write(line + "\n")
        self._shell.stdin.flush()

    def close(self) -> None:
        """End the shell, and its server with it."""
        assert self._shell.stdin is not None
        self._shell.stdin.close()
        # The whole group: a process in the background may have another shell as its parent.
        with suppress(ProcessLookupError):
            os.killpg(self._shell.pid, signal.SIGTERM)
        self._shell.wait(within(30))
        wait_until(self._is_gone, "the end of the server")

    def _is_gone(self) -> bool:
        try:
            os.killpg(self._shell.pid, 0)
        except ProcessLookupError:
            return True
        return False


def _bring_up_to_date(clone: Path) -> None:
    """Apply the changes that are not committed yet, so that they are tested, too."""
    diff = subprocess.run(["git", "diff", "--binary", "HEAD"], cwd=ROOT, capture_output=True, check=True).stdout
    if diff:
        subprocess.run(["git", "apply"], cwd=clone, input=diff, check=True)


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    if not (ROOT / ".git").exists():
        pytest.skip("this is not a git clone")
    reading = Reader(tmp_path)
    yield reading
    reading.close()


def lasting(output: str) -> str:
    """Return the words of an output without times, durations, users and line breaks, which differ between runs."""
    output = re.sub(r"[─│├└]+", " ", output)
    output = re.sub(r"\d\d-\d\d\s+\d\d:\d\d:\d\d", "TIME", output)
    output = re.sub(r"[\d.]+ m?s\b", "TOOK", output)
    output = re.sub(r"user:[\w.-]+", "user:NAME", output)
    return " ".join(output.split())


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_everything_can_be_typed_as_it_stands(reader: Reader) -> None:
    typed = 0
    for step in steps_of("README.md"):
        if step.saved_as:
            reader.save(step.saved_as, step.program)
        for command, answer in step.commands:
            output = reader.type(command)
            typed += 1
            if answer is not None:
                assert lasting(output) == lasting(answer), f"README.md:{step.line}: {command}\n{output}"
    assert typed > 20


def test_the_words_of_the_first_page_are_explained_where_it_says_so() -> None:
    front = (ROOT / "README.md").read_text().split("## Try it")[0]
    glossary = (ROOT / "docs/glossary.md").read_text()
    assert "(docs/glossary.md)" in front
    for word in ("bridge protocol", "DSPex", "snakepit", "session", "variable", "commit", "actor", "cause", "chain"):
        assert word in front
        assert re.search(rf"^\| [^|]*\b{word}\b[^|]* \|", glossary, re.MULTILINE), word
