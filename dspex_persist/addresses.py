"""Addresses of databases that servers share: which there are, and what of them may be shown."""

import re
from dataclasses import dataclass, field
from typing import Final

EXTRA_OF: Final = {"postgresql": "postgresql", "postgres": "postgresql"}
"""The schemes of their URLs, and the extra of this package that each needs."""
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_USER: Final = re.compile(r"(://[^:@/?#]*):.*@", re.DOTALL)
_SECRET: Final = re.compile(r"([?&](?:ssl)?password=)[^&#]*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class DatabaseUrl:
    """The URL of a database. As a text it has no password, so that it can be in errors and logs.

    Attributes:
        url: All of it: only for whoever connects.
    """

    url: str = field(repr=False)

    def __str__(self) -> str:
        return shown(self.url)

    @property
    def scheme(self) -> str:
        """What it begins with."""
        return self.url.partition(":")[0].lower()


def database_url(text: str) -> DatabaseUrl | None:
    """Return the URL of a database; None if the text is something else."""
    match = _SCHEME.match(text)
    return DatabaseUrl(text) if match is not None and match[1].lower() in EXTRA_OF else None


def shown(url: str) -> str:
    """Return a URL without its password, also one that is misspelled."""
    return _SECRET.sub(r"\1***", _USER.sub(r"\1:***@", url))
