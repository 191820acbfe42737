"""dspex-persist token: adds tokens to the file that a server reads, lists whose they are, and revokes them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from dspex_persist.cli.groups import Json, carry_out, new_group
from dspex_persist.cli.output import counted, plain, say

if TYPE_CHECKING:
    from dspex_persist.infra.access.tokens import Identity

HELP: Final = "Edit the file of tokens of a server (serve --token-file), which reads it again by itself."
EPILOG: Final = (
    "[bold]Examples[/bold]\n\n"
    "dspex-persist token new checkout --scopes read,write --token-file tokens\n\n"
    "dspex-persist token new reports --scopes read --expires 90d --rate 20/s --token-file tokens\n\n"
    "dspex-persist token list --token-file tokens\n\n"
    "dspex-persist token revoke checkout --token-file tokens\n\n"
    "[bold]Exit codes[/bold]\n\n"
    "0  success\n\n"
    "1  the file cannot be used or written, or revoke: it has no token of this name\n\n"
    "2  wrong usage, or an invalid setting\n\n"
)

app = new_group(HELP, EPILOG)

Name = Annotated[str, typer.Argument(metavar="NAME", help="Whose token it is.", show_default=False)]
File = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        metavar="PATH",
        show_default=False,
        readable=False,
        help="The file. [dim](as serve: DSPEX_PERSIST_TOKEN_FILE, the settings file)[/dim]",
    ),
]


def _file(given: Path | None) -> Path:
    from dspex_persist.settings import SettingsError, load_settings

    path = load_settings({"token_file": given}).token_file
    if path is None:
        raise SettingsError("token_file", "name the file with --token-file")
    return path


@app.command("new", help="Add a token, and print it. The file only keeps its SHA-256: it cannot be printed again.\n\n")
def new(
    name: Name,
    scopes: Annotated[
        str,
        typer.Option(
            "--scopes", metavar="LIST", help="read, write, execute, admin, separated by commas.", show_default=False
        ),
    ],
    expires: Annotated[
        str | None,
        typer.Option(
            "--expires", metavar="TIME", help="2027-01-01, a time in UTC, or 90d from now.", show_default=False
        ),
    ] = None,
    rate: Annotated[
        str | None,
        typer.Option("--rate", metavar="CALLS", help="Calls per time: 100/s, 60/min, 500/h.", show_default=False),
    ] = None,
    inflight: Annotated[
        str | None,
        typer.Option("--inflight", metavar="CALLS", help="Calls in progress at a time.", show_default=False),
    ] = None,
    sessions: Annotated[
        str | None,
        typer.Option("--sessions", metavar="NUMBER", help="Live sessions that it began.", show_default=False),
    ] = None,
    bytes_: Annotated[
        str | None,
        typer.Option("--bytes", metavar="SIZE", help="Stored bytes in them, such as 1GiB.", show_default=False),
    ] = None,
    token_file: File = None,
    as_json: Json = False,
) -> None:
    """Add a token."""
    given = {"expires": expires, "rate": rate, "inflight": inflight, "sessions": sessions, "bytes": bytes_}

    def work(_: object) -> dict[str, Any]:
        from dspex_persist.infra.access import tokens

        allowance = {key: text for key, text in given.items() if text is not None}
        token = tokens.add(_file(token_file), name, map(str.strip, scopes.split(",")), allowance)
        return {"name": name, "token": token}

    carry_out(as_json, work, lambda report: say(report["token"]))


@app.command("list", help="List whose tokens and certificates are in the file, their scopes, limits and ends.\n\n")
def list_(token_file: File = None, as_json: Json = False) -> None:
    """List the names."""

    def work(_: object) -> dict[str, Any]:
        from dspex_persist.infra.access import tokens

        return {"tokens": [_described(each) for each in tokens.listed(_file(token_file))]}

    def show(report: dict[str, Any]) -> None:
        for each in report["tokens"]:
            more = [f"{key}={_text(key, each[key])}" for key in _FACTS if key in each]
            if each.get("expired"):
                more.append("(expired)")
            say("  ".join((plain(each["name"]), ",".join(each["scopes"]), *more)))
        if not report["tokens"]:
            say("no tokens")

    carry_out(as_json, work, show)


_FACTS: Final = ("certificate", "rate", "inflight", "sessions", "bytes", "expires")


def _text(key: str, fact: Any) -> str:
    if key == "rate":
        return f"{fact:.9f}".rstrip("0").rstrip(".") + "/s"
    return f"{fact:,}" if key == "bytes" else plain(str(fact))


def _described(identity: "Identity") -> dict[str, Any]:
    from dataclasses import asdict

    from dspex_persist.infra.access.tokens import SCOPES

    expires = identity.expires_at
    facts = {
        "certificate": identity.certificate or None,
        **asdict(identity.allowance),
        "expires": None if expires is None else expires.isoformat().replace("+00:00", "Z"),
        "expired": identity.has_expired or None,
    }
    return {
        "name": identity.name,
        "scopes": [scope for scope in SCOPES if scope in identity.scopes],
        **{key: fact for key, fact in facts.items() if fact is not None},
    }


@app.command("revoke", help="Remove all tokens of a name; servers refuse them from then on.\n\n")
def revoke(name: Name, token_file: File = None, as_json: Json = False) -> None:
    """Remove tokens."""

    def work(_: object) -> dict[str, Any]:
        from dspex_persist.infra.access import tokens

        path = _file(token_file)
        count = tokens.revoke(path, name)
        if not count:
            raise tokens.TokenFileError(str(path), f"it has no token of {name!r}; token list shows the names")
        return {"name": name, "revoked": count}

    carry_out(as_json, work, lambda report: say(f"revoked {counted(report['revoked'], 'token')} of {plain(name)}"))
