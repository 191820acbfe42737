"""dspex-persist tools: what tools there are, in modules and at a running server."""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from dspex_persist.cli.groups import Json, new_group
from dspex_persist.cli.hints import text_of
from dspex_persist.cli.output import counted, new_table, one_line, say, say_json
from dspex_persist.cli.places import url_of
from dspex_persist.errors import DspexError

if TYPE_CHECKING:
    from dspex_persist.state.model import ToolParameter, ToolSpec

_TIMEOUT_S: Final = 10.0
"""How long a server may take to answer."""

app = new_group("List tools: functions that a server runs for its clients, each call one transaction.")

Modules = Annotated[
    list[str] | None,
    typer.Option(
        "--tools",
        metavar="MODULE[:NAME]",
        show_default=False,
        help="Import the module and list its tools, or the one (or the toolbox) of that name; may be repeated.",
    ),
]
Target = Annotated[
    str | None,
    typer.Option("--target", metavar="ADDRESS", help="Ask the server there: HOST:PORT or unix:PATH."),
]
Session = Annotated[
    str | None,
    typer.Option(
        "--session", metavar="ID", help="With --target: the tools that this session's workers have registered, too."
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="PATH",
        show_default=False,
        help="TOML file of settings, for its tools.",
    ),
]


@dataclass(frozen=True, slots=True)
class Listed:
    """A tool and where it was found; what does not apply there is None.

    `where`: "module" (imported here, as `reference` says), "server" or "worker".
    """

    spec: "ToolSpec"
    where: str
    reference: str | None = None
    worker_id: str | None = None
    address: str | None = None
    circuit: str | None = None


@app.callback()
def _group() -> None:
    """A group, even with one command in it."""


@app.command(
    "list",
    help=(
        "List tools: of modules, as serve would load them, or of a running server, or both.\n\n"
        "With neither --tools nor --target it lists the tools of the settings: DSPEX_PERSIST_TOOLS, or tools in the "
        "settings file. Listing a module imports it, and so runs what is in it.\n\n"
        "--session adds the tools that run in other processes: which worker registered each, at what address, and the "
        "state of its circuit (closed: it is called; open: it could not be reached and is left alone for a while; "
        "half_open: the next call decides).\n\n"
    ),
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "dspex-persist tools list --tools shop.tools --tools shop.reports:daily\n\n"
        "dspex-persist tools list --target 127.0.0.1:50051 --session s1\n\n"
        "dspex-persist tools list --target unix:/run/dspex.sock --json\n\n"
        "[bold]Exit codes[/bold]\n\n"
        "0  fine, also if there are none\n\n"
        "1  the server cannot be reached, or has no such session\n\n"
        "2  wrong usage, a setting that cannot be, or tools that cannot be imported\n\n"
        "With --json, stdout has exactly one JSON object, also after an error; the exit codes are the same.\n\n"
    ),
)
def list_tools(
    tools: Modules = None,
    target: Target = None,
    session: Session = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """List tools."""
    try:
        found = _find(tools or [], target, session, config)
    except (DspexError, ValueError) as error:
        if as_json:
            say_json({"ok": False, "error": text_of(error)})
        raise
    if as_json:
        say_json({"ok": True, "tools": [_document(each) for each in found]})
    else:
        _show(found, target, session)


def _find(references: Sequence[str], target: str | None, session: str | None, config: Path | None) -> list[Listed]:
    from dspex_persist.settings import SettingsError, load_settings

    if session is not None and target is None:
        raise SettingsError("session", "sessions are kept by servers: name one with --target", "flag --session")
    if not references and target is None:
        references = load_settings(config=config, runs_tools=True).tools
    found = _of_modules(references)
    if target is not None:
        found += _of_server(target, session or "")
    return found


def _of_modules(references: Sequence[str]) -> list[Listed]:
    if not references:
        return []
    from dspex_persist.cognitive.toolbox import Toolbox

    toolbox, found = Toolbox(), dict[str, Listed]()
    # What a module prints while it is imported is no part of the answer.
    with contextlib.redirect_stdout(sys.stderr):
        for reference in references:
            for tool in toolbox.load(reference):
                found.setdefault(tool.spec.name, Listed(tool.spec, "module", reference))
    return list(found.values())


def _of_server(target: str, session: str) -> list[Listed]:
    from dspex_persist.wiring import connect

    with connect(url_of(target), timeout_s=_TIMEOUT_S) as server:
        return [_listed(spec) for spec in server.list_tools(session)]


def _listed(spec: "ToolSpec") -> Listed:
    """A server's tool; the server says where it runs in the tool's metadata."""
    said = spec.metadata
    where, _, worker_id = said.get("dspex.where", "server").partition(" ")
    if where != "worker":
        return Listed(spec, "server")
    return Listed(spec, "worker", None, worker_id, said.get("dspex.address") or None, said.get("dspex.circuit") or None)


# For programs


def _document(listed: Listed) -> dict[str, Any]:
    spec = listed.spec
    return {
        "name": spec.name,
        "description": spec.description,
        "where": listed.where,
        "reference": listed.reference,
        "worker_id": listed.worker_id,
        "address": listed.address,
        "circuit": listed.circuit,
        "parameters": [_parameter_document(parameter) for parameter in spec.parameters],
        "streaming": spec.streaming,
        "exposed": spec.exposed,
        "isolation": spec.isolation.value,
        "retries": spec.retries,
        "timeout_s": spec.timeout_s,
        "required_variables": list(spec.required_variables),
        "metadata": {key: text for key, text in spec.metadata.items() if not key.startswith("dspex.")},
    }


def _parameter_document(parameter: "ToolParameter") -> dict[str, Any]:
    default = None if parameter.default is None else json.loads(parameter.default.json)
    # A worker may write there what it likes.
    validation: Any = parameter.validation or None
    with contextlib.suppress(ValueError):
        validation = json.loads(validation) if validation else None
    return {**asdict(parameter), "default": default, "validation": validation}


# For people


def _show(found: Sequence[Listed], target: str | None, session: str | None) -> None:
    if not found:
        say(_nothing(target, session))
        return
    table = new_table(counted(len(found), "tool"), "tool", "parameters", "how it runs", "where")
    for listed in found:
        spec = listed.spec
        name = one_line(spec.name)
        if spec.description:
            name.append("\n").append_text(one_line(" ".join(spec.description.split())))
        parameters = "\n".join(map(_parameter_text, spec.parameters))
        table.add_row(name, _plain(parameters), _plain(", ".join(_how(spec))), _plain(_where(listed)))
    say(table)


def _nothing(target: str | None, session: str | None) -> str:
    if target is None:
        return "no tools: name a module with --tools, or a server with --target"
    workers = f", and session {session!r} has no workers" if session else ""
    return f"the server at {target} has no tools of its own{workers}: start it with serve --tools MODULE"


def _plain(text: str) -> Any:
    """Text of others: no markup, no escapes, its own line breaks."""
    from rich.text import Text

    return Text("\n").join(map(one_line, text.split("\n")))


def _parameter_text(parameter: "ToolParameter") -> str:
    text = f"{parameter.name}: {parameter.type or 'any'}"
    if parameter.default is not None:
        return f"{text} = {parameter.default.json}"
    return text if parameter.required else f"{text} (may be left out)"


def _how(spec: "ToolSpec") -> list[str]:
    """What is out of the ordinary."""
    said = {
        "streams": spec.streaming,
        "exposed": spec.exposed,
        spec.isolation.value: spec.isolation.value != "serializable",
        f"retries: {spec.retries}": spec.retries > 0,
        f"within {spec.timeout_s or 0:g} s": spec.timeout_s is not None,
        f"needs {', '.join(spec.required_variables)}": bool(spec.required_variables),
    }
    return [text for text, applies in said.items() if applies]


def _where(listed: Listed) -> str:
    if listed.where == "worker":
        place = f"at {listed.address}" if listed.address else "without an address"
        return f"worker {listed.worker_id}\n{place}\ncircuit {listed.circuit}"
    return listed.reference or listed.where
