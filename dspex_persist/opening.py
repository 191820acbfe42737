"""How an address becomes a session state: the composition root says so here, for layers that must not know it."""

import os
from collections.abc import Awaitable, Callable, Coroutine, Generator
from types import TracebackType
from typing import Any, Final, Generic, Protocol, TypeVar

ENV_PREFIX: Final = "DSPEX_PERSIST_"
"""How the environment variables begin that say what is not said in a call."""

R = TypeVar("R")


class Opener(Protocol):
    """Opens the session state at an address, as `dspex_persist.connect` does."""

    def __call__(self, url: str | os.PathLike[str], /, **options: Any) -> Any: ...


class Finder(Protocol):
    """Says whether there may be a session state at an address."""

    def __call__(self, url: str | os.PathLike[str], /) -> bool: ...


class Historian(Protocol):
    """Opens the history at an address, as `dspex_persist.open_audit` does."""

    def __call__(self, url: str | os.PathLike[str], /, *, reveal: bool) -> Any: ...


_openers: list[Opener] = []
_finders: list[Finder] = []
_historians: list[Historian] = []


def register(opener: Opener, finder: Finder, historian: Historian) -> None:
    """Have `open_state`, `is_there` and `open_history` use these from now on."""
    _openers[:], _finders[:], _historians[:] = [opener], [finder], [historian]


def is_there(url: str | os.PathLike[str]) -> bool:
    """Whether there may be a session state at `url`: not if it is a file that does not exist."""
    return _finders[0](url)


def open_state(url: str | os.PathLike[str], /, **options: Any) -> Any:
    """Return the provider at `url`; see `dspex_persist.connect` for the arguments and the errors."""
    return _openers[0](url, **options)


def open_history(url: str | os.PathLike[str], /, *, reveal: bool) -> Any:
    """Return the history at `url`; see `dspex_persist.open_audit`."""
    return _historians[0](url, reveal=reveal)


class Opening(Generic[R]):
    """Something that is being opened from asyncio: `x = await opening`, or `async with opening as x`, which closes it.

    Args:
        opened: The coroutine that opens it.
        close: Closes it.
    """

    def __init__(self, opened: Coroutine[Any, Any, R], close: Callable[[R], Awaitable[object]]) -> None:
        self._opened = opened
        self._close = close
        self._here: list[R] = []

    def __await__(self) -> Generator[Any, Any, R]:
        return self._opened.__await__()

    async def __aenter__(self) -> R:
        here = await self._opened
        self._here.append(here)
        return here

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close(self._here.pop())
