"""The command line options that audit commands share."""

from collections.abc import Mapping, Sequence
from typing import Annotated

import typer

from dspex_persist.state.model import ChangeKind, ExecutionStatus, Source

_PLACE, _FORM, _FILTER = "Source", "Output", "Filters"
_POINT = "a commit's number, an execution's id, a time, an age such as 2h, or now"

Target = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="ADDRESS",
        show_default=False,
        rich_help_panel=_PLACE,
        help="Query this server instead of a database: HOST:PORT, unix:PATH or its URL.",
    ),
]

Json = Annotated[
    bool, typer.Option("--json", rich_help_panel=_FORM, help="JSON Lines: one object per row, nothing shortened.")
]
Csv = Annotated[bool, typer.Option("--csv", rich_help_panel=_FORM, help="CSV with a header; nested values as JSON.")]
Utc = Annotated[
    bool, typer.Option("--utc", rich_help_panel=_FORM, help="Show times in tables in UTC instead of the local zone.")
]
Reveal = Annotated[
    bool,
    typer.Option("--reveal", rich_help_panel=_FORM, help="Show the values of sensitive variables instead of masking."),
]
Full = Annotated[
    bool, typer.Option("--full", rich_help_panel=_FORM, help="Do not shorten the messages and answers of LM calls.")
]
Follow = Annotated[
    bool,
    typer.Option("--follow", rich_help_panel=_FORM, help="Keep following new rows, oldest first, until Ctrl-C."),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        min=0,
        metavar="ROWS",
        show_default=False,
        rich_help_panel=_FORM,
        help="At most this many rows (a table completes the last commit); 0: all. "
        "[dim](50 in a table, 10 before --follow goes on, else all)[/dim]",
    ),
]
OldestFirst = Annotated[
    bool, typer.Option("--oldest-first", rich_help_panel=_FORM, help="Oldest first, instead of newest first.")
]

Since = Annotated[
    str,
    typer.Option("--since", metavar="POINT", show_default=False, rich_help_panel=_FILTER, help=f"After {_POINT}."),
]
Until = Annotated[
    str,
    typer.Option(
        "--until",
        metavar="POINT",
        show_default=False,
        rich_help_panel=_FILTER,
        help=f"Up to and including {_POINT}; with a ^ after it, up to right before it.",
    ),
]
Type = Annotated[
    str,
    typer.Option(
        "--type", metavar="TYPE", show_default=False, rich_help_panel=_FILTER, help="Variables of this type: float, ..."
    ),
]
Kind = Annotated[
    ChangeKind | None,
    typer.Option(
        "--kind",
        metavar="KIND",
        show_default=False,
        rich_help_panel=_FILTER,
        help=f"The kind of change: {', '.join(ChangeKind)}.",
    ),
]
Actor = Annotated[
    str,
    typer.Option("--actor", metavar="NAME", show_default=False, rich_help_panel=_FILTER, help="Only by this actor."),
]
From = Annotated[
    Source | None,
    typer.Option(
        "--source",
        metavar="SIDE",
        show_default=False,
        rich_help_panel=_FILTER,
        help=f"The side that wrote it: {', '.join(Source)}.",
    ),
]
Tool = Annotated[
    str,
    typer.Option("--tool", metavar="NAME", show_default=False, rich_help_panel=_FILTER, help="Only in this tool."),
]
Model = Annotated[
    str,
    typer.Option(
        "--model",
        metavar="NAME",
        show_default=False,
        rich_help_panel=_FILTER,
        help="Only calls of this model; a glob with * and ? matches several.",
    ),
]
By = Annotated[
    list[str] | None,
    typer.Option(
        "--by",
        metavar="NAME",
        show_default=False,
        help="Sum by session, tool, model or day; may be repeated, or have several with commas. [dim](model)[/dim]",
    ),
]
Status = Annotated[
    ExecutionStatus | None,
    typer.Option(
        "--status",
        metavar="STATUS",
        show_default=False,
        rich_help_panel=_FILTER,
        help=f"Only with this status: {', '.join(ExecutionStatus)}.",
    ),
]
Execution = Annotated[
    str,
    typer.Option(
        "--execution",
        metavar="ID",
        show_default=False,
        rich_help_panel=_FILTER,
        help="Only what this execution, and those it called, wrote or published; exec_12 is enough of an id.",
    ),
]
Identity = Annotated[
    str,
    typer.Option(
        "--identity",
        metavar="NAME",
        show_default=False,
        rich_help_panel=_FILTER,
        help="Only of this caller, or of those that a glob matches; -: of callers that the server does not know.",
    ),
]
Peer = Annotated[
    str,
    typer.Option(
        "--peer",
        metavar="HOST",
        show_default=False,
        rich_help_panel=_FILTER,
        help="Only from this host, such as ipv4:10.0.0.7; also a glob.",
    ),
]
Rpc = Annotated[
    str,
    typer.Option(
        "--rpc", metavar="NAME", show_default=False, rich_help_panel=_FILTER, help="Only of this rpc; also a glob."
    ),
]
Cause = Annotated[
    str,
    typer.Option(
        "--cause",
        metavar="NAME",
        show_default=False,
        rich_help_panel=_FILTER,
        help="Only with this cause: SetVariable, an execution's id, ...",
    ),
]
Meta = Annotated[
    list[str] | None,
    typer.Option(
        "--meta",
        metavar="KEY=VALUE",
        show_default=False,
        rich_help_panel=_FILTER,
        help="Only with this metadata; may be repeated.",
    ),
]
Where = Annotated[
    list[str] | None,
    typer.Option(
        "--where",
        metavar="CONDITION",
        show_default=False,
        rich_help_panel=_FILTER,
        help="Only values that match: '< 0.5', '= on', '!= 3', 'contains text'; may be repeated.",
    ),
]
Key = Annotated[
    str,
    typer.Option(
        "--key", metavar="KEY", show_default=False, rich_help_panel=_FILTER, help="Only with this idempotency key."
    ),
]
TopOnly = Annotated[
    bool,
    typer.Option("--top", rich_help_panel=_FILTER, help="Leave out executions called by other executions."),
]


def execution_id(text: str) -> str:
    """Return the id of an execution, of which the number is enough."""
    return f"exec_{text}" if text.isdecimal() else text


def version_number(text: str) -> int:
    """Return the number of a version, as 3 or v3, or raise `InvalidArgumentError`."""
    from dspex_persist.state.errors import InvalidArgumentError, quote

    number = text.removeprefix("v")
    if not number.isascii() or not number.isdecimal():
        raise InvalidArgumentError("prompt", f"{quote(text)} is not the number of a version, such as 3")
    return int(number)


def metadata_of(entries: Sequence[str] | None) -> Mapping[str, str]:
    """Return the entries of `--meta KEY=VALUE`, or raise `InvalidArgumentError` for anything else."""
    from dspex_persist.state.errors import InvalidArgumentError, quote

    metadata = dict(entry.partition("=")[::2] for entry in entries or ())
    for entry in entries or ():
        if "=" not in entry or entry.startswith("="):
            raise InvalidArgumentError("meta", f"{quote(entry)} is not KEY=VALUE")
    return metadata


def type_of(name: str) -> str:
    """Return the name of a value type ("": any), or raise `InvalidArgumentError` for an unknown one."""
    if not name:
        return ""
    from dspex_persist.spelling import closest, did_you_mean, quote
    from dspex_persist.state.errors import InvalidArgumentError
    from dspex_persist.state.values import type_names

    known = type_names()
    if name not in known:
        hint = did_you_mean(closest(name, known), spell=str)
        possible = f"possible: {', '.join(known)}"
        reason = " ".join(filter(None, (f"there is no type {quote(name)};", hint, possible)))
        raise InvalidArgumentError("type", reason)
    return name
