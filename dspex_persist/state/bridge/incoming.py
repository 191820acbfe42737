"""Reads the headers of a call on the server, and checks the size of messages."""

import time
from collections.abc import Mapping, Sized
from math import inf
from typing import Any, Final, TypeAlias, TypeVar

import grpc
from google.protobuf.message import Message

from dspex_persist.infra.access.tokens import CALLER, Identity
from dspex_persist.state import arguments
from dspex_persist.state.bridge.headers import ACTOR, BINARY, IDEMPOTENCY_KEY, OPTIMIZER_ID, REASON, SOURCE, TIMEOUT_S
from dspex_persist.state.errors import InvalidArgumentError, LimitExceededError, quote
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Origin, Source

M = TypeVar("M", bound=Message)
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_ACTOR_LENGTH = 255
_OURS: Final = "x-dspex-"
# How much earlier than its client's deadline a tool is ended, so that the outcome still reaches the client.
_MARGIN, _LONGEST_MARGIN_S = 0.1, 0.25


class RequestHeaders:
    """The x-dspex headers of a call, also those that are UTF-8 under a binary key.

    They are read once, because gRPC decodes all metadata of a call each time that it is asked for it.
    """

    __slots__ = ("_faults", "_texts")

    def __init__(self, context: Context) -> None:
        self._texts: dict[str, str] = {}
        # The headers that cannot be used, each with the field and the reason of its error.
        self._faults: dict[str, tuple[str, str]] = {}
        for key, content in context.invocation_metadata() or ():
            if key.startswith(_OURS):
                self._add(key, content)

    def _add(self, key: str, content: str | bytes) -> None:
        name = key
        if isinstance(content, bytes):
            name = key.removesuffix(BINARY)
            try:
                content = content.decode()
            except UnicodeDecodeError:
                self._faults.setdefault(name, (key, "it is not UTF-8"))
                return
        known = self._texts.setdefault(name, content)
        if known != content:
            reason = f"it has two values, {quote(known)} and {quote(content)}: send it once"
            self._faults.setdefault(name, (name, reason))

    def find(self, name: str) -> str | None:
        """Return a header, or None.

        Raises:
            InvalidArgumentError: It has two different values, or is not UTF-8.
        """
        if name in self._faults:
            raise InvalidArgumentError(*self._faults[name])
        return self._texts.get(name)

    def check(self) -> None:
        """Raise as `find` does, for any of the headers."""
        for fault in self._faults.values():
            raise InvalidArgumentError(*fault)


class Call:
    """One call on the server: its headers, and the facts for its response."""

    __slots__ = (
        "_context",
        "_headers",
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
        self._headers = RequestHeaders(context)
        self.limits = limits
        self.max_message_bytes = max_message_bytes
        self.began = time.monotonic()
        self.first: Any = None
        """The result of `Rpc.first`."""
        self.from_memory = True
        """Whether the result came from memory."""
        self.style = ""
        """How the client encodes the parameters of tools; see `codec.style_of`."""
        self.trailers: list[tuple[str, str]] = []

    def header(self, name: str) -> str | None:
        """Return the text of a header, or None; raises as `RequestHeaders.find` does."""
        return self._headers.find(name)

    def number(self, name: str) -> int | None:
        """Return a header that must be a whole number, or None."""
        text = self.header(name)
        if text is None:
            return None
        if not (text.isascii() and text.isdigit() and len(text) < 19):
            raise InvalidArgumentError(name, f"{quote(text)} is not a whole number")
        return int(text)

    def origin(self, cause: str) -> Origin:
        """Return who makes the call."""
        return origin_of(cause, self._context, self._headers)

    def seconds_left(self) -> float | None:
        """Return how long a tool may take: the time in the header, but at most what the call's deadline leaves."""
        text = self.header(TIMEOUT_S)
        left_s: float | None = self._context.time_remaining()
        bounds = [] if left_s is None else [max(0.0, left_s - min(_LONGEST_MARGIN_S, left_s * _MARGIN))]
        if text is not None:
            bounds.append(_seconds(text))
        return min(bounds, default=None)

    def metadata(self, metadata: Mapping[str, str]) -> dict[str, str]:
        """Return the metadata of a message; `LimitExceededError` if it has too many entries."""
        check_count("metadata entries", metadata, self.limits.metadata_entries, "metadata_entries")
        return dict(metadata)

    def trail(self, name: str, text: str) -> None:
        """Add a trailer to the response."""
        self.trailers.append((name, text))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < inf:
        raise InvalidArgumentError(TIMEOUT_S, f"{quote(text)} is not a number of seconds above 0")
    return seconds


def check_count(what: str, entries: Sized, most: int, setting: str) -> None:
    """Refuse a request with too many entries before they are read: a message can have millions."""
    if len(entries) > most:
        raise LimitExceededError(f"number of {what}", len(entries), most, setting)


def check_together(what: str, size_bytes: int, most: int, setting: str) -> None:
    """Refuse a request whose values are too large in total, before any of them is parsed."""
    if size_bytes > most:
        raise LimitExceededError(f"size of the {what} in bytes", size_bytes, most, setting)


def fitting(message: M, max_message_bytes: int) -> M:
    """Return a response; `LimitExceededError` if it is too large, which says more than gRPC's own error."""
    size_bytes = message.ByteSize()
    if size_bytes > max_message_bytes:
        raise LimitExceededError("the size of the answer", size_bytes, max_message_bytes, "max_message_bytes")
    return message


def _admitted(context: Context) -> tuple[Identity | None, object]:
    """Return who makes a call that the rules of sessions were asked about, and these rules; see `guard`."""
    identity: Identity | None = getattr(context, "identity", None)
    return identity, None if identity is None else getattr(context, "access", None)


def origin_of(cause: str, context: Context, headers: RequestHeaders) -> Origin:
    """Return who makes the call: the actor in `x-dspex-actor`, or else the host that the call comes from.

    If the server demands tokens, the one whose token it is, and for whom, if the header says that.

    Raises:
        InvalidArgumentError: One of the x-dspex headers is invalid.
    """
    headers.check()
    actor = headers.find(ACTOR)
    caller = CALLER.get()
    if caller is not None:
        # Nobody can take the name of another, but a service can say for whom it acts.
        actor = caller.name if actor in (None, caller.name) else f"{caller.name} for {actor}"
    if actor is None:
        # "ipv4:127.0.0.1:40312" without the port, which identifies nothing. A Unix socket has no host.
        actor = f"peer:{context.peer().partition(':')[2].rpartition(':')[0] or 'unix'}"
    elif len(actor) > _ACTOR_LENGTH:
        raise InvalidArgumentError(ACTOR, f"it is longer than {_ACTOR_LENGTH} characters")
    source = Source.PYTHON if headers.find(SOURCE) == Source.PYTHON else Source.ELIXIR
    reason = headers.find(REASON)
    if reason is not None:
        arguments.reason(REASON, reason)
    key, optimizer_id = headers.find(IDEMPOTENCY_KEY), headers.find(OPTIMIZER_ID)
    return Origin(actor, cause, source, key, optimizer_id, reason, *_admitted(context))
