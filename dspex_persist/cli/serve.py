"""dspex-persist serve: runs the server, with a flag for every setting."""

import gc
from pathlib import Path
from typing import Annotated, Any

import typer

HELP = (
    "Serve a database over gRPC until SIGTERM or Ctrl-C.\n\n"
    "Prints GRPC_READY:<port> on stdout when it is ready; logs go to stderr. The first signal lets calls in flight "
    "finish and checkpoints the file; a second one ends the server at once. Neither loses an acknowledged write."
)
EPILOG = (
    "A flag overrides its environment variable (--session-ttl: DSPEX_PERSIST_SESSION_TTL_S), which overrides the TOML "
    "file (session_ttl_s). docs/settings.md lists all settings, including the limits.\n\n"
    "[bold]Examples[/bold]\n\n"
    "dspex-persist serve\n\n"
    "dspex-persist serve --db ~/sessions.db --listen unix:/run/dspex.sock\n\n"
    "dspex-persist serve --db postgresql://shop@db.internal/sessions --listen 127.0.0.1:50051\n\n"
    "dspex-persist serve --db redis://store.internal:6379 --listen 127.0.0.1:50051\n\n"
    "dspex-persist serve --listen 127.0.0.1:0 --limit watchers=500\n\n"
    "dspex-persist serve --tools shop.tools --tools shop.reports:daily\n\n"
    "dspex-persist serve --tools shop.tools --workers 4\n\n"
)


def _option(panel: str, flag: str, metavar: str | None, default: str, help_text: str) -> Any:
    """Return an option. The default is only shown: an option that is not given leaves the setting alone."""
    shown = f"{help_text} [dim]({default})[/dim]"
    return typer.Option(flag, metavar=metavar, show_default=False, help=shown, rich_help_panel=panel)


_DATABASE, _NETWORK, _SESSIONS, _TOOLS, _LOGS = (
    "Database",
    "Network",
    "Sessions and watches",
    "Tools",
    "Settings and logs",
)

Db = _option(
    _DATABASE,
    "--db",
    "PATH|URL",
    "sessions.db",
    "The database: a file, created if missing, or one that several servers may share: postgresql://USER@HOST/DATABASE, "
    "redis://HOST:PORT/NUMBER.",
)
AnchorDir = _option(
    _DATABASE,
    "--anchor-dir",
    "DIR",
    "none",
    "For a shared database: where this machine remembers the last commit, to find out if it was lost.",
)
Durability = _option(
    _DATABASE, "--durability", "full|normal", "full", "full: survives a power cut. normal: faster, survives a crash."
)
CacheSize = _option(_DATABASE, "--cache-size-bytes", "SIZE", "256MiB", "Memory for the sessions in use.")
Retention = _option(
    _DATABASE, "--outcome-retention", "SECONDS", "604800", "How long outcomes under idempotency keys are kept."
)
KeepVersions = _option(
    _DATABASE,
    "--retention-keep-versions",
    "NUMBER",
    "none",
    "Keep this many of the newest versions of each variable and delete the rest.",
)
Age = _option(
    _DATABASE,
    "--retention-age",
    "SECONDS",
    "none",
    "Delete versions older than this (and beyond --retention-keep-versions, if given).",
)
EndedSessions = _option(
    _DATABASE,
    "--retention-ended-sessions",
    "SECONDS",
    "none",
    "Delete the history of sessions this long after they ended.",
)
WarnSize = _option(
    _DATABASE, "--warn-size-bytes", "SIZE", "none", "Warn once a day when the database is larger than this."
)
DenialsKept = _option(
    _DATABASE, "--denials-kept", "NUMBER", "10000", "How many entries about refused calls to keep, the newest."
)
Listen = _option(
    _NETWORK, "--listen", "ADDRESS", "127.0.0.1:50051", "HOST:PORT (port 0: any free port), \\[IPv6]:PORT or unix:PATH."
)
Insecure = _option(
    _NETWORK, "--insecure/--no-insecure", None, "no", "Accept other machines, without encryption or login."
)
TlsCert = _option(
    _NETWORK, "--tls-cert", "PATH", "none", "Serve with TLS: the server's certificate, PEM. Read again when it changes."
)
TlsKey = _option(_NETWORK, "--tls-key", "PATH", "none", "The private key of --tls-cert, PEM.")
ClientCa = _option(
    _NETWORK,
    "--client-ca",
    "PATH",
    "none",
    "Demand of clients a certificate that one of these authorities issued, PEM.",
)
TokenFile = _option(
    _NETWORK, "--token-file", "PATH", "none", "Demand of every call a token of this file. Read again when it changes."
)
SameUser = _option(
    _NETWORK, "--same-user/--no-same-user", None, "no", "On 127.0.0.1: refuse processes of other users (Linux)."
)
MetricsListen = _option(
    _NETWORK, "--metrics-listen", "HOST:PORT", "none", "Serve metrics for Prometheus at http://HOST:PORT/metrics."
)
Advertise = _option(
    _NETWORK, "--advertise", "HOST:PORT", "that of --listen", "The address at which others reach this server."
)
MessageSize = _option(_NETWORK, "--max-message-bytes", "SIZE", "100MiB", "Largest gRPC message.")
Reflection = _option(
    _NETWORK,
    "--reflection/--no-reflection",
    None,
    "yes",
    "Enable server reflection, for tools such as grpcurl.",
)
Reveal = _option(
    _NETWORK,
    "--audit-reveal/--no-audit-reveal",
    None,
    "no",
    "Let clients read sensitive values: in audits, in recordings, and by forking a session that has some.",
)
Prune = _option(
    _NETWORK,
    "--audit-prune/--no-audit-prune",
    None,
    "no",
    "Let clients prune history permanently (db prune --target).",
)
Grace = _option(_NETWORK, "--grace", "SECONDS", "10", "How long calls in flight may take to finish at shutdown.")
Ttl = _option(_SESSIONS, "--session-ttl", "SECONDS", "none", "A session ends this long after its last use.")
Lease = _option(
    _SESSIONS, "--optimization-lease", "SECONDS", "300", "A silent optimizer loses its lock after this long."
)
Sweep = _option(_SESSIONS, "--sweep-interval", "SECONDS", "30", "How often expired sessions are reclaimed.")
Heartbeat = _option(_SESSIONS, "--heartbeat", "SECONDS", "15", "How often an idle watch gets a heartbeat.")
Stall = _option(
    _SESSIONS, "--stall-timeout", "SECONDS", "30", "A watch whose client stops reading is ended after this long."
)
Tools = typer.Option(
    "--tools",
    metavar="MODULE[:NAME]",
    help="Serve the tools of a module, or only the tool or toolbox of that name; may be repeated.",
    show_default=False,
    rich_help_panel=_TOOLS,
)
ToolAddresses = _option(
    _TOOLS,
    "--tool-addresses",
    "LIST",
    "none",
    "Other machines whose registered tools may be called.",
)
WorkerCa = _option(
    _TOOLS, "--worker-ca", "PATH", "public", "Authorities of registered workers at grpcs://HOST:PORT, PEM."
)
WorkerCert = _option(_TOOLS, "--worker-cert", "PATH", "none", "The server's certificate for such workers, PEM.")
WorkerKey = _option(_TOOLS, "--worker-key", "PATH", "none", "Its private key, PEM.")
ToolThreads = _option(_TOOLS, "--tool-threads", "NUMBER", "64", "Threads for tools that are not asynchronous.")
Workers = _option(_TOOLS, "--workers", "NUMBER", "0", "Processes in which the tools run; 0: they run in the server.")
RemoteTimeout = _option(_TOOLS, "--remote-timeout", "SECONDS", "300", "Default timeout of a tool in another process.")
RecordLm = _option(
    _TOOLS, "--record-lm/--no-record-lm", None, "no", "Keep the LM calls of all tools in the journal; needs DSPy."
)
MaxTokens = _option(
    _TOOLS, "--max-tokens", "NUMBER", "none", "How many tokens the recorded LM calls of each session may use."
)
MaxCost = _option(_TOOLS, "--max-cost", "USD", "none", "How much the recorded LM calls of each session may cost.")
Limit = typer.Option(
    "--limit",
    metavar="NAME=NUMBER",
    help="Change a limit, such as json_depth=50; may be repeated.",
    rich_help_panel=_SESSIONS,
)
Config = _option(
    _LOGS,
    "--config",
    "PATH",
    "dspex-persist.toml",
    "TOML settings file. The default one is read if it exists, but cannot name tools.",
)
Otel = _option(_LOGS, "--otel/--no-otel", None, "no", "Send traces with OpenTelemetry, as its variables OTEL_* say.")
LogLevel = _option(_LOGS, "--log-level", "LEVEL", "info", "debug, info, warning, error or critical.")
LogStyle = _option(_LOGS, "--log-style", "auto|json|console", "auto", "auto: console on a terminal, else json.")


def serve(
    db: Annotated[str | None, Db] = None,
    anchor_dir: Annotated[str | None, AnchorDir] = None,
    durability: Annotated[str | None, Durability] = None,
    cache_size_bytes: Annotated[str | None, CacheSize] = None,
    outcome_retention_s: Annotated[str | None, Retention] = None,
    retention_keep_versions: Annotated[str | None, KeepVersions] = None,
    retention_age_s: Annotated[str | None, Age] = None,
    retention_ended_sessions_s: Annotated[str | None, EndedSessions] = None,
    warn_size_bytes: Annotated[str | None, WarnSize] = None,
    denials_kept: Annotated[str | None, DenialsKept] = None,
    listen: Annotated[str | None, Listen] = None,
    insecure: Annotated[bool | None, Insecure] = None,
    tls_cert: Annotated[str | None, TlsCert] = None,
    tls_key: Annotated[str | None, TlsKey] = None,
    client_ca: Annotated[str | None, ClientCa] = None,
    token_file: Annotated[str | None, TokenFile] = None,
    same_user: Annotated[bool | None, SameUser] = None,
    metrics_listen: Annotated[str | None, MetricsListen] = None,
    advertise: Annotated[str | None, Advertise] = None,
    max_message_bytes: Annotated[str | None, MessageSize] = None,
    reflection: Annotated[bool | None, Reflection] = None,
    audit_reveal: Annotated[bool | None, Reveal] = None,
    audit_prune: Annotated[bool | None, Prune] = None,
    grace_s: Annotated[str | None, Grace] = None,
    session_ttl_s: Annotated[str | None, Ttl] = None,
    optimization_lease_s: Annotated[str | None, Lease] = None,
    sweep_interval_s: Annotated[str | None, Sweep] = None,
    heartbeat_s: Annotated[str | None, Heartbeat] = None,
    stall_timeout_s: Annotated[str | None, Stall] = None,
    tools: Annotated[list[str] | None, Tools] = None,
    tool_addresses: Annotated[str | None, ToolAddresses] = None,
    worker_ca: Annotated[str | None, WorkerCa] = None,
    worker_cert: Annotated[str | None, WorkerCert] = None,
    worker_key: Annotated[str | None, WorkerKey] = None,
    tool_threads: Annotated[str | None, ToolThreads] = None,
    workers: Annotated[str | None, Workers] = None,
    remote_timeout_s: Annotated[str | None, RemoteTimeout] = None,
    record_lm: Annotated[bool | None, RecordLm] = None,
    max_tokens: Annotated[str | None, MaxTokens] = None,
    max_cost: Annotated[str | None, MaxCost] = None,
    limit: Annotated[list[str] | None, Limit] = None,
    config: Annotated[Path | None, Config] = None,
    otel: Annotated[bool | None, Otel] = None,
    log_level: Annotated[str | None, LogLevel] = None,
    log_style: Annotated[str | None, LogStyle] = None,
) -> None:
    """Serve with the settings from flags, environment and file."""
    arguments = dict(locals())
    # The modules imported from here on are not garbage, and looking for some among them takes a tenth of the start.
    # The server enables it when it is ready.
    gc.disable()
    try:
        from dspex_persist.settings import Settings, load_settings
        from dspex_persist.wiring import serving

        flags = {name: value for name, value in arguments.items() if name in Settings.model_fields}
        flags["tools"] = tuple(tools) if tools else None
        serving.serve(load_settings({**flags, **_limits(limit or [])}, config, runs_tools=True))
    finally:
        gc.enable()


def _limits(texts: list[str]) -> dict[str, str]:
    from dspex_persist.settings import LimitSettings, SettingsError

    limits: dict[str, str] = {}
    for text in texts:
        name, equals, number = text.partition("=")
        if not equals or name not in LimitSettings.model_fields:
            possible = ", ".join(sorted(LimitSettings.model_fields))
            reason = f"{text!r} is invalid: write NAME=NUMBER, where NAME is one of {possible}"
            raise SettingsError("limit", reason, "flag --limit")
        limits[name] = number
    return limits
