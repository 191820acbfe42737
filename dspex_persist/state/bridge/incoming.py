"""What a call on the server says beside its message, and what a message may hold."""

import time
from collections.abc import Mapping, Sized
from math import inf
from typing import Any, Final, TypeAlias, TypeVar

import grpc
from google.protobuf.message import Message

from dspex_persist.state.bridge.headers import ACTOR, BINARY, IDEMPOTENCY_KEY, OPTIMIZER_ID, SOURCE, TIMEOUT_S
from dspex_persist.state.errors import InvalidArgumentError, LimitExceededError, quote
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Origin, Source

M = TypeVar("M", bound=Message)
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_ACTOR_LENGTH = 255
_OURS: Final = "x-dspex-"
# A tool that runs into its client's deadline is ended so much earlier that its verdict still reaches the client.
_MARGIN, _LONGEST_MARGIN_S = 0.1, 0.25


class Call:
    """One call on the server: what it says beside its message, and what is known for its answer."""

    __slots__ = (
        "_context",
        "began",
        "first",
        "from_memory",
        "limits",
        "max_message_bytes",
        "style",
        "trailers",
    )

    def __init__(self, context: Context, limits: Limits, max_message_bytes: int) -> None:
        self._context = context
        self.limits = limits
        self.max_message_bytes = max_message_bytes
        self.began = time.monotonic()
        self.first: Any = None
        """The result of what the rpc asks first."""
        self.from_memory = True
        """Whether memory answered."""
        self.style = ""
        """How the client writes the parameters of tools."""
        self.trailers: list[tuple[str, str]] = []

    def says(self, name: str) -> str | None:
        """What the call says beside its message."""
        return header(self._context, name)

    def number(self, name: str) -> int | None:
        """The same, where it is a whole number."""
        return whole_number(self._context, name)

    def origin(self, cause: str) -> Origin:
        """Who asks."""
        return origin_of(cause, self._context)

    def seconds_left(self) -> float | None:
        """How long whoever asks waits for a tool: as they say, and no longer than the call lasts."""
        said = self.says(TIMEOUT_S)
        left_s: float | None = self._context.time_remaining()
        bounds = [] if left_s is None else [max(0.0, left_s - min(_LONGEST_MARGIN_S, left_s * _MARGIN))]
        if said is not None:
            bounds.append(_seconds(said))
        return min(bounds, default=None)

    def metadata(self, metadata: Mapping[str, str]) -> dict[str, str]:
        """Those of a message, unless they are too many."""
        check_count("metadata entries", metadata, self.limits.metadata_entries, "metadata_entries")
        return dict(metadata)

    def trail(self, name: str, text: str) -> None:
        """Say something beside the answer."""
        self.trailers.append((name, text))


def _seconds(said: str) -> float:
    try:
        seconds = float(said)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < inf:
        raise InvalidArgumentError(TIMEOUT_S, f"{quote(said)} is no number of seconds above 0")
    return seconds


def check_count(what: str, entries: Sized, most: int, setting: str) -> None:
    """Refuse a request with too many of something before anything is made of them: a message holds millions."""
    if len(entries) > most:
        raise LimitExceededError(f"number of {what}", len(entries), most, setting)


def check_together(what: str, size_bytes: int, most: int, setting: str) -> None:
    """Refuse a request whose values are too much together before any of them is read."""
    if size_bytes > most:
        raise LimitExceededError(f"size of the {what} in bytes", size_bytes, most, setting)


def fitting(message: M, max_message_bytes: int) -> M:
    """The answer, if it is no larger than a message may be: gRPC would not say what to do."""
    size_bytes = message.ByteSize()
    if size_bytes > max_message_bytes:
        raise LimitExceededError("the size of the answer", size_bytes, max_message_bytes, "max_message_bytes")
    return message


def headers(context: Context) -> dict[str, str]:
    """All of ours that the call has; each may be UTF-8 under a binary key. One that says two things is refused."""
    found: dict[str, str] = {}
    for key, content in context.invocation_metadata() or ():
        if key.startswith(_OURS):
            name, text = (key, content) if isinstance(content, str) else (key.removesuffix(BINARY), _utf8(key, content))
            if found.setdefault(name, text) != text:
                raise _contradiction(name, found[name], text)
    return found


def header(context: Context, name: str) -> str | None:
    """One of them."""
    binary, found = name + BINARY, None
    for key, content in context.invocation_metadata() or ():
        if key in (name, binary):
            text = content if isinstance(content, str) else _utf8(key, content)
            if found is not None and found != text:
                raise _contradiction(name, found, text)
            found = text
    return found


def _contradiction(name: str, first: str, second: str) -> InvalidArgumentError:
    return InvalidArgumentError(name, f"it is there as {quote(first)} and as {quote(second)}: send it once")


def _utf8(key: str, content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise InvalidArgumentError(key, "it is no UTF-8") from None


def whole_number(context: Context, name: str) -> int | None:
    """A header that is a number."""
    text = header(context, name)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise InvalidArgumentError(name, f"{quote(text)} is not a whole number")
    return int(text)


def origin_of(cause: str, context: Context) -> Origin:
    """Who asks: as the caller says in `x-dspex-actor`, else the host that it calls from."""
    said = headers(context)
    actor = said.get(ACTOR)
    if actor is None:
        # "ipv4:127.0.0.1:40312": the port says nothing about who it is. A Unix socket has no host.
        actor = f"peer:{context.peer().partition(':')[2].rpartition(':')[0] or 'unix'}"
    elif len(actor) > _ACTOR_LENGTH:
        raise InvalidArgumentError(ACTOR, f"it is longer than {_ACTOR_LENGTH} characters")
    source = Source.PYTHON if said.get(SOURCE) == Source.PYTHON else Source.ELIXIR
    return Origin(actor, cause, source, said.get(IDEMPOTENCY_KEY), said.get(OPTIMIZER_ID))
