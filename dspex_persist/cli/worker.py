"""dspex-persist worker: a process that runs its own tools for sessions of a running server."""

from pathlib import Path
from typing import Annotated

import typer

from dspex_persist.cli.places import url_of

HELP = (
    "Run the tools of a module for sessions of a running server, without a line of code for that.\n\n"
    "It serves the tools at an address of its own, and registers them for each --session, where clients call them like "
    "the server's own; their ctx reads and writes in the transaction of the call. A session that ends and begins again "
    "gets them again, also after a restart of the server. The token must have the scope admin "
    "(DSPEX_PERSIST_TOKEN; DSPEX_PERSIST_CA, _CERT and _KEY for TLS).\n\n"
    "Prints GRPC_READY:<port> on stdout when the tools are registered (0: a Unix socket); logs go to stderr. SIGTERM "
    "lets calls in progress finish. The tools stay registered: until it runs again, calls of them fail with "
    "UNAVAILABLE.\n\nFor processes that a server starts itself see serve --workers."
)
EPILOG = (
    "[bold]Examples[/bold]\n\n"
    "dspex-persist worker --tools shop.tools --server 127.0.0.1:50051 --session shop\n\n"
    "dspex-persist worker --tools shop.tools:sell --server unix:/run/dspex.sock --session a --session b\n\n"
    "dspex-persist worker --tools shop.tools --server grpcs://db:50051 --session shop --listen 10.1.0.7:50060 "
    "--tls-cert w.pem --tls-key w.key --client-ca ca.pem\n\n"
    "[bold]Exit codes[/bold]\n\n"
    "0  ended by SIGTERM or Ctrl-C\n\n"
    "1  the server cannot be reached, has no such session, or refuses the tools\n\n"
    "2  wrong usage, an invalid setting, or tools that cannot be imported\n\n"
    "75  the address to listen on is not available\n\n"
)

Tools = typer.Option(
    "--tools",
    metavar="MODULE[:NAME]",
    help="The tools of a module, or only the tool or toolbox of that name; may be repeated.",
    show_default=False,
)
Server = typer.Option(
    "--server",
    metavar="ADDRESS",
    help="The running server: HOST:PORT, unix:PATH or its URL (grpcs://HOST:PORT with TLS).",
    show_default=False,
)
Session = typer.Option("--session", metavar="ID", help="The session; may be repeated.", show_default=False)
Listen = typer.Option(
    "--listen",
    metavar="ADDRESS",
    help="Where to serve: HOST:PORT or unix:PATH. [dim](a free port of 127.0.0.1; a socket if --server is one)[/dim]",
    show_default=False,
)
Address = typer.Option(
    "--address",
    metavar="ADDRESS",
    help="Where the server reaches this worker, if that is not --listen.",
    show_default=False,
)
WorkerId = typer.Option(
    "--worker-id",
    metavar="NAME",
    help="What the worker is called in the session. [dim](the name of this machine)[/dim]",
    show_default=False,
)
TlsCert = typer.Option(
    "--tls-cert",
    metavar="PATH",
    help="Serve with TLS: the worker's certificate (PEM). The server trusts those of its --worker-ca.",
    show_default=False,
)
TlsKey = typer.Option("--tls-key", metavar="PATH", help="The private key of --tls-cert (PEM).", show_default=False)
ClientCa = typer.Option(
    "--client-ca",
    metavar="PATH",
    help="Demand of the server a certificate of these authorities (PEM): its --worker-cert.",
    show_default=False,
)
Insecure = typer.Option(
    "--insecure",
    help="Allow --listen to be reachable from other machines, and by all users of this one, without a login.",
)
ToolThreads = typer.Option(
    "--tool-threads",
    metavar="NUMBER",
    help="Threads for tools that are not asynchronous. [dim](64)[/dim]",
    show_default=False,
)
Config = typer.Option("--config", metavar="PATH", help="TOML settings file, for limits and logs.", show_default=False)


def worker(
    tools: Annotated[list[str], Tools],
    server: Annotated[str, Server],
    session: Annotated[list[str], Session],
    listen: Annotated[str, Listen] = "",
    address: Annotated[str, Address] = "",
    worker_id: Annotated[str, WorkerId] = "",
    tls_cert: Annotated[Path | None, TlsCert] = None,
    tls_key: Annotated[Path | None, TlsKey] = None,
    client_ca: Annotated[Path | None, ClientCa] = None,
    insecure: Annotated[bool, Insecure] = False,
    tool_threads: Annotated[str | None, ToolThreads] = None,
    config: Annotated[Path | None, Config] = None,
) -> None:
    """Serve until SIGTERM."""
    from dspex_persist.settings import load_settings
    from dspex_persist.wiring.workers import serve_worker

    flags = {
        "tools": tuple(tools),
        "tool_threads": tool_threads,
        # A socket has no TLS.
        "listen": listen or None,
        "tls_cert": tls_cert,
        "tls_key": tls_key,
        "client_ca": client_ca,
    }
    serve_worker(
        load_settings({name: flag for name, flag in flags.items() if flag is not None}, config=config, runs_tools=True),
        url_of(server, "--server"),
        session,
        listen=listen,
        address=address,
        worker_id=worker_id,
        insecure=insecure,
    )
