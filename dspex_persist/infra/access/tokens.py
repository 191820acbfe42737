"""Tokens and certificates of clients: a file says who has which, what they may do, and how much. Knows no rpcs.

The file has one line for each token, with only its SHA-256, so that nobody who reads the file can use it, and for each
certificate, with a name in it:

    # NAME    SCOPES      CREDENTIAL                                                               ALLOWANCE
    checkout  read,write  sha256:2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b  rate=100/s
    reports   read        cert:reports.example.org                                                 expires=2027-01-01

It is read again when it changes, so a token is revoked by removing its line.
"""

import fcntl
import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from dspex_persist import clock
from dspex_persist.errors import DspexError
from dspex_persist.infra import forks
from dspex_persist.infra.logs import get_logger

READ, WRITE, EXECUTE, ADMIN = SCOPES = ("read", "write", "execute", "admin")
_NAME: Final = re.compile(r"[A-Za-z0-9._@:/-]{1,64}")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_TOKEN, _CERTIFICATE = "sha256:", "cert:"
_LINE: Final = "a line is NAME SCOPES sha256:HASH, with the scopes separated by commas"
_RATE: Final = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,6})?)/(s|min|h)")
_SECONDS: Final = {"s": 1, "min": 60, "h": 3_600}
_SIZE: Final = re.compile(r"([0-9]{1,15})(B|KiB|MiB|GiB|TiB|)")
_UNITS: Final = {"": 1, "B": 1, "KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}
_AGE: Final = re.compile(r"([0-9]{1,8})(min|h|d|w)")
_AGES: Final = {"min": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1), "w": timedelta(weeks=1)}
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
class Allowance:
    """How much an identity may do; None: as much as it likes.

    Attributes:
        rate: Calls per second, on average; after a pause, as many at once as one second allows, or one.
        inflight: Calls in progress at the same time, streams included.
        sessions: Live sessions.
        bytes: Stored bytes of them.
    """

    rate: float | None = None
    inflight: int | None = None
    sessions: int | None = None
    bytes: int | None = None

    @property
    def counts_calls(self) -> bool:
        """Whether it limits calls."""
        return self.rate is not None or self.inflight is not None


@dataclass(frozen=True, slots=True)
class Identity:
    """Who has a token or a certificate.

    Attributes:
        name: The name, for the history.
        scopes: What it may do.
        allowance: How much.
        expires_at: When the token stops being valid (aware, UTC); None for never.
        certificate: The name in the certificate; "" for a token.
    """

    name: str
    scopes: frozenset[str]
    allowance: Allowance = Allowance()
    expires_at: datetime | None = None
    certificate: str = ""

    def may(self, scope: str) -> bool:
        """Return whether it has the scope; "admin" has all."""
        return scope in self.scopes or ADMIN in self.scopes

    @property
    def has_expired(self) -> bool:
        """Whether the token is not valid any longer."""
        return self.expires_at is not None and clock.now() >= self.expires_at


UNLIMITED: Final = Allowance()

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
        self._fault = ""
        # The token that was found last.
        self._last: tuple[bytes, Identity] | None = None
        self._readings = 0
        lines, faults = _read(path)
        if faults:
            raise TokenFileError(str(path), faults[0])
        self._take(lines)

    def find(self, token: str) -> Identity | None:
        """Return who has the token; None if nobody has it, or not any longer."""
        identity = self.look_up(digest_of(token))
        return None if identity is None or identity.has_expired else identity

    def look_up(self, digest: bytes) -> Identity | None:
        """Return who has the token with this SHA-256, also if it has expired; or None."""
        self._refresh()
        last = self._last
        if last is not None and hmac.compare_digest(last[0], digest):
            # Each call is looked up twice, before and after its request is read.
            return last[1]
        found = None
        # All of them, so that the time tells nothing about which one was almost right.
        for known, identity in self._tokens:
            if hmac.compare_digest(known, digest):
                found = identity
        if found is not None:
            self._last = digest, found
        return found

    def find_certificate(self, names: Iterable[str]) -> Identity | None:
        """Return whose certificate has these names, by the first of them that has a line, also if that has expired."""
        self._refresh()
        return next((self._certificates[name] for name in names if name in self._certificates), None)

    def allowance_of(self, name: str) -> Allowance:
        """Return how much an identity may do: of several lines for one name, the most of each. On any thread."""
        return self._allowances.get(name, UNLIMITED)

    @property
    def readings(self) -> int:
        """How often the file has been read: what was found before holds as long as this stays, and until it expires."""
        self._refresh()
        return self._readings

    def _take(self, lines: "Lines") -> None:
        self._readings += 1
        self._last = None
        self._tokens = [(credential, each) for credential, each in lines.items() if isinstance(credential, bytes)]
        self._certificates = {name: each for name, each in lines.items() if isinstance(name, str)}
        allowances: dict[str, Allowance] = {}
        for each in lines.values():
            known = allowances.get(each.name)
            allowances[each.name] = each.allowance if known is None else _most(known, each.allowance)
        self._allowances = allowances

    def _refresh(self) -> None:
        now = _signature(self.path)
        if now == self._seen:
            return
        try:
            lines, faults = _read(self.path)
        except TokenFileError as error:
            # What the system refused, as without a free descriptor, it may allow the next time.
            self._seen = _UNREAD if isinstance(error.__cause__, OSError) else now
            if error.reason != self._fault:
                self._fault = error.reason
                self._take({})
                _log.error("no token is valid until the file can be used", file=error.path, reason=error.reason)
            return
        self._seen, self._fault = now, ""
        for fault in faults:
            _log.error("a line of the token file was left out", file=str(self.path), reason=fault)
        self._take(lines)
        _log.info("read the token file", file=str(self.path), tokens=len(lines))


def digest_of(token: str) -> bytes:
    """Return the SHA-256 of a token."""
    return hashlib.sha256(token.encode(errors="surrogateescape")).digest()


def _most(one: Allowance, other: Allowance) -> Allowance:
    pairs = {each.name: (getattr(one, each.name), getattr(other, each.name)) for each in fields(Allowance)}
    return Allowance(**{name: None if None in pair else max(pair) for name, pair in pairs.items()})


def add(path: Path, name: str, scopes: Iterable[str], allowance: Mapping[str, str] | None = None) -> str:
    """Add a new token to a file, which is created if missing, and return it: nothing else keeps it.

    Args:
        path: The file.
        name: Whose it is; a name may have several.
        scopes: What it may do.
        allowance: How much, and until when, as words of the line: {"rate": "100/s", "expires": "2027-01-01"}. An age
            such as 90d expires that long from now.

    Raises:
        TokenFileError: The file cannot be used or written, or the name, a scope or a word is wrong, or makes no sense
            for a new token, such as an end in the past.
    """
    # With a letter first, so that no command takes it for an option.
    token = f"dspex_{secrets.token_urlsafe(32)}"
    digest = f"{_TOKEN}{hashlib.sha256(token.encode()).hexdigest()}"
    given = tuple(dict.fromkeys(scopes))
    try:
        # Each by itself: in the line, a space or a line break would begin another word or line.
        _check_name(name)
        _check_scopes(given)
        words = [_new_word(key, text) for key, text in (allowance or {}).items()]
    except ValueError as error:
        raise TokenFileError(str(path), str(error)) from error
    line = " ".join((name, ",".join(given), digest, *words))
    with _changing(path) as file:
        text = _text(file) if file.exists() else ""
        _replace(file, f"{text}{line}\n" if not text or text.endswith("\n") else f"{text}\n{line}\n")
    return token


def listed(path: Path) -> list[Identity]:
    """Return whose tokens are in a file, one for each. Raise `TokenFileError` if a line, or the file, is wrong."""
    lines, faults = _read(path)
    if faults:
        raise TokenFileError(str(path), faults[0])
    return list(lines.values())


def revoke(path: Path, name: str) -> int:
    """Remove all tokens of a name from a file, and return how many; raise `TokenFileError` if it cannot be used."""
    with _changing(path) as file:
        lines = _text(file).splitlines(keepends=True)
        kept = [line for line in lines if line.partition("#")[0].split()[:1] != [name]]
        if len(kept) < len(lines):
            _replace(file, "".join(kept))
    return len(lines) - len(kept)


@contextmanager
def _changing(path: Path) -> Iterator[Path]:
    """Yield the file that a path leads to, which may be through a link, while nobody else adds or revokes tokens."""
    try:
        file = path.resolve()
        folder = forks.own(os.open(file.parent, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise TokenFileError(str(path), f"cannot write it: {error.strerror or error}") from error
    except RuntimeError as error:
        raise TokenFileError(str(path), "it is a link to itself") from error
    try:
        # The file itself is replaced. Some file systems of networks lock no folders.
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield file
    finally:
        forks.close(folder)


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


_UNREAD: Final = (-1,)
"""The signature of no file."""

Lines = Mapping[bytes | str, Identity]
"""Who has which credential: the SHA-256 of a token, or the name in a certificate."""


def _read(path: Path) -> tuple[Lines, list[str]]:
    """Return the lines, and what is wrong with the others. Raises `TokenFileError` for the file as a whole."""
    content = _text(path)
    tokens: dict[bytes | str, Identity] = {}
    faults: list[str] = []
    for number, line in enumerate(content.splitlines(), 1):
        text = line.partition("#")[0].split()
        if not text:
            continue
        try:
            if text[-1].lower().startswith(_CERTIFICATE) and f"{text[-1]}#" in line:
                # Without its end, the name would be that of another certificate.
                raise ValueError("a comment begins within the name of a certificate: put a space before #")
            digest, identity = _parsed(text)
        except ValueError as error:
            faults.append(f"line {number}: {error}")
            continue
        if digest in tokens:
            # Whose it is, and what it may do, would depend on the order.
            what = "certificate" if isinstance(digest, str) else "token"
            faults.append(f"line {number}: the {what} of another line")
            continue
        tokens[digest] = identity
    return tokens, faults


def _text(path: Path) -> str:
    try:
        # A pipe in its place would otherwise be waited for.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            _check_access(path, os.fstat(file.fileno()))
            # Some editors begin files with a mark of the order of bytes.
            return file.read().decode("utf-8-sig")
    except OSError as error:
        raise TokenFileError(str(path), f"cannot read it: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TokenFileError(str(path), "it is not UTF-8") from error


def _parsed(text: list[str]) -> tuple[bytes | str, Identity]:
    if len(text) < 3 or (len(text) > 3 and not text[2].lower().startswith((_TOKEN, _CERTIFICATE))):
        raise ValueError(_LINE)
    name, scopes, credential, *words = text
    _check_name(name)
    given = scopes.split(",")
    _check_scopes(given)
    identity = replace(_allowed(words), name=name, scopes=frozenset(given))
    certificate = credential.removeprefix(_CERTIFICATE)
    if certificate and certificate != credential:
        return certificate, replace(identity, certificate=certificate)
    digest = credential.lower().removeprefix(_TOKEN)
    if digest == credential.lower() or _HASH.fullmatch(digest) is None:
        raise ValueError(f"the third word is not sha256: and 64 hexadecimal digits, nor cert: and a name; {_LINE}")
    return bytes.fromhex(digest), identity


def _allowed(words: Iterable[str]) -> Identity:
    """Return an identity with what the words allow, without a name and scopes."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or key not in _WORDS:
            possible = ", ".join(f"{each}=" for each in _WORDS)
            raise ValueError(f"{word!r} means nothing after the credential: there are {possible}")
        if key in found:
            raise ValueError(f"{key}= is there twice")
        try:
            found[key] = _WORDS[key](text)
        except ValueError as error:
            raise ValueError(f"{word}: {error}") from None
    expires_at = found.pop(_EXPIRES, None)
    return Identity("", frozenset(), Allowance(**found), expires_at)


def _rate(text: str) -> float:
    match = _RATE.fullmatch(text)
    if match is None or not float(match[1]):
        raise ValueError("it must be a number of calls in a time, such as 100/s or 6/min")
    return float(match[1]) / _SECONDS[match[2]]


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 16 and int(text)):
        raise ValueError("it must be a whole number above 0")
    return int(text)


def _size(text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None or not int(match[1]):
        raise ValueError("it must be a size, such as 1GiB")
    return int(match[1]) * _UNITS[match[2]]


def _time(text: str) -> datetime:
    try:
        given = datetime.fromisoformat(text)
        return (given.replace(tzinfo=UTC) if given.tzinfo is None else given).astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError("it must be a day or a time in UTC, such as 2027-01-01 or 2027-01-01T12:00Z") from None


_EXPIRES: Final = "expires"
_WORDS: Final[Mapping[str, Callable[[str], object]]] = {
    "rate": _rate,
    "inflight": _count,
    "sessions": _count,
    "bytes": _size,
    _EXPIRES: _time,
}
"""What may follow the credential of a line."""


def _new_word(key: str, text: str) -> str:
    """Return a word for a new line. Raises `ValueError` for one that makes no sense there."""
    if key == _EXPIRES:
        return f"{key}={_new_end(text):%Y-%m-%dT%H:%M:%SZ}"
    given = getattr(_allowed([f"{key}={text}"]).allowance, key)
    least, most, what = _SENSIBLE[key]
    if not least <= given <= most:
        raise ValueError(f"{key}={text}: it must be {what}")
    return f"{key}={text}"


def _new_end(text: str) -> datetime:
    """Return when a new token ends. An age is from now: in the file it would begin anew whenever that is read."""
    match = _AGE.fullmatch(text)
    try:
        expires_at = clock.now() + int(match[1]) * _AGES[match[2]] if match else _time(text)
    except OverflowError:
        raise ValueError(f"{_EXPIRES}={text}: that is too long") from None
    except ValueError as error:
        raise ValueError(f"{_EXPIRES}={text}: {error}") from None
    if expires_at <= clock.now():
        raise ValueError(f"{_EXPIRES}={text}: it is over already, and nobody could use the token")
    return expires_at


_SENSIBLE: Final[Mapping[str, tuple[float, float, str]]] = {
    "rate": (1 / 86_400, 1e6, "at least a call in 24 hours (0.042/h), and at most 1000000/s"),
    "inflight": (1, 1e6, "at most 1000000 calls"),
    "sessions": (1, 1e9, "at most 1000000000 sessions"),
    "bytes": (1, 1024**5, "at most 1024TiB"),
}
"""The least and the most of a new line, beyond which a number is a slip. A line that is there means what it says."""


def _check_scopes(given: Iterable[str]) -> None:
    unknown = next((scope for scope in given if scope not in SCOPES), None)
    if unknown is not None:
        raise ValueError(f"there is no scope {unknown!r}: the scopes are {', '.join(SCOPES)}")


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
