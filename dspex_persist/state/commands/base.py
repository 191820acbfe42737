"""The base of commands: immutable arguments, and `apply`, which reads and stages changes through a unit of work."""

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from enum import Enum
from hashlib import sha256
from typing import Any, ClassVar, Generic, TypeVar

from dspex_persist.state.arguments import checks_of
from dspex_persist.state.errors import InvalidArgumentError, LimitExceededError, StateError, quote
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import Value
from dspex_persist.state.session_state import SessionState
from dspex_persist.state.unit_of_work import UnitOfWork
from dspex_persist.state.values import Find, FindType, ReadAhead, Spell, spell

R = TypeVar("R")

FEW = 32
"""The most steps of a small command, see `Command.is_small`."""
RESERVED_KEY, RESERVED_PREFIX = "commit_sequence", "dspex."
"""Metadata keys that the server adds when it reports a change."""


class Reads(Enum):
    """What a command reads."""

    CURRENT = "current"
    """Current values, which memory has."""
    LOADED = "loaded"
    """Current values if memory has the session. Otherwise the result is None: nothing is loaded."""
    HISTORY = "history"
    """Past versions, too, which are in the file."""
    FILE = "file"
    """Current values from the file, at the caller's request."""


class _Checked:
    """A dataclass whose arguments are checked when it is created.

    Attributes:
        fault: The error for invalid arguments; None if they are valid.
        ahead: The values parsed by `read_ahead`; None before that.
    """

    __slots__ = ("ahead", "fault")
    fault: StateError | None
    ahead: ReadAhead | None

    def __post_init__(self) -> None:
        set_field, fault = object.__setattr__, None
        try:
            for name, check in checks_of(type(self)):
                argument = getattr(self, name)
                checked = check(name, argument)
                if checked is not argument:
                    set_field(self, name, checked)
        except StateError as error:
            fault = error
        set_field(self, "fault", fault)
        set_field(self, "ahead", None)


@dataclass(frozen=True, slots=True)
class Command(_Checked, ABC, Generic[R]):
    """One operation on one session. Invalid arguments do not raise: backends fail the command with its `fault`.

    Attributes:
        session_id: The session.
        writes: Whether it may stage changes, so that it goes through the writer.
        passes_holds: Whether it is carried out while somebody moves the session, and other writes wait.
        returns: The type of its result, to decode results recorded under idempotency keys.
        keeps_rules: Whether the rules of the session are checked after it. Recorded commits are taken as they were.
    """

    session_id: str

    writes: ClassVar[bool] = False
    passes_holds: ClassVar[bool] = False
    returns: ClassVar[Any] = None
    keeps_rules: ClassVar[bool] = True

    @abstractmethod
    def apply(self, uow: UnitOfWork) -> R:
        """Carry out the command, and return its result.

        Raises:
            StateError: The command is refused. The caller rolls back what it has staged.
        """

    def check(self) -> None:
        """Raise its `fault` if it has one."""
        if self.fault is not None:
            raise self.fault

    @property
    def cause(self) -> str:
        """The command's name, which is also that of its rpc."""
        return type(self).__name__

    @property
    def reads(self) -> Reads:
        """Which data it reads."""
        return Reads.CURRENT

    def takes_long(self, state: SessionState) -> bool:
        """Whether applying it to a session in memory would block an event loop too long."""
        return False

    @property
    def is_small(self) -> bool:
        """Whether running it on a session in memory takes less time than a commit."""
        return False

    @property
    def json_length(self) -> int:
        """How many characters of JSON have to be parsed to carry it out."""
        return 0

    def read_ahead(self, ahead: ReadAhead, find: Find, find_type: FindType | None = None) -> None:
        """Parse its values in advance.

        Args:
            ahead: Parses the values, and is stored in the command.
            find: Finds the current variables for which the values are parsed.
            find_type: Finds types of variables for `canonical_form`; required with an idempotency key.
        """
        self._read_values(ahead, find)
        if find_type is not None:
            form = self.canonical_form(find_type, ahead.spell)
            ahead.canonical_form, ahead.fingerprint = form, form.fingerprint()
        object.__setattr__(self, "ahead", ahead)

    def _read_values(self, ahead: ReadAhead, find: Find) -> None:
        """Parse each value with `ahead`."""

    def canonical_form(self, find_type: FindType, spell: Spell) -> "Command[R]":
        """Return the request in a canonical spelling, which is the same for all requests with the same meaning."""
        return self

    def canonical_fingerprint(self, uow: UnitOfWork) -> str:
        """Return the fingerprint of `canonical_form`."""

        def spelled(identifier: str, type_name: str | None, value: Value) -> Value:
            known = ahead.find_spelling(identifier, type_name, value, uow.limits) if ahead is not None else None
            return spell(type_name, value, uow.limits) if known is None else known

        ahead = self.ahead
        form = self.canonical_form(lambda identifier: uow.find_last_type(self.session_id, identifier), spelled)
        # This comparison is fast, as large texts in both are the same objects.
        return ahead.fingerprint if ahead is not None and ahead.canonical_form == form else form.fingerprint()

    def fingerprint(self) -> str:
        """Return the SHA-256 (hexadecimal) of the request, which does not depend on the order of its mappings."""
        request = json.dumps([self.cause, self._request()], sort_keys=True, default=_digest)
        return sha256(request.encode()).hexdigest()

    def _request(self) -> dict[str, Any]:
        return asdict(self)


def _digest(value: object) -> str:
    return sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)


def check_text(field: str, text: str, length: int, setting: str) -> str:
    """Return `text` if it is valid as an id or a name.

    It must not be empty, longer than `length`, or contain control characters or surrogates. `setting` names the limit.
    """
    if not text:
        raise InvalidArgumentError(field, "it must not be empty")
    if len(text) > length:
        raise LimitExceededError(f"the length of {field} {quote(text)}", len(text), length, setting)
    if not text.isprintable():
        for character in text:
            if character < " " or character == "\x7f" or "\ud800" <= character <= "\udfff":
                raise InvalidArgumentError(field, f"{quote(text)} contains the control character {character!r}")
    return text


def check_metadata(metadata: Mapping[str, str], limits: Limits, known: Collection[str] = ()) -> Mapping[str, str]:
    """Return `metadata` if it is within the limits and contains no surrogates and no reserved keys but the `known`."""
    if not metadata:
        return metadata
    if len(metadata) > limits.metadata_entries:
        raise LimitExceededError(
            "number of metadata entries", len(metadata), limits.metadata_entries, "metadata_entries"
        )
    size = 0
    for key, text in metadata.items():
        if (key == RESERVED_KEY or key.startswith(RESERVED_PREFIX)) and key not in known:
            raise InvalidArgumentError("metadata", f"the key {key!r} is set by the server; use another key")
        try:
            size += len(key.encode()) + len(text.encode())
        except UnicodeEncodeError:
            raise InvalidArgumentError("metadata", f"entry {quote(key)} is not valid Unicode") from None
    if size > limits.metadata_size_bytes:
        raise LimitExceededError(
            "size of the metadata in bytes", size, limits.metadata_size_bytes, "metadata_size_bytes"
        )
    return metadata


def check_merged_metadata(
    merged: Mapping[str, str], added: Mapping[str, str], limits: Limits, known: Collection[str] = ()
) -> None:
    """Check merged metadata against the limits; otherwise many small writes could let it grow without bound."""
    if added:
        check_metadata(merged, limits, known)
