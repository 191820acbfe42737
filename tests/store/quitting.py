"""A helper of a check that quits with a part in its hands."""

from dspex_persist.infra.helpers import reply, requests


def main() -> None:
    asked = requests()
    next(asked)
    reply("ready")
    next(asked)
