"""Bearer tokens: a file says who has which, and what they may do. Knows no rpcs.

The file has one line for each token, and only its SHA-256, so that nobody who reads the file can use it:

    # NAME    SCOPES        SHA-256 of the token
    checkout  read,write    sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b

It is read again when it changes, so a token is revoked by removing its line.
"""

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dspex_persist.errors import DspexError
from dspex_persist.infra.logs import get_logger

READ, WRITE, EXECUTE, ADMIN = SCOPES = ("read", "write", "execute", "admin")
_NAME: Final = re.compile(r"[A-Za-z0-9._@:/-]{1,64}")
_HASH: Final = re.compile(r"sha256:([0-9a-f]{64})")
_LINE: Final = "a line is NAME SCOPES sha256:HASH, with the scopes separated by commas"
# What only the owner, and readers in its group, may do.
_FORBIDDEN: Final = stat.S_IWGRP | stat.S_IRWXO
_log: Final = get_logger(__name__)


@dataclass(eq=False)
class TokenFileError(DspexError):
    """A file of tokens cannot be used, for the given `reason`."""

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who has a token: a name, and the scopes."""

    name: str
    scopes: frozenset[str]

    def may(self, scope: str) -> bool:
        """Return whether it has the scope; "admin" has all."""
        return scope in self.scopes or ADMIN in self.scopes


CALLER: Final[ContextVar[Identity | None]] = ContextVar("dspex_persist_caller", default=None)
"""Who makes the call that is being handled; None if the server demands no tokens."""


class Tokens:
    """The tokens in a file. Used on one thread.

    Args:
        path: The file. It belongs to the user of this process, or to root; others may neither read nor change it.

    Attributes:
        path: The file.

    Raises:
        TokenFileError: It cannot be used. If it becomes unusable later, no token is valid any longer; of lines that
            are wrong, only those tokens.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = _signature(path)
        self._tokens, faults = _read(path)
        if faults:
            raise TokenFileError(str(path), faults[0])

    def find(self, token: str) -> Identity | None:
        """Return who has the token, or None."""
        self._refresh()
        digest = hashlib.sha256(token.encode(errors="surrogateescape")).digest()
        found = None
        # All of them, so that the time tells nothing about which one was almost right.
        for known, identity in self._tokens:
            if hmac.compare_digest(known, digest):
                found = identity
        return found

    def _refresh(self) -> None:
        now = _signature(self.path)
        if now == self._seen:
            return
        self._seen = now
        try:
            self._tokens, faults = _read(self.path)
        except TokenFileError as error:
            self._tokens = []
            _log.error("no token is valid until the file can be used", file=error.path, reason=error.reason)
            return
        for fault in faults:
            _log.error("a line of the token file was left out", file=str(self.path), reason=fault)
        _log.info("read the token file", file=str(self.path), tokens=len(self._tokens))


def add(path: Path, name: str, scopes: Iterable[str]) -> str:
    """Add a new token to a file, which is created if missing, and return it: nothing else keeps it.

    Args:
        path: The file.
        name: Whose it is; a name may have several.
        scopes: What it may do.

    Raises:
        TokenFileError: The file cannot be used or written, or the name or a scope is wrong.
    """
    # With a letter first, so that no command takes it for an option.
    token = f"dspex_{secrets.token_urlsafe(32)}"
    line = f"{name} {','.join(scopes)} sha256:{hashlib.sha256(token.encode()).hexdigest()}"
    try:
        _check_name(name)
        _parsed(line.split())
    except ValueError as error:
        raise TokenFileError(str(path), str(error)) from error
    text = _text(path) if path.exists() else ""
    _replace(path, f"{text}{line}\n" if not text or text.endswith("\n") else f"{text}\n{line}\n")
    return token


def listed(path: Path) -> list[Identity]:
    """Return whose tokens are in a file, one for each. Raise `TokenFileError` if a line, or the file, is wrong."""
    tokens, faults = _read(path)
    if faults:
        raise TokenFileError(str(path), faults[0])
    return [identity for _, identity in tokens]


def revoke(path: Path, name: str) -> int:
    """Remove all tokens of a name from a file, and return how many; raise `TokenFileError` if it cannot be used."""
    lines = _text(path).splitlines(keepends=True)
    kept = [line for line in lines if line.partition("#")[0].split()[:1] != [name]]
    if len(kept) < len(lines):
        _replace(path, "".join(kept))
    return len(lines) - len(kept)


def _replace(path: Path, text: str) -> None:
    """Put a file in the place of another at once, so that a server never reads half of it."""
    beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        status = path.stat() if path.exists() else None
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            if status is not None:
                os.fchown(descriptor, status.st_uid, status.st_gid)
                os.fchmod(descriptor, stat.S_IMODE(status.st_mode))
            file.flush()
            os.fsync(descriptor)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise TokenFileError(str(path), f"cannot write it: {error.strerror or error}") from error


def _read(path: Path) -> tuple[list[tuple[bytes, Identity]], list[str]]:
    """Return the tokens, and what is wrong with the other lines. Raises `TokenFileError` for the file as a whole."""
    content = _text(path)
    tokens: dict[bytes, Identity] = {}
    faults: list[str] = []
    for number, line in enumerate(content.splitlines(), 1):
        text = line.partition("#")[0].split()
        if not text:
            continue
        try:
            digest, identity = _parsed(text)
        except ValueError as error:
            faults.append(f"line {number}: {error}")
            continue
        if digest in tokens:
            # Whose it is, and what it may do, would depend on the order.
            faults.append(f"line {number}: the token of another line")
            continue
        tokens[digest] = identity
    return list(tokens.items()), faults


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            _check_access(path, os.fstat(file.fileno()))
            return file.read().decode()
    except OSError as error:
        raise TokenFileError(str(path), f"cannot read it: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TokenFileError(str(path), "it is not UTF-8") from error


def _parsed(text: list[str]) -> tuple[bytes, Identity]:
    if len(text) != 3:
        raise ValueError(_LINE)
    name, scopes, digest = text
    _check_name(name)
    given = scopes.split(",")
    unknown = [scope for scope in given if scope not in SCOPES]
    if unknown:
        raise ValueError(f"there is no scope {unknown[0]!r}: the scopes are {', '.join(SCOPES)}")
    match = _HASH.fullmatch(digest.lower())
    if match is None:
        raise ValueError(f"the last word is not sha256: and 64 hexadecimal digits; {_LINE}")
    return bytes.fromhex(match[1]), Identity(name, frozenset(given))


def _check_name(name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise ValueError("a name has at most 64 letters, digits and ._@:/-")


def _check_access(path: Path, status: os.stat_result) -> None:
    mode = stat.S_IMODE(status.st_mode)
    if not stat.S_ISREG(status.st_mode):
        raise TokenFileError(str(path), "it is not a file")
    if mode & _FORBIDDEN:
        reason = f"its mode is {mode:04o}, so that other users may read or change it: chmod 600 {path}"
        raise TokenFileError(str(path), reason)
    if status.st_uid not in (0, os.geteuid()):
        raise TokenFileError(str(path), "it belongs to another user, who could change it")


def _signature(path: Path) -> tuple[int, ...]:
    try:
        status = path.stat()
    except OSError:
        return ()
    return (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
