"""Frozen settings, read once from flags, environment variables, a TOML file and the defaults, in this order."""

import os
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    InstanceOf,
    TypeAdapter,
    ValidationError,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from dspex_persist.addresses import FORM_OF, DatabaseUrl, database_url, form_of_misspelled, scheme_of, shown
from dspex_persist.opening import ENV_PREFIX as ENV_PREFIX
from dspex_persist.sources import CONFIG_VARIABLE as CONFIG_VARIABLE
from dspex_persist.sources import DATABASE, LISTEN, find_file, read_file
from dspex_persist.sources import DEFAULT_CONFIG as DEFAULT_CONFIG
from dspex_persist.sources import SettingsError as SettingsError
from dspex_persist.spelling import closest, did_you_mean

_KIB: Final = 1024
_MIB: Final = 1024 * _KIB
_SHOWN_LENGTH: Final = 60
# How similar (0 to 1) an environment variable must be to a setting to count as a misspelling of it.
_MISSPELLING: Final = 0.8


def _read_url(value: object) -> object:
    """Read the URL of a database; the path of a file is read as such."""
    if isinstance(value, str) and (form := form_of_misspelled(value)) is not None:
        raise ValueError(f"two slashes come after the scheme of a URL: {form}")
    if not isinstance(value, str) or (scheme := scheme_of(value)) is None:
        return value
    if scheme == "sqlite" and value.lower().startswith("sqlite:///"):
        return value[len("sqlite:///") :]
    url = database_url(value)
    if url is None:
        raise ValueError(f"it must be the path of a file, or {' or '.join(FORM_OF.values())}")
    return url


def _read_path(path: Path | DatabaseUrl) -> Path | DatabaseUrl:
    if isinstance(path, DatabaseUrl):
        return path
    if str(path) in (".", "memory:", ":memory:"):
        raise ValueError("it must be the path of a file: sessions are always kept on disk")
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(
            "cannot expand ~: HOME is not set, and this user has no home directory; write the whole path"
        ) from None


def _read_none(value: object) -> object:
    return None if isinstance(value, str) and value.strip().lower() == "none" else value


def _read_list(value: object) -> object:
    """Read a list: as it is from TOML, or from one string separated by commas, as in an environment variable."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _read_words(value: object) -> object:
    """Read a command line: a list of words, or one text as a shell splits it."""
    return tuple(shlex.split(value)) if isinstance(value, str) else value


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("it must be a number")
    return value


def _expand(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError("cannot expand ~: HOME is not set; write the whole path") from None


FilePath = Annotated[Path, AfterValidator(_expand)]
Database = Annotated[Path | InstanceOf[DatabaseUrl], BeforeValidator(_read_url), AfterValidator(_read_path)]
# At most 31 years, so that adding it to a time never exceeds the range of dates and timeouts.
Seconds = Annotated[float, BeforeValidator(_refuse_bool), Field(gt=0, le=1e9, allow_inf_nan=False)]
Amount = Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0, le=1e9, allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=1, le=1_000_000_000)]
Size = Annotated[ByteSize, BeforeValidator(_refuse_bool), Field(ge=1, le=2**50)]


class LimitSettings(BaseSettings):
    """The limits of a store: the fields and defaults of `state.limits.Limits`."""

    # SQLite refuses a larger value, and with it the whole transaction. Also, Python parses only some 10 MiB of JSON a
    # second, and blocks everything else meanwhile.
    value_size_bytes: Annotated[Size, Field(le=1_000_000_000)] = Field(
        ByteSize(2 * _MIB), description="Largest JSON of a value, or of the description of a binary value."
    )
    binary_size_bytes: Annotated[Size, Field(le=1_000_000_000)] = Field(
        ByteSize(16 * _MIB), description="Largest binary content of a value."
    )
    stream_size_bytes: Annotated[Size, Field(le=1_000_000_000)] = Field(
        ByteSize(16 * _MIB), description="Total size of the chunks of a streaming tool; their list is its result."
    )
    # The JSON parser recurses, and Python allows about a thousand levels.
    json_depth: Annotated[Count, Field(le=500)] = Field(100, description="Deepest nesting of a JSON value.")
    session_size_bytes: Size = Field(
        ByteSize(64 * _MIB),
        description="Size of a session: values, constraints, metadata, tools, and 1,500 bytes for each variable; at "
        "most two thirds of `max_message_bytes`.",
    )
    variables_per_session: Count = Field(10_000, description="Variables in one session.")
    tools_per_session: Count = Field(1_000, description="Tools that workers register in one session.")
    name_length: Count = Field(255, description="Characters in the name of a variable, or in an idempotency key.")
    session_id_length: Count = Field(255, description="Characters in the id of a session.")
    metadata_entries: Count = Field(64, description="Metadata entries of one request, session or variable.")
    metadata_size_bytes: Size = Field(ByteSize(16 * _KIB), description="Size of that metadata, including the keys.")
    constraints_size_bytes: Size = Field(ByteSize(64 * _KIB), description="Size of a variable's constraints.")
    batch_entries: Count = Field(10_000, description="Variables in one batch, read or written.")
    history_entries: Count = Field(10_000, description="Versions in one answer of GetVariableHistory.")
    history_size_bytes: Size = Field(
        ByteSize(16 * _MIB),
        description="Size of one answer of GetVariableHistory; the remaining versions come with the next page. At most "
        "a third of `max_message_bytes`.",
    )
    queue_length: Count = Field(10_000, description="Writes waiting in the queue; further writes are refused at once.")
    watchers: Count = Field(10_000, description="Watches open at the same time.")
    executions: Count = Field(10_000, description="Tool executions running or waiting at the same time.")
    queued_executions: Count = Field(1_000, description="Tool executions waiting for their turn in one session.")
    execution_writes: Count = Field(
        10_000, description="Writes of one execution, including those of the executions that it calls."
    )
    execution_size_bytes: Size = Field(
        ByteSize(64 * _MIB),
        description="Size of the parameters and writes of one execution, plus the journal entries of those it calls.",
    )
    journal_size_bytes: Size = Field(
        ByteSize(_MIB), description="Size of what one execution logs and records in the journal."
    )


class PoolSettings(BaseModel):
    """A pool of workers, `[pools.NAME]` in the file: processes that serve the bridge protocol and run tools.

    The pool called `tools` is that of this server's own tools; it has neither `command` nor `size` nor `tools`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: Annotated[tuple[str, ...], BeforeValidator(_read_words)] = Field(
        (),
        description="The command line of a worker. `{port}`: a free port; `{address}`: where it calls the server; "
        "`{run_id}`, `{worker_id}`: who it is; `{ready_file}`: where it may write its port.",
    )
    size: Count | None = Field(None, description="How many workers; 2 by default.")
    tools: tuple[str, ...] = Field((), description="Tools that its workers have, and clients may call.")
    streaming: tuple[str, ...] = Field((), description="Tools that stream; they need not be in `tools` as well.")
    binary: bool = Field(False, description="Pass binary parameters on. Old workers unpickle them.")
    env: dict[str, str] = Field({}, description="Variables of its environment.")
    cwd: Path | None = Field(None, description="Its working directory; by default that of the server.")
    ready_timeout_s: Seconds = Field(30.0, description="How long a worker may take to start.")
    stop_timeout_s: Seconds = Field(6.0, description="How long it may take to end; then it is killed.")
    queue_size: Count = Field(1000, description="Calls that may wait for a worker.")
    queue_timeout_s: Seconds = Field(5.0, description="How long each of them may wait.")
    call_timeout_s: Seconds | None = Field(None, description="How long a call may take.")
    affinity: Literal["hint", "strict_queue", "strict_fail_fast"] = Field(
        "hint",
        description="What a call does while its session's last worker is busy: take another one, wait, or fail.",
    )
    nesting: Count = Field(8, description="How deep calls from tool to tool may be, each in a worker of its own.")
    health_interval_s: Seconds = Field(30.0, description="How often idle workers are pinged.")
    max_requests: Count | None = Field(None, description="A worker is replaced after this many calls.")
    max_rss_bytes: Size | None = Field(None, description="A worker with more memory in use after a call is replaced.")
    kill_rss_bytes: Size | None = Field(None, description="A worker with more memory in use during a call is killed.")
    max_age_s: Seconds | None = Field(None, description="An idle worker is replaced when it is older.")
    crash_limit: Count = Field(5, description="After this many workers in a row that failed at once, none is started.")
    crash_pause_s: Seconds = Field(60.0, description="For how long; then one is tried.")


class Settings(LimitSettings):
    """All settings of a server, validated. `load_settings` reads them from flags, environment and file."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=ENV_PREFIX, env_ignore_empty=True)

    db: Database = Field(
        Path(DATABASE),
        description="The database: a file, created if missing, or `postgresql://USER@HOST/DATABASE?schema=NAME` for "
        "several servers (docs/postgresql.md; needs the extra `[postgresql]`), or "
        "`redis://HOST:PORT/NUMBER?prefix=NAME` (docs/valkey.md; needs the extra `[redis]`).",
    )
    anchor_dir: Annotated[FilePath | None, BeforeValidator(_read_none)] = Field(
        None,
        description="For a database that servers share: a directory of this server's own machine, where it remembers "
        "the last commit, so that it finds at its next start if that is lost.",
    )
    listen: str = Field(
        LISTEN,
        description="The address to listen on: `HOST:PORT` (port 0: any free port), `[IPv6]:PORT` or `unix:PATH`.",
    )
    insecure: bool = Field(
        False, description="Allow `listen` to be reachable from other machines, without encryption or login."
    )
    tls_cert: Annotated[FilePath | None, BeforeValidator(_read_none)] = Field(
        None, description="Serve with TLS: the server's certificate, and those of intermediate authorities (PEM)."
    )
    tls_key: Annotated[FilePath | None, BeforeValidator(_read_none)] = Field(
        None, description="The private key of `tls_cert`, without a passphrase (PEM)."
    )
    client_ca: Annotated[FilePath | None, BeforeValidator(_read_none)] = Field(
        None, description="Demand of clients a certificate that one of these authorities issued (PEM)."
    )
    token_file: Annotated[FilePath | None, BeforeValidator(_read_none)] = Field(
        None, description="Demand of every call one of the tokens in this file, with the scope that it takes."
    )
    metrics_listen: Annotated[str | None, BeforeValidator(_read_none)] = Field(
        None,
        description="Serve metrics for Prometheus at `http://HOST:PORT/metrics` (port 0: any free port); needs the "
        "extra `[metrics]` (docs/metrics.md).",
    )
    same_user: bool = Field(
        False,
        description="Refuse calls from processes of other users of this machine; for a `listen` on loopback, on Linux.",
    )
    advertise: Annotated[str | None, BeforeValidator(_read_none)] = Field(
        None,
        description="The address at which others reach this server: errors on other servers of the same sessions name "
        "it. By default that of `listen`.",
    )
    durability: Literal["full", "normal"] = Field(
        "full",
        description="`full`: acknowledged writes survive a power cut. `normal`: faster, but they survive only a crash "
        "of the process.",
    )
    session_ttl_s: Annotated[Seconds | None, BeforeValidator(_read_none)] = Field(
        None, description="A session ends this long after its last use; `none`: never."
    )
    optimization_lease_s: Seconds = Field(
        300.0, description="An optimizer that writes nothing for this long loses its lock on a variable."
    )
    sweep_interval_s: Seconds = Field(30.0, description="How often expired sessions are reclaimed.")
    cache_size_bytes: Size = Field(ByteSize(256 * _MIB), description="Memory for the sessions in use.")
    outcome_retention_s: Seconds = Field(
        7 * 86_400.0, description="How long the outcome of a write with an idempotency key is kept."
    )
    retention_keep_versions: Annotated[Count | None, BeforeValidator(_read_none)] = Field(
        None,
        description="Keep this many of the newest versions of each variable and delete the rest; `none`: keep all.",
    )
    retention_age_s: Annotated[Seconds | None, BeforeValidator(_read_none)] = Field(
        None,
        description="Delete superseded versions older than this; if `retention_keep_versions` is set, too, only those "
        "beyond it.",
    )
    retention_ended_sessions_s: Annotated[Seconds | None, BeforeValidator(_read_none)] = Field(
        None, description="Delete the history of sessions this long after they ended; `none`: keep it."
    )
    warn_size_bytes: Annotated[Size | None, BeforeValidator(_read_none)] = Field(
        None, description="Warn in the log, once a day, when the database is larger than this."
    )
    denials_kept: Count = Field(
        10_000, description="How many entries about refused calls the database keeps, the newest of them."
    )
    heartbeat_s: Seconds = Field(15.0, description="How often an idle watch sends a heartbeat.")
    stall_timeout_s: Seconds = Field(
        30.0, description="A watch whose client reads nothing for this long is ended; it can be resumed."
    )
    grace_s: Seconds = Field(10.0, description="How long calls in flight may take to finish at shutdown.")
    tools: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_read_list)] = Field(
        (), description="The tools to serve: a list of `package.module` or `package.module:name`."
    )
    tool_addresses: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_read_list)] = Field(
        (),
        description="Other machines whose registered tools may be called: a list of `HOST`, `HOST:PORT` or networks "
        "such as `10.1.0.0/16`. This machine's always may.",
    )
    worker_ca: Annotated[FilePath | None, BeforeValidator(_read_none)] = Field(
        None,
        description="The authorities to trust when a registered tool's address is `grpcs://HOST:PORT` (PEM); `none`: "
        "the public ones.",
    )
    worker_cert: Annotated[FilePath | None, BeforeValidator(_read_none)] = Field(
        None, description="The certificate that the server shows to such workers (PEM)."
    )
    worker_key: Annotated[FilePath | None, BeforeValidator(_read_none)] = Field(
        None, description="The private key of `worker_cert`, without a passphrase (PEM)."
    )
    tool_threads: Annotated[Count, Field(le=10_000)] = Field(
        64, description="Threads for tools; further calls wait. Asynchronous tools need none."
    )
    workers: Annotated[int, BeforeValidator(_refuse_bool), Field(ge=0, le=1_000)] = Field(
        0,
        description="Processes in which the tools run, so that they use several cores and cannot end the server "
        "(docs/workers.md); 0: they run in the server.",
    )
    pools: dict[str, PoolSettings] = Field(
        {},
        description="Pools of workers by name, `[pools.NAME]`, in a file that is named (docs/workers.md).",
    )
    remote_timeout_s: Seconds = Field(
        300.0, description="Timeout of a tool in another process, unless the tool or its caller sets one."
    )
    record_lm: bool = Field(
        False,
        description="Keep the LM calls of all tools in the journal; needs DSPy. The environment variable holds for "
        "`Context(record_lm=...)` of programs, too.",
    )
    max_tokens: Annotated[Count | None, BeforeValidator(_read_none)] = Field(
        None,
        description="How many tokens the recorded LM calls of each session may use; then further ones are refused. "
        "`none`: any number.",
    )
    max_cost: Annotated[Amount | None, BeforeValidator(_read_none)] = Field(
        None, description="The same in USD, as far as the cost of the calls is known; `none`: any amount."
    )
    audit_reveal: bool = Field(
        False,
        description="Let clients of the audit service read the values of sensitive variables: in audits, in "
        "recordings, and by forking a session that has some.",
    )
    audit_prune: bool = Field(
        False, description="Let clients of the audit service prune history; a dry run is always allowed."
    )
    # Other limits are a third, or two thirds, of it.
    max_message_bytes: Annotated[Size, Field(ge=3, le=2**31 - 1)] = Field(
        ByteSize(100 * _MIB), description="Largest gRPC message, received or sent."
    )
    reflection: bool = Field(True, description="Enable server reflection, for tools such as grpcurl.")
    otel: bool = Field(
        False,
        description="Send traces with OpenTelemetry, as its variables `OTEL_*` say (docs/tracing.md); needs the extra "
        "`otel`.",
    )
    log_level: Literal["debug", "info", "warning", "error", "critical"] = Field(
        "info", description="The lowest level that is logged, to stderr."
    )
    log_style: Literal["auto", "json", "console"] = Field(
        "auto", description="`auto`: formatted lines on a terminal, JSON elsewhere."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # `Settings(...)` takes its arguments only. `load_settings` reads the other sources itself, so that it knows
        # which one a value came from.
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)


@dataclass(frozen=True, slots=True)
class _Source:
    """A source of settings: the values by name, and a text that says where a given setting was found."""

    values: Mapping[str, Any]
    place_of: Callable[[str], str]


def flag_of(setting: str) -> str:
    """The flag of a setting: `--session-ttl` for session_ttl_s; limits share `--limit`."""
    if setting in LimitSettings.model_fields:
        return f"--limit {setting}"
    if setting == "pools":
        return "--config"
    return f"--{setting.removesuffix('_s').replace('_', '-')}"


def variable_of(setting: str) -> str:
    """The environment variable of a setting."""
    return ENV_PREFIX + setting.upper()


def load_settings(
    flags: Mapping[str, Any] | None = None, config: Path | None = None, *, runs_tools: bool = False
) -> Settings:
    """Load the settings from, by precedence, `flags`, environment variables, a TOML file and the defaults.

    The file is `config`, else the one that DSPEX_PERSIST_CONFIG names, else `dspex-persist.toml` in the working
    directory, if it exists. Another user may have written that last one, and tools are code that runs, so tools are
    never taken from it.

    Args:
        flags: Values by the name of their setting. None means that the flag was not given.
        config: The TOML file.
        runs_tools: Whether the caller runs tools. If so, tools in a file that is only found, not named, are an error,
            unless a flag or the environment names tools.

    Raises:
        SettingsError: A value is invalid, the file has an unknown key, or the file is missing or unreadable.
    """
    flag_values = {name: value for name, value in (flags or {}).items() if value is not None}
    from_flags, environment = _Source(flag_values, lambda setting: f"flag {flag_of(setting)}"), _environment()
    may_ignore_tools = not runs_tools or "tools" in flag_values or "tools" in environment.values
    sources = (from_flags, environment, _file(config, may_ignore_tools=may_ignore_tools))
    merged: dict[str, Any] = {}
    for source in reversed(sources):
        merged.update(source.values)
    try:
        return Settings(**merged)
    except ValidationError as error:
        raise _explain(error, sources) from None


def records_lm() -> bool:
    """Return whether contexts of this process record LM calls by default: the environment variable of `record_lm`.

    Raises:
        SettingsError: It is neither true nor false.
    """
    name = variable_of("record_lm")
    if not (text := os.environ.get(name)):
        return False
    try:
        return TypeAdapter(bool).validate_python(text)
    except ValidationError:
        raise SettingsError(
            "record_lm", f"{text!r} is neither true nor false", f"environment variable {name}"
        ) from None


def _environment() -> _Source:
    _check_variables(name for name in os.environ if name.startswith(ENV_PREFIX))
    return _Source(EnvSettingsSource(Settings)(), lambda setting: f"environment variable {variable_of(setting)}")


def _check_variables(names: Iterable[str]) -> None:
    """Refuse misspelled settings. Other unknown names pass: orchestrators set DSPEX_PERSIST_SERVICE_HOST, for one."""
    known = ("config", *Settings.model_fields)
    for name in names:
        setting = name.removeprefix(ENV_PREFIX).lower()
        meant = closest(setting, known, _MISSPELLING, most=len(known))
        if meant and setting not in known:
            reason = f"there is no such setting; {did_you_mean(variable_of(meant), spell=str)}"
            raise SettingsError(setting, reason, f"environment variable {name}")


def _file(config: Path | None, *, may_ignore_tools: bool) -> _Source:
    path, named_by = find_file(config)
    values = read_file(path, named_by) if path is not None else {}
    if not named_by and values.pop("tools", None) and not may_ignore_tools:
        reason = (
            "tools are code that runs, so they are not taken from a file just because it is in this folder: if it is "
            f"yours, name it with --config {path}, or name the tools with --tools"
        )
        raise SettingsError("tools", reason, f"file {path}")
    if not named_by and values.pop("pools", None) and not may_ignore_tools:
        reason = (
            "their commands run, so they are not taken from a file just because it is in this folder: if it is yours, "
            f"name it with --config {path}"
        )
        raise SettingsError("pools", reason, f"file {path}")
    unknown = [key for key in values if key not in Settings.model_fields]
    if unknown:
        raise SettingsError(", ".join(unknown), _no_such_setting(unknown), f"file {path}")
    return _Source(values, lambda _: f"file {path}")


def _no_such_setting(names: Sequence[str]) -> str:
    known = Settings.model_fields
    hint = did_you_mean(*(closest(name, known, most=len(known)) for name in names), spell=str)
    possible = f"the settings are {', '.join(sorted(known))}"
    return " ".join(filter(None, ("there is no such setting;", hint, possible)))


def _explain(error: ValidationError, sources: Iterable[_Source]) -> SettingsError:
    """The first error, as a sentence."""
    first = error.errors(include_url=False)[0]
    setting = str(first["loc"][0]) if first["loc"] else "?"
    given = repr(shown(str(first["input"])))
    if len(given) > _SHOWN_LENGTH:
        given = f"{given[:_SHOWN_LENGTH]}...'"
    place = next((source.place_of(setting) for source in sources if setting in source.values), "")
    if len(first["loc"]) > 1 and setting == "pools":
        setting = ".".join(str(part) for part in first["loc"] if not isinstance(part, int))
        if first["type"] == "extra_forbidden":
            possible = ", ".join(sorted(PoolSettings.model_fields))
            return SettingsError(setting, f"there is no such setting; a pool has {possible}", place)
    return SettingsError(setting, f"{given} is invalid: {_sentence(first['type'], first['msg'])}", place)


def _sentence(kind: str, message: str) -> str:
    if kind.startswith("byte_size"):
        return "it must be a size in bytes, such as 1048576, or 1MiB"
    if kind == "path_type":
        return "it must be the path of a file"
    if kind == "extra_forbidden":
        return _no_such_setting([])
    text = message.removeprefix("Value error, ").partition(", unable")[0]
    return text.replace("Input should be", "it must be").replace("Unable to parse", "unable to parse")
