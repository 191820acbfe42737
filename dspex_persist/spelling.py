"""Names in messages: suggests the likely name for a misspelled one, and shows names on one line."""

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from itertools import islice
from typing import Final, Literal

_QUOTED = 60
_COMPARED_LENGTH, _MOST_COMPARED = 60, 1_000
_LIKENESS: Final = 0.6
_SHORT: Final = 2
_IN_MEMORY: Final = ("local", "memory")
_PLACES: Final[dict[str, Literal["memory", "file", "server"]]] = {
    **dict.fromkeys(("inmemory", "mem", "ram"), "memory"),
    **dict.fromkeys(("embedded", "file", "sqlite"), "file"),
    **dict.fromkeys(("bridged", "grpc", "localhost", "remote", "server"), "server"),
}
_PLACE_LIKENESS: Final = 0.8


def closest(asked: str, names: Iterable[str], likeness: float = _LIKENESS, *, most: int = 20) -> str | None:
    """Return the name that was probably meant, or None if none is similar enough.

    A long text is not taken for a misspelling, so that no client can make a server compare megabytes.

    Args:
        asked: The unknown name.
        names: The known names.
        likeness: The least ratio of difflib, from 0 to 1.
        most: If there are more names than this, only this many are compared: those of a similar length that have the
            same beginning or end.
    """
    length = len(asked)
    if not 1 < length <= _COMPARED_LENGTH:
        return None
    compared = list(islice(names, _MOST_COMPARED))
    if length == _SHORT:
        plain = [name for name in compared if _is_plain(asked, name)]
        return plain[0] if len(plain) == 1 else None
    if len(compared) > most:
        alike = (
            name
            for name in compared
            if -3 < len(name) - length < 3 and (name[:2] == asked[:2] or name[-2:] == asked[-2:])
        )
        compared = list(islice(alike, most))
    near = get_close_matches(asked, (name for name in compared if len(name) <= 2 * _COMPARED_LENGTH), 1, likeness)
    return near[0] if near else None


def _is_plain(asked: str, name: str) -> bool:
    """Return whether `name` is a name of two letters in other case or order, or with a letter more.

    Ratios mean little for so short a text: one wrong letter of two is half of it.
    """
    if len(name) == _SHORT:
        return asked.lower() == name.lower() or asked == name[::-1]
    return len(name) == _SHORT + 1 and asked in (name[1:], name[:-1], name[0] + name[2])


def place_meant(word: str) -> Literal["", "memory", "file", "server"]:
    """Return what an address that is a bare word was probably meant to be, although it could be the name of a file.

    Returns:
        "" if it is the name of a file, as every word with a suffix or a folder is, or if it is an address.
    """
    if word in ("memory:", ":memory:"):
        return ""
    plain = "".join(each for each in word.lower() if each not in "-_ :")
    if not plain.isalpha():
        return ""
    return "memory" if closest(plain, _IN_MEMORY, _PLACE_LIKENESS) else _PLACES.get(plain, "")


def quote(text: object) -> str:
    """Return `text` in quotes, on one line, shortened for a message."""
    # The __str__ of a subclass, such as an enumeration's, may return anything, or raise.
    plain = str.__str__(text) if isinstance(text, str) else str(text)
    shown = repr(plain[: _QUOTED + 1])
    return shown if len(shown) <= _QUOTED else f"{shown[:_QUOTED]}...'"


def did_you_mean(*meant: str | None, spell: Callable[[str], str] = quote) -> str:
    """Return "did you mean ...?" for the names that are not empty, or "" without any. `spell` formats a name."""
    names = [spell(name) for name in meant if name]
    return f"did you mean {', '.join(names)}?" if names else ""


def shorten(text: str, width: int) -> str:
    """Return at most `width` characters of `text`; one that is longer ends in "..."."""
    return text if len(text) <= width else f"{text[: width - 3]}..."


def printable(text: str) -> str:
    """Return `text` on one line, with escapes for characters that cannot be printed."""
    return text if text.isprintable() else "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)
