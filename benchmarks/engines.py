"""PostgreSQL and Valkey for a run: those of the tests, in a directory of the run's choice, ended with it.

`python -m benchmarks.engines --directory PATH` starts PostgreSQL for a process whose Python lacks it: it prints the URL
and ends when its standard input does.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from tests.engines import Databases, Postgres, Server, Valkey

AnyServer = TypeVar("AnyServer", bound=Server)

# A socket's path has at most 107 bytes; what PostgreSQL calls its own takes 14 of them.
_LONGEST_PATH = 92


@contextmanager
def running(kind: type[AnyServer], directory: Path) -> Iterator[AnyServer]:
    """Start a server whose files are in `directory`, and end it afterwards; this process's end ends it, too.

    Raises:
        RuntimeError: It cannot use the directory, or did not start.
    """
    server = kind(directory / f"dspex-bench-{os.getpid()}-{kind.__name__.lower()}")
    if len(str(server.directory)) > _LONGEST_PATH:
        raise RuntimeError(f"{directory} is too long for the path of a socket: choose another --directory")
    closed = [each for each in (directory, *directory.parents) if not each.stat().st_mode & 0o1]
    if os.geteuid() == 0 and closed:
        # The servers of the tests run as nobody, as PostgreSQL refuses to run as root.
        raise RuntimeError(f"the user nobody, who runs {kind.__name__}, may not enter {closed[-1]}: see --directory")
    try:
        server.start(owner=os.getpid())
        yield server
    finally:
        server.end()


def database_urls(server: Server, count: int) -> list[str]:
    """Return the URLs of so many new stores in a server that is running."""
    if isinstance(server, Postgres):
        databases = Databases(server.url())
        return [databases.create() for _ in range(count)]
    return [f"valkey+unix://{server.directory / 's'}?prefix=bench{number}" for number in range(count)]


KINDS: dict[str, type[Server]] = {"postgresql": Postgres, "valkey": Valkey}
"""The engines by the names that rows have for them."""


def main() -> None:
    """Run PostgreSQL until standard input ends."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engines", description=main.__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="where its files are")
    with running(Postgres, parser.parse_args().directory.resolve()) as server:
        print(server.url(), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
