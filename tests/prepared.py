"""Commands that start at once: a process imports the heavy modules once, and forks for each command."""

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

_PROGRAM = textwrap.dedent("""
    import json, os, signal, sys, traceback
    import alembic.command, sqlalchemy, dspex_persist.wiring, dspex_persist.state.store.maintenance.transfer
    from dspex_persist.cli import main
    for line in sys.stdin:
        folder, words, seconds = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            # Ends a command that would run on, such as a server that should have refused the file.
            signal.alarm(seconds)
            os.chdir(folder)
            sys.argv[1:] = words
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            try:
                main()
            except SystemExit as ended:
                sys.stdout.flush()
                os._exit(ended.code or 0)
            except BaseException:
                traceback.print_exc()
                os._exit(99)
        os.close(writer)
        with open(reader) as output:
            text = output.read()
        print(json.dumps((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text)), flush=True)
""")


class Ended(NamedTuple):
    """The exit code of a command, and its output: stdout and stderr together."""

    code: int
    output: str


class Prepared:
    """Runs commands of `dspex-persist`, one after the other, each in a fork."""

    def __init__(self, env: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def run(self, words: Sequence[str], *, cwd: Path, timeout_s: float) -> Ended:
        """Run a command to its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps((os.fspath(cwd), list(words), round(timeout_s))) + "\n")
        self._process.stdin.flush()
        return Ended(*json.loads(self._process.stdout.readline()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate()
