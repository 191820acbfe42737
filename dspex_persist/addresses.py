"""Addresses of databases that servers share: which there are, and what of them may be shown."""

import getpass
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import parse_qsl, unquote, urlsplit

FORM_OF: Final = {"postgresql": "postgresql://USER@HOST/DATABASE", "redis": "redis://HOST:PORT/NUMBER"}
"""The schemes of their URLs, each with the form of such a URL. The extra of this package that a scheme needs has its
name."""
_SYNONYMS: Final = {
    "postgres": "postgresql",
    **dict.fromkeys(("rediss", "redis+unix", "valkey", "valkeys", "valkey+unix"), "redis"),
}
_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_ONE_SLASH: Final = re.compile(rf"^({'|'.join(map(re.escape, (*FORM_OF, *_SYNONYMS)))}):/?(?!/)", re.IGNORECASE)
# Without a host, what follows the colon is no port, unless it is a number.
_LEFT_OUT: Final = re.compile(r"([^:@/?#\[\],]*):(?![0-9]{0,5}(?:[,/?#]|$)).*", re.DOTALL)
_COLON: Final = re.compile(":|%3A", re.IGNORECASE)
# Whatever else there is, or is meant by a misspelled name, may be a secret.
_HARMLESS: Final = re.compile(
    "schema|prefix|assume|db|ssl_(ca_certs|certfile|keyfile)"
    "|host(addr)?|port|dbname|user|service(file)?|passfile|(fallback_)?application_name|client_encoding"
    "|connect_timeout|keepalives(_idle|_interval|_count)?|tcp_user_timeout|target_session_attrs|load_balance_hosts"
    "|ssl(mode|negotiation|compression|cert|key|rootcert|crl|crldir|sni|certmode)|requiressl|requirepeer|require_auth"
    "|(ssl_)?(min|max)_protocol_version|channel_binding|gss(encmode|lib|delegation)|krbsrvname|replication",
    re.IGNORECASE,
)
_HIDDEN: Final = "***"


@dataclass(frozen=True, slots=True)
class DatabaseUrl:
    """The URL of a database. As a text it has no password, so that it can be in errors and logs.

    Attributes:
        scheme: What it begins with: a key of `FORM_OF`.
        url: All of it, the scheme in small letters: only for whoever connects.
    """

    scheme: str
    url: str = field(repr=False)

    def __str__(self) -> str:
        return shown(self.url)


def database_url(text: str) -> DatabaseUrl | None:
    """Return the URL of a database; None if the text is something else."""
    scheme = scheme_of(text)
    return DatabaseUrl(scheme, in_small_letters(text)) if scheme in FORM_OF else None


def in_small_letters(url: str) -> str:
    """Return a URL with its scheme in small letters: any may be written, but not every driver reads them."""
    match = _SCHEME.match(url)
    return url if match is None else f"{match[1].lower()}{url[match.end(1) :]}"


def scheme_of(text: str) -> str | None:
    """Return what a URL begins with; None if the text is no URL."""
    match = _SCHEME.match(text)
    return None if match is None else _SYNONYMS.get(match[1].lower(), match[1].lower())


def form_of_misspelled(text: str) -> str | None:
    """Return the form of the URL that a text is meant to be that has no two slashes after its scheme; or else None."""
    match = _ONE_SLASH.match(text)
    return None if match is None else FORM_OF[_SYNONYMS.get(match[1].lower(), match[1].lower())]


def shown(url: str) -> str:
    """Return a URL without its password, also one that is misspelled."""
    if match := _ONE_SLASH.match(url):
        return shown(f"{match[1]}://{url[match.end() :]}").replace(f"{match[1]}://", match[0], 1)
    scheme, mark, rest = url.partition("://")
    if not mark:
        return url
    query = rest.partition("?")[2]
    # An "@" may be in a parameter, or in a password that should have it as %40.
    end = rest.partition("?")[0].rfind("@") if _has_no_secret(query) else rest.rfind("@")
    if end >= 0:
        rest = f"{_without_password(scheme, rest[:end])}{rest[end:]}"
    elif left_out := _LEFT_OUT.fullmatch(rest):
        return f"{scheme}://{left_out[1]}:{_HIDDEN}"
    head, question, query = rest.partition("?")
    return f"{scheme}://{head}{question}{'&'.join(map(_without_secret, query.split('&')))}"


def is_harmless(parameter: str) -> bool:
    """Whether the value of a parameter of a URL may be shown, whatever it is."""
    return _HARMLESS.fullmatch(parameter) is not None


def _has_no_secret(query: str) -> bool:
    return all(_without_secret(each) == each for each in query.split("&"))


def _without_secret(parameter: str) -> str:
    name, equals, _ = parameter.partition("=")
    if not parameter or (equals and is_harmless(unquote(name))):
        return parameter
    return f"{name}={_HIDDEN}" if equals else _HIDDEN


def _without_password(scheme: str, user: str) -> str:
    colon = _COLON.search(user)
    if colon is not None:
        return f"{user[: colon.start()]}:{_HIDDEN}"
    # Who writes only one there may mean the password: no user of Redis is without one.
    return _HIDDEN if user and _SYNONYMS.get(scheme.lower(), scheme.lower()) == "redis" else user


def canonical(url: str) -> str:
    """Return a text that all URLs of one place have in common, however they are written and whoever connects.

    What is left out is filled in as the drivers do. Names of hosts are not looked up.

    Args:
        url: The URL of a database.
    """
    try:
        return _place_of_redis(url) if scheme_of(url) == "redis" else _place_of_postgresql(url)
    except (ValueError, KeyError, OSError):
        # It is malformed, or this process has no user with a name.
        return shown(url)


def _place_of_redis(url: str) -> str:
    parts, given = urlsplit(url), _parameters(url)
    prefix = given.get("prefix", "dspex")
    if parts.scheme.lower().endswith("+unix"):
        return f"redis+unix://{unquote(parts.path)}?db={int(given.get('db', '0'))}&prefix={prefix}"
    number = int(parts.path.strip("/") or "0")
    return f"redis://{_host_and_port(parts.hostname or '', parts.port or 6379)}/{number}?prefix={prefix}"


def _place_of_postgresql(url: str) -> str:
    parts, given = urlsplit(url), _parameters(url)
    user, _, hosts = parts.netloc.rpartition("@")
    found = [re.fullmatch(r"(\[.*\]|[^:]*)(?::([0-9]*))?", each) for each in hosts.split(",")]
    names = [unquote(each[1] if each else "").strip("[]") for each in found]
    ports = [each[2] or "" if each else "" for each in found]
    if wanted := given.get("hostaddr") or given.get("host") or ("" if any(names) else os.environ.get("PGHOST")):
        names = wanted.split(",")
    if wanted := given.get("port") or ("" if any(ports) else os.environ.get("PGPORT")):
        ports = wanted.split(",")
    if len(ports) != len(names):
        ports = ports[:1] * len(names)
    places = sorted(_host_and_port(name, int(port or 5432)) for name, port in zip(names, ports, strict=True))
    database = given.get("dbname") or unquote(parts.path.removeprefix("/")) or os.environ.get("PGDATABASE")
    service = given.get("service") or os.environ.get("PGSERVICE") or ""
    if not database and not service:
        # That of the user's name.
        database = given.get("user") or unquote(user.partition(":")[0]) or os.environ.get("PGUSER") or getpass.getuser()
    schema = given.get("schema", "public")
    return f"postgresql://{','.join(places)}/{database or ''}?schema={schema}&service={service}"


def _parameters(url: str) -> Mapping[str, str]:
    # As libpq reads them, "+" is no space.
    return dict(parse_qsl(urlsplit(url).query.replace("+", "%2B"), keep_blank_values=True))


def _host_and_port(host: str, port: int) -> str:
    return f"{host if host.startswith('/') else host.lower()}:{port}"
