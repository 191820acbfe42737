"""Addresses of databases that servers share: which there are, and what of them may be shown."""

import re
from dataclasses import dataclass, field
from typing import Final

FORM_OF: Final = {"postgresql": "postgresql://USER@HOST/DATABASE", "redis": "redis://HOST:PORT/NUMBER"}
"""The schemes of their URLs, each with the form of such a URL. The extra of this package that a scheme needs has its
name."""
_SYNONYMS: Final = {
    "postgres": "postgresql",
    **dict.fromkeys(("rediss", "redis+unix", "valkey", "valkeys", "valkey+unix"), "redis"),
}
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_USER: Final = re.compile(r"(://[^:@/?#]*):.*@", re.DOTALL)
# Without a host, what follows the colon is no port, unless it is a number.
_LEFT_OUT: Final = re.compile(r"(://[^:@/?#\[\],]*):(?![0-9]{0,5}(?:[,/?#]|$))[^@]*$", re.DOTALL)
_SECRET: Final = re.compile(r"([?&](?:ssl)?password=)[^&#]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class DatabaseUrl:
    """The URL of a database. As a text it has no password, so that it can be in errors and logs.

    Attributes:
        scheme: What it begins with: a key of `FORM_OF`.
        url: All of it: only for whoever connects.
    """

    scheme: str
    url: str = field(repr=False)

    def __str__(self) -> str:
        return shown(self.url)


def database_url(text: str) -> DatabaseUrl | None:
    """Return the URL of a database; None if the text is something else."""
    scheme = scheme_of(text)
    return DatabaseUrl(scheme, text) if scheme in FORM_OF else None


def scheme_of(text: str) -> str | None:
    """Return what a URL begins with; None if the text is no URL."""
    match = _SCHEME.match(text)
    return None if match is None else _SYNONYMS.get(match[1].lower(), match[1].lower())


def shown(url: str) -> str:
    """Return a URL without its password, also one that is misspelled."""
    return _SECRET.sub(r"\1***", _LEFT_OUT.sub(r"\1:***", _USER.sub(r"\1:***@", url)))
