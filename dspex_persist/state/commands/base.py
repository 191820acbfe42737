"""What a command is: frozen arguments, and `apply`, which reads and stages through a unit of work."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
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

RESERVED_KEY, RESERVED_PREFIX = "commit_sequence", "dspex."
"""Metadata that the server itself adds where it tells of a change."""


class Reads(Enum):
    """What a command reads."""

    CURRENT = "current"
    """Current values: memory has them."""
    HISTORY = "history"
    """Past versions too: they are in the file."""
    FILE = "file"
    """Current values, but from the file, because the caller wants it so."""


class _Checked:
    """What has been looked at when it was made. `fault`: what is wrong with its arguments; None if nothing is.

    `ahead`: what has been read of its values since; None while nothing has been.
    """

    __slots__ = ("ahead", "fault")
    fault: StateError | None
    ahead: ReadAhead | None

    def __post_init__(self) -> None:
        keep, fault = object.__setattr__, None
        try:
            for name, check in checks_of(type(self)):
                given = getattr(self, name)
                kept = check(name, given)
                if kept is not given:
                    keep(self, name, kept)
        except StateError as error:
            fault = error
        keep(self, "fault", fault)
        keep(self, "ahead", None)


@dataclass(frozen=True, slots=True)
class Command(_Checked, ABC, Generic[R]):
    """One operation on one session. Wrong arguments are its `fault`, with which whoever is to carry it out fails it.

    `writes`: it may stage changes, and so goes through the writer.
    `returns`: the type of its result, with which a recorded result is read back.
    """

    session_id: str

    writes: ClassVar[bool] = False
    returns: ClassVar[Any] = None

    @abstractmethod
    def apply(self, uow: UnitOfWork) -> R:
        """Do it; a `StateError` means that nothing was done."""

    def check(self) -> None:
        """Raise its `fault`, if it has one."""
        if self.fault is not None:
            raise self.fault

    @property
    def cause(self) -> str:
        """The command's name, which is that of its rpc."""
        return type(self).__name__

    @property
    def reads(self) -> Reads:
        """What it has to be given to read."""
        return Reads.CURRENT

    def takes_long(self, state: SessionState) -> bool:
        """Whether to read this of a session in memory would hold up an event loop."""
        return False

    @property
    def brings(self) -> int:
        """Characters of JSON, all together, that have to be read before it can be carried out."""
        return 0

    def read_ahead(self, ahead: ReadAhead, find: Find, find_type: FindType | None = None) -> None:
        """Have `ahead` read the values that it brings, for the variables that `find` finds now, and keep it.

        `find_type`, where it has to be known what is asked for (under an idempotency key): see `meant`.
        """
        self._read_values(ahead, find)
        if find_type is not None:
            meant = self.meant(find_type, ahead.spell)
            ahead.meant, ahead.fingerprint = meant, meant.fingerprint()
        object.__setattr__(self, "ahead", ahead)

    def _read_values(self, ahead: ReadAhead, find: Find) -> None:
        """Have each value read."""

    def meant(self, find_type: FindType, spell: Spell) -> "Command[R]":
        """The same request in one spelling of the many that mean the same."""
        return self

    def meaning(self, uow: UnitOfWork) -> str:
        """The fingerprint of `meant`."""

        def spelled(identifier: str, type_name: str | None, value: Value) -> Value:
            known = ahead.find_spelling(identifier, type_name, value, uow.limits) if ahead is not None else None
            return spell(type_name, value, uow.limits) if known is None else known

        ahead = self.ahead
        meant = self.meant(lambda identifier: uow.find_last_type(self.session_id, identifier), spelled)
        # Quickly compared: the large texts in them are the very same.
        return ahead.fingerprint if ahead is not None and ahead.meant == meant else meant.fingerprint()

    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of what was asked, the same for equal requests whatever the order of their maps."""
        asked = json.dumps([self.cause, self._said()], sort_keys=True, default=_digest)
        return sha256(asked.encode()).hexdigest()

    def _said(self) -> dict[str, Any]:
        return asdict(self)


def _digest(value: object) -> str:
    return sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)


def check_text(field: str, text: str, length: int, setting: str) -> str:
    """`text` as an id or a name: not empty, not longer than `length`, without control characters or surrogates."""
    if not text:
        raise InvalidArgumentError(field, "it must not be empty")
    if len(text) > length:
        raise LimitExceededError(f"the length of {field} {quote(text)}", len(text), length, setting)
    if not text.isprintable():
        for character in text:
            if character < " " or character == "\x7f" or "\ud800" <= character <= "\udfff":
                raise InvalidArgumentError(field, f"{quote(text)} contains the control character {character!r}")
    return text


def check_metadata(metadata: Mapping[str, str], limits: Limits) -> Mapping[str, str]:
    """`metadata` if it is within the limits, free of NUL and surrogates, and leaves our own keys alone."""
    if not metadata:
        return metadata
    if len(metadata) > limits.metadata_entries:
        raise LimitExceededError(
            "number of metadata entries", len(metadata), limits.metadata_entries, "metadata_entries"
        )
    size = 0
    for key, text in metadata.items():
        if key == RESERVED_KEY or key.startswith(RESERVED_PREFIX):
            raise InvalidArgumentError("metadata", f"the key {key!r} is set by the server; use another key")
        try:
            size += len(key.encode()) + len(text.encode())
        except UnicodeEncodeError:
            raise InvalidArgumentError("metadata", f"entry {quote(key)} is no valid Unicode") from None
    if size > limits.metadata_size_bytes:
        raise LimitExceededError(
            "size of the metadata in bytes", size, limits.metadata_size_bytes, "metadata_size_bytes"
        )
    return metadata


def check_merged_metadata(merged: Mapping[str, str], added: Mapping[str, str], limits: Limits) -> None:
    """The limits again, on what a merge adds up to; without this, many small writes grow a variable for ever."""
    if added:
        check_metadata(merged, limits)
