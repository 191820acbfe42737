"""Settings: their sources, which source wins, and the errors for invalid ones."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from pydantic import ValidationError

from dspex_persist.cli import serve
from dspex_persist.settings import (
    CONFIG_VARIABLE,
    DEFAULT_CONFIG,
    LimitSettings,
    PoolSettings,
    Settings,
    SettingsError,
    flag_of,
    load_settings,
    variable_of,
)
from dspex_persist.state.limits import Limits
from dspex_persist.state.store.session_store import StoreOptions
from dspex_persist.wiring.tools import plans_of

ADDRESSES = ("metrics_listen", "advertise")
FILES = ("tls_cert", "anchor_dir", "tls_key", "client_ca", "token_file", "worker_ca", "worker_cert", "worker_key")
DOCUMENT = Path(__file__).parents[2] / "docs" / "settings.md"
MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, and an environment without settings."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("DSPEX_PERSIST_"):
            monkeypatch.delenv(name)
    return tmp_path


def refusal(flags: dict[str, Any] | None = None, config: Path | None = None) -> SettingsError:
    with pytest.raises(SettingsError) as caught:
        load_settings(flags, config)
    assert "\n" not in str(caught.value)
    return caught.value


# --- Precedence ---


def test_defaults_without_any_source() -> None:
    settings = load_settings()
    assert settings == Settings()
    assert (settings.db, settings.listen, settings.insecure) == (Path("sessions.db"), "127.0.0.1:50051", False)


def test_each_source_wins_over_those_below(working_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (working_directory / DEFAULT_CONFIG).write_text("grace_s = 1\nheartbeat_s = 1\nwatchers = 1\n")
    monkeypatch.setenv("DSPEX_PERSIST_GRACE_S", "2")
    monkeypatch.setenv("DSPEX_PERSIST_HEARTBEAT_S", "2")
    settings = load_settings({"grace_s": "3", "stall_timeout_s": None})
    assert (settings.grace_s, settings.heartbeat_s, settings.watchers, settings.stall_timeout_s) == (3, 2, 1, 30)


def test_a_named_file_is_read_instead_of_the_default_one(
    working_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, watchers in (("dspex-persist.toml", 1), ("from_environment.toml", 2), ("from_flag.toml", 3)):
        (working_directory / name).write_text(f"watchers = {watchers}\n")
    assert load_settings().watchers == 1
    monkeypatch.setenv(CONFIG_VARIABLE, "from_environment.toml")
    assert load_settings().watchers == 2
    assert load_settings(config=Path("from_flag.toml")).watchers == 3


@pytest.mark.parametrize("setting", [name for name in Settings.model_fields if name != "pools"])
def test_every_setting_has_its_environment_variable(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    default = getattr(Settings(), setting)
    text, expected = ("a.pem", Path("a.pem")) if setting in FILES else _other_value(default)
    expected = text if setting in ADDRESSES else expected
    monkeypatch.setenv(variable_of(setting), text)
    assert getattr(load_settings(), setting) == expected != default


def _other_value(default: object) -> tuple[str, object]:
    """A valid text other than the default, and the value that it means."""
    named = {"full": "normal", "info": "debug", "auto": "json", "127.0.0.1:50051": "unix:a.sock"}
    if isinstance(default, bool):
        return str(not default).lower(), not default
    if isinstance(default, tuple):
        return "shop.tools, shop.more:box", ("shop.tools", "shop.more:box")
    if isinstance(default, Path):
        return "other.db", Path("other.db")
    if isinstance(default, str):
        return named[default], named[default]
    return "7", 7


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPEX_PERSIST_GRACE_S", "")
    monkeypatch.setenv(CONFIG_VARIABLE, "")
    assert load_settings() == Settings()


def test_settings_created_directly_ignore_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPEX_PERSIST_GRACE_S", "3")
    assert Settings().grace_s == 10


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Settings().grace_s = 3  # type: ignore[misc]


# --- The meaning of texts ---


@pytest.mark.parametrize(("text", "size_bytes"), [("5", 5), ("1MiB", MIB), ("1.5 KiB", 1536), ("2kb", 2000)])
def test_sizes_may_have_units(text: str, size_bytes: int) -> None:
    assert load_settings({"max_message_bytes": text}).max_message_bytes == size_bytes


def test_none_removes_a_ttl(working_directory: Path) -> None:
    (working_directory / DEFAULT_CONFIG).write_text("session_ttl_s = 5\n")
    assert load_settings().session_ttl_s == 5
    assert load_settings({"session_ttl_s": "none"}).session_ttl_s is None


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert load_settings({"db": "~/sessions.db"}).db == Path("/somewhere/sessions.db")


# --- Errors ---


@pytest.mark.parametrize(
    ("setting", "text", "reason"),
    [
        ("durability", "fast", "it must be 'full' or 'normal'"),
        ("insecure", "perhaps", "it must be a valid boolean"),
        ("grace_s", "soon", "it must be a valid number"),
        ("grace_s", "nan", "it must be"),
        ("grace_s", "0", "it must be greater than 0"),
        ("heartbeat_s", "inf", "it must be"),
        ("session_ttl_s", "-1", "it must be greater than 0"),
        ("session_ttl_s", "1e30", "it must be less than or equal to 1000000000"),
        ("json_depth", "501", "it must be less than or equal to 500"),
        ("json_depth", "1.5", "it must be a valid integer"),
        ("watchers", "9" * 5000, "unable to parse"),
        ("cache_size_bytes", "much", "it must be a size in bytes, such as 1048576, or 1MiB"),
        ("cache_size_bytes", "1 furlong", "it must be a size in bytes"),
        ("max_message_bytes", "2GiB", "it must be less than or equal to 2147483647"),
        ("max_message_bytes", "1", "it must be greater than or equal to 3"),
        ("value_size_bytes", "2GiB", "it must be less than or equal to 1000000000"),
        ("db", ":memory:", "it must be the path of a file"),
        ("db", "", "it must be the path of a file"),
        ("log_level", "loud", "it must be 'debug', 'info', 'warning', 'error' or 'critical'"),
    ],
)
def test_a_bad_value_is_one_sentence_with_setting_and_source(setting: str, text: str, reason: str) -> None:
    error = refusal({setting: text})
    assert (error.setting, error.source) == (setting, f"flag {flag_of(setting)}")
    assert str(error).startswith(f"setting {setting} (flag {flag_of(setting)}): '{text[:50]}")
    assert reason in error.reason
    assert len(str(error)) < 250


def test_the_error_names_the_source_that_applied(working_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (working_directory / DEFAULT_CONFIG).write_text('durability = "slow"\n')
    assert refusal().source == "file dspex-persist.toml"
    monkeypatch.setenv("DSPEX_PERSIST_DURABILITY", "fast")
    assert refusal().source == "environment variable DSPEX_PERSIST_DURABILITY"
    assert refusal({"durability": "never"}).source == "flag --durability"
    assert load_settings({"durability": "full"}).durability == "full"


def test_true_is_not_a_number(working_directory: Path) -> None:
    (working_directory / DEFAULT_CONFIG).write_text("json_depth = true\n")
    assert "it must be a number" in refusal().reason


def test_unknown_keys_of_the_file_are_named_with_what_is_possible(working_directory: Path) -> None:
    (working_directory / DEFAULT_CONFIG).write_text("durabilty = 'full'\n[limits]\njson_depth = 3\n")
    error = refusal()
    assert error.setting == "durabilty, limits"
    assert "did you mean durability?" in error.reason
    assert all(setting in error.reason for setting in Settings.model_fields)
    assert error.source == "file dspex-persist.toml"


def test_a_mistyped_variable_is_refused_but_not_those_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPEX_PERSIST_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("DSPEX_PERSIST_PORT", "tcp://10.0.0.1:50051")
    assert load_settings() == Settings()
    monkeypatch.setenv("DSPEX_PERSIST_DURABILTY", "normal")
    assert "did you mean DSPEX_PERSIST_DURABILITY?" in str(refusal())


@pytest.mark.parametrize(
    ("content", "reason"), [(b"db = 'a\n", "is not valid TOML"), (b"db = '\xff'\n", "it is not UTF-8")]
)
def test_a_file_that_is_not_toml_is_refused(working_directory: Path, content: bytes, reason: str) -> None:
    (working_directory / "bad.toml").write_bytes(content)
    error = refusal(config=Path("bad.toml"))
    assert reason in error.reason
    assert error.source == "flag --config"


def test_a_named_file_must_be_there(working_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(refusal(config=Path("no.toml"))) == (
        "setting config (flag --config): cannot read no.toml: No such file or directory"
    )
    monkeypatch.setenv(CONFIG_VARIABLE, str(working_directory))
    assert refusal().source == f"environment variable {CONFIG_VARIABLE}"


# --- Facts that are stated twice have to agree ---


def test_limits_are_those_of_the_state_layer() -> None:
    assert {name: getattr(LimitSettings(), name) for name in LimitSettings.model_fields} == dataclasses.asdict(Limits())


def test_defaults_are_those_of_the_store() -> None:
    settings, options = Settings(), StoreOptions()
    shared = [field.name for field in dataclasses.fields(StoreOptions) if field.name != "limits"]
    assert {name: getattr(settings, name) for name in shared} == {name: getattr(options, name) for name in shared}


def test_serve_has_a_flag_for_every_setting() -> None:
    app = typer.Typer(add_completion=False)
    app.command()(serve.serve)
    options = {option.name: option.opts for option in typer.main.get_command(app).params}
    expected = {name: [flag_of(name)] for name in Settings.model_fields if name not in LimitSettings.model_fields}
    assert expected.pop("pools") == ["--config"]
    assert options == {**expected, "limit": ["--limit"], "config": ["--config"]}


def test_the_document_lists_every_setting() -> None:
    rows = re.findall(r"^\| `.*$", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [_row(setting) for setting in Settings.model_fields]


def _row(setting: str) -> str:
    field = Settings.model_fields[setting]
    return f"| `{setting}` | `{flag_of(setting)}` | {_shown(field.default)} | {field.description} |"


def _shown(default: object) -> str:
    if default in (None, (), {}):
        return "none"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, int) and default and default % MIB == 0:
        return f"{default // MIB}MiB"
    if isinstance(default, int) and default and default % 1024 == 0:
        return f"{default // 1024}KiB"
    return f"{default:g}" if isinstance(default, float) else str(default)


class TestToolsOfAnUntrustedFile:
    """Tools are code: a user who can write to a folder must not get code run by another who starts a server there."""

    @pytest.fixture(autouse=True)
    def _here(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "dspex-persist.toml").write_text('tools = ["theirs"]\nwatchers = 7\n')
        monkeypatch.chdir(tmp_path)
        for name in [name for name in os.environ if name.startswith("DSPEX_PERSIST_")]:
            monkeypatch.delenv(name)

    def test_are_refused_where_tools_would_run(self) -> None:
        with pytest.raises(SettingsError, match="name it with --config dspex-persist") as refused:
            load_settings(runs_tools=True)
        assert refused.value.source == "file dspex-persist.toml"

    def test_are_left_out_where_none_run(self) -> None:
        settings = load_settings()
        assert (settings.tools, settings.watchers) == ((), 7)

    def test_are_taken_if_the_file_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert load_settings(config=Path("dspex-persist.toml"), runs_tools=True).tools == ("theirs",)
        monkeypatch.setenv("DSPEX_PERSIST_CONFIG", "dspex-persist.toml")
        assert load_settings(runs_tools=True).tools == ("theirs",)

    def test_yield_to_those_that_are_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert load_settings({"tools": ("mine",)}, runs_tools=True).tools == ("mine",)
        monkeypatch.setenv("DSPEX_PERSIST_TOOLS", "mine")
        assert load_settings(runs_tools=True).tools == ("mine",)


def test_a_path_with_an_unknown_home_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "")
    with pytest.raises(SettingsError, match="write the whole path"):
        load_settings({"db": "~no-such-user/s.db"})


def test_pools_are_read_from_a_file_that_is_named(working_directory: Path) -> None:
    file = working_directory / "dspex-persist.toml"
    file.write_text('[pools.old]\ncommand = "python worker.py --port {port}"\nsize = 3\n')
    pool = load_settings(config=file, runs_tools=True).pools["old"]
    assert (pool.command, pool.size, pool.queue_timeout_s) == (("python", "worker.py", "--port", "{port}"), 3, 5)
    with pytest.raises(SettingsError, match=r"setting pools .*their commands run.*--config"):
        load_settings(runs_tools=True)
    assert load_settings().pools == {}


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("sise = 3", r"setting pools\.old\.sise .*there is no such setting; a pool has affinity, "),
        ("size = 0", r"setting pools\.old\.size .*'0' is invalid: "),
        ("affinity = 'none'", r"setting pools\.old\.affinity .*'none' is invalid: "),
    ],
)
def test_a_wrong_setting_of_a_pool_is_named(working_directory: Path, line: str, sentence: str) -> None:
    file = working_directory / "pools.toml"
    file.write_text(f"[pools.old]\n{line}\n")
    with pytest.raises(SettingsError, match=sentence):
        load_settings(config=file)


def test_the_document_lists_every_setting_of_a_pool() -> None:
    rows = re.findall(r"^\| `.*$", DOCUMENT.with_name("workers.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == [
        f"| `{name}` | {_shown(field.default)} | {field.description} |"
        for name, field in PoolSettings.model_fields.items()
    ]


def test_a_pool_works_where_the_server_was_started_or_below() -> None:
    given = {"far": {"cwd": "/far"}, "near": {"cwd": "near"}, "here": {}}
    pools: Any = {name: {"command": "x", **pool} for name, pool in given.items()}
    plans = plans_of(Settings(pools=pools), Path("/start"))
    assert [plan.command.cwd for plan in plans] == [Path("/far"), Path("/start/near"), Path("/start")]


@pytest.mark.parametrize("command", [[], ["", "x"]])
def test_a_pool_without_a_program_is_refused(command: list[str]) -> None:
    with pytest.raises(SettingsError, match="name the command line that starts a worker"):
        plans_of(Settings(pools={"old": {"command": command}}), Path("/"))
