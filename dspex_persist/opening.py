"""How an address becomes a session state: the composition root says so here, for layers that must not know it."""

import os
from typing import Any, Protocol


class Opener(Protocol):
    """Opens the session state at an address, as `dspex_persist.connect` does."""

    def __call__(self, url: str | os.PathLike[str], /, **options: Any) -> Any: ...


_openers: list[Opener] = []


def register(opener: Opener) -> None:
    """Have `open_state` use this opener from now on."""
    _openers[:] = [opener]


def open_state(url: str | os.PathLike[str], /, **options: Any) -> Any:
    """Return the provider at `url`; see `dspex_persist.connect` for the arguments and the errors."""
    return _openers[0](url, **options)
