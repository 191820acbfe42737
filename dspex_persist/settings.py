"""Settings: frozen, read once: flags, then the environment, then a TOML file, then the defaults."""

import os
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, ByteSize, Field, ValidationError
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from dspex_persist.spelling import closest, did_you_mean

ENV_PREFIX: Final = "DSPEX_PERSIST_"
CONFIG_VARIABLE: Final = f"{ENV_PREFIX}CONFIG"
DEFAULT_CONFIG: Final = Path("dspex-persist.toml")

_KIB: Final = 1024
_MIB: Final = 1024 * _KIB
_SHOWN_LENGTH: Final = 60
# How alike (0 to 1) a name must be to a setting's to be taken for a slip.
_SLIP: Final = 0.8


@dataclass(eq=False)
class SettingsError(ValueError):
    """A setting that cannot be used: its name, why not, and where it came from ("" where that says nothing)."""

    setting: str
    reason: str
    source: str = ""

    def __str__(self) -> str:
        came_from = f" ({self.source})" if self.source else ""
        return f"setting {self.setting}{came_from}: {self.reason}"


def _read_path(path: Path) -> Path:
    if str(path) in (".", ":memory:"):
        raise ValueError("it must be the path of a file: sessions are always kept on disk")
    try:
        return path.expanduser()
    except RuntimeError:
        raise ValueError(
            "~ stands for no folder: HOME is not set, and this user has none; write the path out"
        ) from None


def _read_none(value: object) -> object:
    return None if isinstance(value, str) and value.strip().lower() == "none" else value


def _read_list(value: object) -> object:
    """A list as TOML has it, or in one text, separated by commas, as the environment has to have it."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _refuse_bool(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("it must be a number")
    return value


DatabasePath = Annotated[Path, AfterValidator(_read_path)]
# At most 31 years: sums with a clock stay within what dates and timeouts can hold.
Seconds = Annotated[float, BeforeValidator(_refuse_bool), Field(gt=0, le=1e9, allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=1, le=1_000_000_000)]
Size = Annotated[ByteSize, BeforeValidator(_refuse_bool), Field(ge=1, le=2**50)]


class LimitSettings(BaseSettings):
    """How much of everything a store accepts: the fields and defaults of `state.limits.Limits`."""

    # SQLite refuses a larger value, and with it everything that is written in the same transaction. And Python reads
    # some 10 MiB of JSON a second, while nothing else goes on.
    value_size_bytes: Annotated[Size, Field(le=1_000_000_000)] = Field(
        ByteSize(2 * _MIB), description="Largest JSON of a value, and of what describes a binary one."
    )
    binary_size_bytes: Annotated[Size, Field(le=1_000_000_000)] = Field(
        ByteSize(16 * _MIB), description="Largest binary content of a value."
    )
    stream_size_bytes: Annotated[Size, Field(le=1_000_000_000)] = Field(
        ByteSize(16 * _MIB), description="All chunks of a streaming tool together, whose list is its result."
    )
    # The JSON reader recurses, and Python ends that at about a thousand levels.
    json_depth: Annotated[Count, Field(le=500)] = Field(100, description="Deepest nesting of a JSON value.")
    session_size_bytes: Size = Field(
        ByteSize(64 * _MIB),
        description="Contents of a session: values, constraints, metadata, tools, and 1,500 bytes for each variable; "
        "at most two thirds of `max_message_bytes`.",
    )
    variables_per_session: Count = Field(10_000, description="Variables in one session.")
    tools_per_session: Count = Field(1_000, description="Tools that workers register in one session.")
    name_length: Count = Field(255, description="Characters in the name of a variable, or in an idempotency key.")
    session_id_length: Count = Field(255, description="Characters in the id of a session.")
    metadata_entries: Count = Field(64, description="Metadata entries of one request, session or variable.")
    metadata_size_bytes: Size = Field(ByteSize(16 * _KIB), description="Size of such metadata, keys included.")
    constraints_size_bytes: Size = Field(ByteSize(64 * _KIB), description="Size of a variable's constraints.")
    batch_entries: Count = Field(10_000, description="Variables in one batch, read or written.")
    history_entries: Count = Field(10_000, description="Versions in one answer of GetVariableHistory.")
    history_size_bytes: Size = Field(
        ByteSize(16 * _MIB),
        description="Once an answer of GetVariableHistory has so much, the rest is for the next; at most a third of "
        "`max_message_bytes`.",
    )
    queue_length: Count = Field(10_000, description="Writes that wait; those beyond are refused at once.")
    watchers: Count = Field(10_000, description="Watches that are open at the same time.")
    executions: Count = Field(10_000, description="Tool executions that run or wait at the same time.")
    execution_writes: Count = Field(10_000, description="Writes of one execution, with those that it calls.")
    execution_size_bytes: Size = Field(
        ByteSize(64 * _MIB),
        description="What one execution is given and writes, with what those that it calls leave in the journal.",
    )
    journal_size_bytes: Size = Field(
        ByteSize(_MIB), description="What one execution may log and record in the journal."
    )


class Settings(LimitSettings):
    """All settings of a server, checked. `load_settings` reads them from where users write them."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_prefix=ENV_PREFIX, env_ignore_empty=True)

    db: DatabasePath = Field(Path("sessions.db"), description="The database file; created if missing.")
    listen: str = Field(
        "127.0.0.1:50051",
        description="Where to listen: `HOST:PORT` (port 0: a free one), `[IPv6]:PORT` or `unix:PATH`.",
    )
    insecure: bool = Field(
        False, description="Allow `listen` to be reachable from other machines, without encryption or login."
    )
    durability: Literal["full", "normal"] = Field(
        "full",
        description="`full`: what was acknowledged survives a power cut. `normal`: faster, it survives a crash only.",
    )
    session_ttl_s: Annotated[Seconds | None, BeforeValidator(_read_none)] = Field(
        None, description="A session ends this long after it was last used; `none`: never."
    )
    optimization_lease_s: Seconds = Field(
        300.0, description="An optimizer that has not written for so long loses its lock on a variable."
    )
    sweep_interval_s: Seconds = Field(30.0, description="How often sessions that have expired are reclaimed.")
    cache_size_bytes: Size = Field(ByteSize(256 * _MIB), description="Memory for the sessions in use.")
    outcome_retention_s: Seconds = Field(
        7 * 86_400.0, description="How long the outcome of a write with an idempotency key is remembered."
    )
    retention_keep_versions: Annotated[Count | None, BeforeValidator(_read_none)] = Field(
        None, description="Delete all but the newest so many versions of each variable; `none`: history stays."
    )
    retention_age_s: Annotated[Seconds | None, BeforeValidator(_read_none)] = Field(
        None, description="Delete old versions older than this; with the setting above: only where both say so."
    )
    retention_ended_sessions_s: Annotated[Seconds | None, BeforeValidator(_read_none)] = Field(
        None, description="Delete the history of sessions that ended so long ago; `none`: it stays."
    )
    warn_size_bytes: Annotated[Size | None, BeforeValidator(_read_none)] = Field(
        None, description="Warn in the log, once a day, when the database is larger than this."
    )
    heartbeat_s: Seconds = Field(15.0, description="How often a watch with nothing to tell sends a heartbeat.")
    stall_timeout_s: Seconds = Field(
        30.0, description="A watch whose client takes no update for so long is ended, and can be resumed."
    )
    grace_s: Seconds = Field(10.0, description="How long calls in flight may take to finish when the server stops.")
    tools: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_read_list)] = Field(
        (), description="Where the server's tools are: `package.module` or `package.module:name`, several if need be."
    )
    tool_threads: Annotated[Count, Field(le=10_000)] = Field(
        64, description="Threads for tools; those beyond wait. Asynchronous tools need none."
    )
    remote_timeout_s: Seconds = Field(
        300.0, description="How long a tool in another process may take, where neither it nor its caller says."
    )
    record_lm: bool = Field(False, description="Keep the LM calls of all tools in the journal; needs DSPy.")
    audit_reveal: bool = Field(
        False, description="Show values of sensitive variables to clients of the audit service that ask for them."
    )
    audit_prune: bool = Field(
        False, description="Let clients of the audit service have history pruned; a dry run they may ask for anyway."
    )
    # Other limits are thirds of it.
    max_message_bytes: Annotated[Size, Field(ge=3, le=2**31 - 1)] = Field(
        ByteSize(100 * _MIB), description="Largest gRPC message, received or sent."
    )
    reflection: bool = Field(True, description="Tell tools such as grpcurl what services there are.")
    log_level: Literal["debug", "info", "warning", "error", "critical"] = Field(
        "info", description="What is logged, to stderr: this level and above."
    )
    log_style: Literal["auto", "json", "console"] = Field(
        "auto", description="`auto`: lines for people on a terminal, JSON elsewhere."
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
        # `Settings(...)` means what it says. `load_settings` reads the others, and knows which one a value is from.
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)


@dataclass(frozen=True, slots=True)
class _Source:
    """Values by the name of their setting, and what to call the place where a setting's is written."""

    values: Mapping[str, Any]
    place_of: Callable[[str], str]


def flag_of(setting: str) -> str:
    """How the command line calls a setting: `--session-ttl` for session_ttl_s; limits share `--limit`."""
    if setting in LimitSettings.model_fields:
        return f"--limit {setting}"
    return f"--{setting.removesuffix('_s').replace('_', '-')}"


def variable_of(setting: str) -> str:
    """The environment variable of a setting."""
    return ENV_PREFIX + setting.upper()


def load_settings(
    flags: Mapping[str, Any] | None = None, config: Path | None = None, *, runs_tools: bool = False
) -> Settings:
    """The settings by precedence: `flags` (None: not given), environment, TOML file, defaults.

    The file is `config`, else what DSPEX_PERSIST_CONFIG names, else `dspex-persist.toml` in the working directory
    where there is one. That last one may be anybody's, and tools are code: it cannot name any, which is an error for
    a command that `runs_tools` unless a flag or the environment names them.

    Raises `SettingsError` for a value that cannot be, for a key of the file that is no setting, and for a file that is
    missing or cannot be read.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    named, environment = _Source(given, lambda setting: f"flag {flag_of(setting)}"), _environment()
    says_tools = not runs_tools or "tools" in given or "tools" in environment.values
    sources = (named, environment, _file(config, may_leave_out_tools=says_tools))
    merged: dict[str, Any] = {}
    for source in reversed(sources):
        merged.update(source.values)
    try:
        return Settings(**merged)
    except ValidationError as error:
        raise _explain(error, sources) from None


def _environment() -> _Source:
    _check_variables(name for name in os.environ if name.startswith(ENV_PREFIX))
    return _Source(EnvSettingsSource(Settings)(), lambda setting: f"environment variable {variable_of(setting)}")


def _check_variables(names: Iterable[str]) -> None:
    """Refuse what looks like a slip. Not all unknown ones: orchestrators set, for one, DSPEX_PERSIST_SERVICE_HOST."""
    known = ("config", *Settings.model_fields)
    for name in names:
        setting = name.removeprefix(ENV_PREFIX).lower()
        meant = closest(setting, known, _SLIP, most=len(known))
        if meant and setting not in known:
            reason = f"there is no such setting; {did_you_mean(variable_of(meant), spell=str)}"
            raise SettingsError(setting, reason, f"environment variable {name}")


def _file(config: Path | None, *, may_leave_out_tools: bool) -> _Source:
    path, named_by = _find_file(config)
    values = _read_toml(path, named_by) if path is not None else {}
    if not named_by and values.pop("tools", None) and not may_leave_out_tools:
        reason = (
            "tools are code that runs, so they are not taken from a file just because it lies here: "
            f"name it with --config {path} if it is yours, or name the tools with --tools"
        )
        raise SettingsError("tools", reason, f"file {path}")
    unknown = [key for key in values if key not in Settings.model_fields]
    if unknown:
        raise SettingsError(", ".join(unknown), _no_such_setting(unknown), f"file {path}")
    return _Source(values, lambda _: f"file {path}")


def _find_file(config: Path | None) -> tuple[Path | None, str]:
    """The file to read, if any, and who named it."""
    if config is not None:
        return config, "flag --config"
    if named := os.environ.get(CONFIG_VARIABLE):
        return Path(named), f"environment variable {CONFIG_VARIABLE}"
    return (DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else None), ""


def _read_toml(path: Path, named_by: str) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError("config", f"{path} is not valid TOML: {error}", named_by) from error
    except UnicodeDecodeError as error:
        raise SettingsError("config", f"{path} is not valid TOML: it is no UTF-8", named_by) from error
    except OSError as error:
        raise SettingsError("config", f"cannot read {path}: {error.strerror}", named_by) from error


def _no_such_setting(names: Sequence[str]) -> str:
    known = Settings.model_fields
    hint = did_you_mean(*(closest(name, known, most=len(known)) for name in names), spell=str)
    possible = f"possible are {', '.join(sorted(known))}"
    return " ".join(filter(None, ("there is no such setting;", hint, possible)))


def _explain(error: ValidationError, sources: Iterable[_Source]) -> SettingsError:
    """The first thing that is wrong, as a sentence."""
    first = error.errors(include_url=False)[0]
    setting = str(first["loc"][0]) if first["loc"] else "?"
    shown = repr(str(first["input"]))
    if len(shown) > _SHOWN_LENGTH:
        shown = f"{shown[:_SHOWN_LENGTH]}...'"
    place = next((source.place_of(setting) for source in sources if setting in source.values), "")
    return SettingsError(setting, f"{shown} will not do: {_sentence(first['type'], first['msg'])}", place)


def _sentence(kind: str, message: str) -> str:
    if kind.startswith("byte_size"):
        return "it must be a size in bytes, such as 1048576, or 1MiB"
    if kind == "path_type":
        return "it must be the path of a file"
    if kind == "extra_forbidden":
        return _no_such_setting([])
    text = message.removeprefix("Value error, ").partition(", unable")[0]
    return text.replace("Input should be", "it must be").replace("Unable to parse", "unable to parse")
