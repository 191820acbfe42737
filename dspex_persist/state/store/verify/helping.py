"""The helper process of a check."""

from pathlib import Path

from dspex_persist.infra.helpers import reply, requests
from dspex_persist.state.anchor import Head
from dspex_persist.state.store.engine import identity_of, open_readers, snapshot
from dspex_persist.state.store.verify.parts import Part, PartChecker


def main() -> None:
    """Open the file that the first request names, and check a part of it for each further request."""
    incoming = requests()
    name, identity, anchor = next(incoming)
    path = Path(name)
    readers = open_readers(path, size=1)
    with snapshot(readers):
        pass
    if list(identity_of(path.stat())) != identity:
        raise SystemExit("another file has taken its place")
    head = Head(anchor[0], bytes.fromhex(anchor[1])) if anchor is not None else None
    checker = PartChecker(readers, head, lambda more, in_all: reply((more, in_all)))
    reply("ready")
    for part in incoming:
        problems, whole = checker.collect(Part(*part))
        reply({"found": [(problem.where, problem.what) for problem in problems], "whole": whole})
