"""Errors of the database file, and of opening it."""

import os
from dataclasses import dataclass

from dspex_persist.state.errors.base import OpenError, StateError
from dspex_persist.state.errors.hints import Hint


@dataclass(eq=False)
class StorageError(StateError):
    """The storage refused the whole group of writes; nothing of it was kept."""

    template = "nothing was written: {reason}"
    retryable = True
    reason: str


@dataclass(eq=False)
class ReadFailedError(StateError):
    """The database could not be read; nothing has changed."""

    template = "{path} could not be read: {reason}"
    retryable = True
    path: str
    reason: str


@dataclass(eq=False)
class FileChangedError(StateError):
    """Another program replaced or changed the files of the store, so that this process cannot use them any longer."""

    template = "{path} cannot be used any longer: {reason}"
    advice = Hint.PUT_BACK_FILE
    path: str
    reason: str


@dataclass(eq=False)
class CheckpointError(StateError):
    """Closing could not move the write-ahead log into the database file."""

    template = "the write-ahead log of {path} could not be moved into the file: {reason}"
    advice = Hint.KEEP_WAL
    path: str
    reason: str


@dataclass(eq=False)
class DatabaseInUseError(OpenError):
    """This or another process owns the database.

    `address` is where the owner serves it, if it is a server.
    """

    template = "{path} is in use by {holder}: one server owns a database"
    advice = Hint.SHARE_BY_SERVER
    path: str
    pid: int | None
    address: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pid == os.getpid():
            self.advice = Hint.CLOSE_FIRST

    @property
    def holder(self) -> str:
        """The owner, as far as it is known."""
        process = f"process {self.pid}" if self.pid else "another process"
        return f"{process}, the server at {self.address}" if self.address else process

    @property
    def sentence(self) -> str:
        """As for all errors, with another text if this process itself owns the database."""
        if self.advice is Hint.CLOSE_FIRST:
            return f"{self.path} is open in this process already (process {self.pid})"
        return super().sentence


@dataclass(eq=False)
class NotADatabaseError(OpenError):
    """The file is not a dspex-persist database, or cannot be opened; or a shared database must not be used as it is."""

    template = "cannot open {path}: {reason}"
    path: str
    reason: str


@dataclass(eq=False)
class NewerSchemaError(OpenError):
    """The file was written by a newer release."""

    template = (
        "{path} has schema revision {revision}, this release knows up to {known}: it was written by a newer release"
    )
    advice = Hint.UPGRADE_PACKAGE
    path: str
    revision: str
    known: str


@dataclass(eq=False)
class UpgradeError(OpenError):
    """A migration failed; nothing has changed. `kind`: whether it is one of a file, or of a database."""

    template = "the upgrade of {path} to {revision} failed, the {kind} is unchanged: {reason}"
    path: str
    revision: str
    reason: str
    kind: str = "file"


@dataclass(eq=False)
class LostCommitsError(OpenError):
    """The database is behind its anchor, or does not match it: acknowledged commits are missing."""

    template = "{path} has lost acknowledged commits: {reason}"
    advice = Hint.RESTORE_BACKUP
    path: str
    reason: str
