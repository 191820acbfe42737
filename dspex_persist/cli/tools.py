"""dspex-persist tools: lists the tools of modules and of a running server, and takes those of a worker away."""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from dspex_persist.cli.groups import Json, carry_out, new_group
from dspex_persist.cli.output import counted, new_table, one_line, say, say_json
from dspex_persist.cli.places import url_of
from dspex_persist.errors import DspexError

if TYPE_CHECKING:
    from dspex_persist.state.model import ToolParameter, ToolSpec

_TIMEOUT_S: Final = 10.0
"""How long a server may take to answer, in seconds."""

app = new_group("List tools: functions that a server runs for its clients, each call one transaction; unregister some.")

Modules = Annotated[
    list[str] | None,
    typer.Option(
        "--tools",
        metavar="MODULE[:NAME]",
        show_default=False,
        help="Import the module and list its tools, or only the tool or toolbox of that name; may be repeated.",
    ),
]
Target = Annotated[
    str | None,
    typer.Option("--target", metavar="ADDRESS", help="List the tools of this server: HOST:PORT, unix:PATH or its URL."),
]
Session = Annotated[
    str | None,
    typer.Option(
        "--session", metavar="ID", help="With --target: also the tools that workers registered for this session."
    ),
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config",
        metavar="PATH",
        show_default=False,
        help="TOML settings file whose tools to list.",
    ),
]


@dataclass(frozen=True, slots=True)
class Listed:
    """A tool and where it is.

    Attributes:
        where: "module", "server", "pool" or "worker". The fields that do not apply to it are None.
        reference: The module that was imported.
        pool: The pool of the server whose workers run it.
    """

    spec: "ToolSpec"
    where: str
    reference: str | None = None
    pool: str | None = None
    worker_id: str | None = None
    address: str | None = None
    circuit: str | None = None


@dataclass(eq=False)
class NoSuchWorkerError(DspexError):
    """A session has no tools that a worker of this name has registered."""

    session_id: str
    worker_id: str

    def __str__(self) -> str:
        return (
            f"session {self.session_id!r} has no tools of a worker {self.worker_id!r}: tools list --session says whose"
        )


@app.command(
    "list",
    help=(
        "List the tools of modules, as serve would load them, of a running server, or both.\n\n"
        "Without --tools and --target it lists the tools of the settings: DSPEX_PERSIST_TOOLS, or tools in the "
        "settings file. Listing a module imports it, which runs its code.\n\n"
        "Of a server it says where each tool runs: in the server itself, or in the workers of a pool, which workers "
        "shows.\n\n"
        "--session adds the tools that run in other processes: the worker that registered each, its address, and the "
        "state of its circuit breaker (closed: calls go through; open: it was unreachable and is not called for a "
        "while; half_open: the next call decides; refused: it is not one of the server's tool_addresses).\n\n"
    ),
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "dspex-persist tools list --tools shop.tools --tools shop.reports:daily\n\n"
        "dspex-persist tools list --target 127.0.0.1:50051 --session s1\n\n"
        "dspex-persist tools list --target unix:/run/dspex.sock --json\n\n"
        "[bold]Exit codes[/bold]\n\n"
        "0  success, also without any tools\n\n"
        "1  the server cannot be reached, or has no such session\n\n"
        "2  wrong usage, an invalid setting, or tools that cannot be imported\n\n"
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
    listed = _find(tools or [], target, session, config)
    if as_json:
        say_json({"ok": True, "tools": [_document(each) for each in listed]})
    else:
        _show(listed, target, session)


@app.command(
    "unregister",
    help=(
        "Take the tools away that a worker has registered for a session, such as one that will not come back.\n\n"
        "Calls of them fail with UNKNOWN_TOOL from then on, instead of UNAVAILABLE; those in progress go on. A worker "
        "that still runs may register them again. The token must have the scope admin.\n\n"
    ),
    epilog=(
        "[bold]Examples[/bold]\n\n"
        "dspex-persist tools unregister worker-1 --session s1 --target 127.0.0.1:50051\n\n"
        "[bold]Exit codes[/bold]\n\n"
        "0  success\n\n"
        "1  the server cannot be reached, or has no such session; or no tool of the worker is registered for it\n\n"
        "2  wrong usage, or an invalid setting\n\n"
    ),
)
def unregister(
    worker: Annotated[
        str,
        typer.Argument(
            metavar="WORKER", show_default=False, help="How the worker is called: tools list --session says that."
        ),
    ],
    target: Annotated[
        str, typer.Option("--target", metavar="ADDRESS", show_default=False, help="HOST:PORT, unix:PATH or a URL.")
    ],
    session: Annotated[str, typer.Option("--session", metavar="ID", show_default=False, help="The session.")],
    as_json: Json = False,
) -> None:
    """Take tools away."""

    def work(_: object) -> dict[str, Any]:
        from dspex_persist.state.commands import RegisterTools
        from dspex_persist.wiring.connecting import connect

        with connect(url_of(target), timeout_s=_TIMEOUT_S) as server:
            theirs = [each for each in map(_listed, server.list_tools(session)) if each.worker_id == worker]
            if not theirs:
                raise NoSuchWorkerError(session, worker)
            server.run(RegisterTools(session, worker, ()))
        return {"session_id": session, "worker_id": worker, "tools": sorted(each.spec.name for each in theirs)}

    def show(report: dict[str, Any]) -> None:
        say(f"session {session}: {counted(len(report['tools']), 'tool')} unregistered: {', '.join(report['tools'])}")

    carry_out(as_json, work, show)


def _find(references: Sequence[str], target: str | None, session: str | None, config: Path | None) -> list[Listed]:
    from dspex_persist.settings import SettingsError, load_settings

    if session is not None and target is None:
        raise SettingsError("session", "only servers have sessions: name one with --target", "flag --session")
    if not references and target is None:
        references = load_settings(config=config, runs_tools=True).tools
    listed = _of_modules(references)
    if target is not None:
        listed += _of_server(target, session or "")
    return listed


def _of_modules(references: Sequence[str]) -> list[Listed]:
    if not references:
        return []
    from dspex_persist.cognitive.toolbox import Toolbox

    toolbox, listed = Toolbox(), dict[str, Listed]()
    # The output of a module during its import must not mix with ours.
    with contextlib.redirect_stdout(sys.stderr):
        for reference in references:
            for tool in toolbox.load(reference):
                listed.setdefault(tool.spec.name, Listed(tool.spec, "module", reference))
    return list(listed.values())


def _of_server(target: str, session: str) -> list[Listed]:
    from dspex_persist.wiring.connecting import connect

    with connect(url_of(target), timeout_s=_TIMEOUT_S) as server:
        return [_listed(spec) for spec in server.list_tools(session)]


def _listed(spec: "ToolSpec") -> Listed:
    """Return a server's tool. The server adds where it runs to the tool's metadata."""
    metadata = spec.metadata
    where, _, name = metadata.get("dspex.where", "server").partition(" ")
    if where == "pool":
        return Listed(spec, "pool", pool=name)
    if where != "worker":
        return Listed(spec, "server")
    address, circuit = metadata.get("dspex.address") or None, metadata.get("dspex.circuit") or None
    return Listed(spec, "worker", worker_id=name, address=address, circuit=circuit)


# For programs


def _document(listed: Listed) -> dict[str, Any]:
    spec = listed.spec
    return {
        "name": spec.name,
        "description": spec.description,
        "where": listed.where,
        "reference": listed.reference,
        "pool": listed.pool,
        "worker_id": listed.worker_id,
        "address": listed.address,
        "circuit": listed.circuit,
        "parameters": [_parameter_document(parameter) for parameter in spec.parameters],
        "streaming": spec.streaming,
        "exposed": spec.exposed,
        "isolation": spec.isolation.value,
        "retries": spec.retries,
        "concurrency": spec.concurrency.value if spec.concurrency is not None else None,
        "timeout_s": spec.timeout_s,
        "required_variables": list(spec.required_variables),
        "metadata": {key: text for key, text in spec.metadata.items() if not key.startswith("dspex.")},
    }


def _parameter_document(parameter: "ToolParameter") -> dict[str, Any]:
    default = None if parameter.default is None else json.loads(parameter.default.json)
    # A worker may have registered any text.
    validation: Any = parameter.validation or None
    with contextlib.suppress(ValueError):
        validation = json.loads(validation) if validation else None
    return {**asdict(parameter), "default": default, "validation": validation}


# For people


def _show(tools: Sequence[Listed], target: str | None, session: str | None) -> None:
    if not tools:
        say(_nothing(target, session))
        return
    table = new_table(counted(len(tools), "tool"), "tool", "parameters", "how it runs", "where")
    for listed in tools:
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
    return f"the server at {target} has no tools{workers}: start it with serve --tools MODULE"


def _plain(text: str) -> Any:
    """Return a client's text without markup or escapes, but with its line breaks."""
    from rich.text import Text

    return Text("\n").join(map(one_line, text.split("\n")))


def _parameter_text(parameter: "ToolParameter") -> str:
    text = f"{parameter.name}: {parameter.type or 'any'}"
    if parameter.default is not None:
        return f"{text} = {parameter.default.json}"
    return text if parameter.required else f"{text} (optional)"


def _how(spec: "ToolSpec") -> list[str]:
    """Return the options that differ from the default."""
    options = {
        "streams": spec.streaming,
        "exposed": spec.exposed,
        spec.isolation.value: spec.isolation.value != "serializable",
        f"retries: {spec.retries}": spec.retries > 0,
        spec.concurrency or "": spec.concurrency is not None,
        f"within {spec.timeout_s or 0:g} s": spec.timeout_s is not None,
        f"needs {', '.join(spec.required_variables)}": bool(spec.required_variables),
    }
    return [text for text, applies in options.items() if applies]


def _where(listed: Listed) -> str:
    if listed.where == "worker":
        place = f"at {listed.address}" if listed.address else "without an address"
        return f"worker {listed.worker_id}\n{place}\ncircuit {listed.circuit}"
    if listed.where == "pool":
        return f"pool {listed.pool}"
    return listed.reference or listed.where
