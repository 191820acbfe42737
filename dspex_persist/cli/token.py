"""dspex-persist token: adds tokens to the file that a server reads, lists whose they are, and revokes them."""

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from dspex_persist.cli.groups import Json, carry_out, new_group
from dspex_persist.cli.output import counted, plain, say

HELP: Final = "Edit the file of tokens of a server (serve --token-file), which reads it again by itself."
EPILOG: Final = (
    "[bold]Examples[/bold]\n\n"
    "dspex-persist token new checkout --scopes read,write --token-file tokens\n\n"
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
    token_file: File = None,
    as_json: Json = False,
) -> None:
    """Add a token."""

    def work(_: object) -> dict[str, Any]:
        from dspex_persist.infra import tokens

        return {"name": name, "token": tokens.add(_file(token_file), name, scopes.replace(" ", "").split(","))}

    carry_out(as_json, work, lambda report: say(report["token"]))


@app.command("list", help="List whose tokens are in the file, and their scopes.\n\n")
def list_(token_file: File = None, as_json: Json = False) -> None:
    """List the names."""

    def work(_: object) -> dict[str, Any]:
        from dspex_persist.infra import tokens

        found = tokens.listed(_file(token_file))
        return {
            "tokens": [
                {"name": each.name, "scopes": [scope for scope in tokens.SCOPES if scope in each.scopes]}
                for each in found
            ]
        }

    def show(report: dict[str, Any]) -> None:
        for each in report["tokens"]:
            say(f"{plain(each['name'])}  {','.join(each['scopes'])}")
        if not report["tokens"]:
            say("no tokens")

    carry_out(as_json, work, show)


@app.command("revoke", help="Remove all tokens of a name; servers refuse them from then on.\n\n")
def revoke(name: Name, token_file: File = None, as_json: Json = False) -> None:
    """Remove tokens."""

    def work(_: object) -> dict[str, Any]:
        from dspex_persist.infra import tokens

        path = _file(token_file)
        count = tokens.revoke(path, name)
        if not count:
            raise tokens.TokenFileError(str(path), f"it has no token of {name!r}; token list shows the names")
        return {"name": name, "revoked": count}

    carry_out(as_json, work, lambda report: say(f"revoked {counted(report['revoked'], 'token')} of {plain(name)}"))
