"""The helper process of a check."""

from pathlib import Path

from sqlalchemy import Engine

from dspex_persist.infra.helpers import reply, requests
from dspex_persist.state.anchor import Head
from dspex_persist.state.store.engine import identity_of, open_readers, snapshot
from dspex_persist.state.store.verify.parts import Part, PartChecker


def main() -> None:
    """Open what the first request names, and check a part of it for each further request."""
    incoming = requests()
    opening = next(incoming)
    readers, head = _open_database(**opening) if "url" in opening else _open_file(**opening)
    checker = PartChecker(readers, head, lambda more, in_all: reply((more, in_all)))
    reply("ready")
    for part in incoming:
        problems, whole = checker.collect(Part(*part))
        reply({"found": [(problem.where, problem.what) for problem in problems], "whole": whole})


def _open_file(path: str, identity: list[int], anchor: tuple[int, str] | None) -> tuple[Engine, Head | None]:
    file = Path(path)
    readers = open_readers(file, size=1)
    with snapshot(readers):
        pass
    if list(identity_of(file.stat())) != identity:
        raise SystemExit("another file has taken its place")
    return readers, Head(anchor[0], bytes.fromhex(anchor[1])) if anchor is not None else None


def _open_database(url: str) -> tuple[Engine, None]:
    from dspex_persist.state.store.postgres.connections import Database

    readers = Database(url, writes=False).readers()
    with snapshot(readers):
        pass
    return readers, None
