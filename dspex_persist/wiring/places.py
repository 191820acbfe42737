"""What addresses mean: a file, a server, a database that servers share, or what was probably meant."""

import os
import re
from pathlib import Path
from typing import Final, TypeAlias

from dspex_persist import addresses
from dspex_persist.addresses import DatabaseUrl, database_url
from dspex_persist.spelling import closest, did_you_mean, place_meant, quote
from dspex_persist.state.errors import InvalidArgumentError

_SCHEME: Final = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*):(?P<rest>.*)", re.DOTALL)
_HOST_AND_PORT: Final = re.compile(r"//(\[[^\[\]/]+\]|[^\[\]/:]+):[0-9]{1,5}")
_BARE_HOST_AND_PORT: Final = re.compile(r"(\[[^\[\]/]+\]|[^\[\]/:\s]+):[0-9]{1,5}")
_FORM_OF: Final = {
    "sqlite": "sqlite:///PATH",
    **addresses.FORM_OF,
    "grpc": "grpc://HOST:PORT",
    "grpcs": "grpcs://HOST:PORT",
    "grpc+unix": "grpc+unix:/PATH",
}
_DATABASES: Final = ", ".join(addresses.FORM_OF.values())
FORMS: Final = (
    f"a path, {_FORM_OF['sqlite']}, {_DATABASES}, {_FORM_OF['grpc']} or {_FORM_OF['grpc+unix']} (grpcs:// with TLS)"
)
Address: TypeAlias = str | os.PathLike[str] | DatabaseUrl
"""What names a place."""
IN_MEMORY: Final = ("memory:", ":memory:")


def place_of(url: Address, forms: str = FORMS) -> Path | DatabaseUrl | str:
    """Return the file at a URL, the database that it names, or the target of the server."""
    database = database_url(url) if isinstance(url, str) else url
    if isinstance(database, DatabaseUrl):
        return database
    if isinstance(url, bytes) or not isinstance(url, str | os.PathLike):
        raise InvalidArgumentError("url", f"it must be {forms}, not {type(url).__name__}")
    if not isinstance(url, str):
        return Path(url)
    match, meant = _SCHEME.match(url), _meant(url)
    if match is None and not meant and url not in ("", *IN_MEMORY):
        _refuse_word(url)
        return Path(url)
    scheme, rest = (match["scheme"].lower(), match["rest"]) if match is not None else ("", "")
    if scheme == "sqlite" and len(rest) > 3 and rest.startswith("///"):
        return Path(rest[3:])
    if scheme == "grpc" and _HOST_AND_PORT.fullmatch(rest):
        return rest[2:]
    if scheme == "grpcs" and _HOST_AND_PORT.fullmatch(rest):
        return f"{scheme}:{rest}"
    if scheme == "grpc+unix" and rest.strip("/"):
        return f"unix:{re.sub('^//(?=/)', '', rest)}"
    if url in IN_MEMORY:
        hint = "only the process that has a state in memory can query it: provider.audit()"
    else:
        hint = did_you_mean(meant, spell=str) or did_you_mean(_respelled(scheme, rest))
    raise InvalidArgumentError("url", "; ".join(filter(None, (f"{quote(addresses.shown(url))} is not {forms}", hint))))


def _refuse_word(url: str) -> None:
    """Refuse a word that was hardly meant to be the name of a file: the file would appear without a hint."""
    meant = {"": "", "memory": "memory:", "file": "sqlite:///PATH", "server": "grpc://HOST:PORT"}[place_meant(url)]
    if meant:
        hint = f"{did_you_mean(meant, spell=str)} For the file, write {quote(f'./{url}')}"
        raise InvalidArgumentError("url", f"{quote(url)} would be the name of a file; {hint}")


def _respelled(scheme: str, rest: str) -> str | None:
    """Return the URL, without its password, with its misspelled scheme corrected, or only the form of such URLs."""
    meant = closest(scheme, _FORM_OF) if scheme not in _FORM_OF else None
    if meant is None:
        return None
    try:
        place_of(f"{meant}:{rest}")
    except InvalidArgumentError:
        return _FORM_OF[meant]
    return addresses.shown(f"{meant}:{rest}")


def _meant(url: str) -> str:
    """Return the likely URL for a server's address without `grpc`, or with another scheme; "" for other texts."""
    address = re.sub("^(https?|grpcs?|tcp):(//)?", "", url, flags=re.IGNORECASE).removesuffix("/")
    if _BARE_HOST_AND_PORT.fullmatch(address):
        return f"{'grpcs' if url.lower().startswith(('grpcs', 'https')) else 'grpc'}://{address}"
    if re.fullmatch(":[0-9]{1,5}", address):
        return f"grpc://127.0.0.1{address}"
    return f"grpc+unix{url[4:]}" if re.match("unix:.*[^/]", url, re.IGNORECASE) else ""
