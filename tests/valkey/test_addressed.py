"""Whatever takes an address takes that of a store, and no place that tells it shows its password."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from dspex_persist.state.abilities import Auditable, Durable, Forkable, Prunable, Recordable, Restorable
from dspex_persist.state.errors import InvalidArgumentError, NotADatabaseError, UnavailableError, UnsupportedError
from dspex_persist.state.recording import write_recording
from dspex_persist.wiring.connecting import connect, open_audit
from dspex_persist.wiring.recordings import import_session, open_recording
from tests.addressed import Addressed, Run
from tests.deadline import within
from tests.end_to_end.old_style import environment
from tests.engines import Valkey
from tests.valkey.conftest import address


@pytest.fixture
def secret(valkey: str, valkey_prefix: str, client: redis.Redis) -> str:
    """A log with something in it, by an address with a password."""
    client.execute_command("ACL", "SETUSER", "me", "on", ">geheim", "+@all", "~*", "&*")
    url = address(valkey, valkey_prefix).replace("://", "://me:geheim@")
    with connect(url) as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 1)
    return url


def test_connect(secret: str) -> None:
    with connect(secret, session_ttl_s=60.0) as state, connect(secret, durability="normal") as other:
        assert state.url == secret.replace("geheim", "***")
        assert {"distributed", "durable", "recordings", "imports"} <= state.capabilities
        assert isinstance(state, Durable)
        assert isinstance(state, Recordable)
        for ability in (Auditable, Forkable, Prunable, Restorable):
            with pytest.raises(UnsupportedError):
                ability.of(state)
        state.set_variable("s", "x", 2)
        assert other.get_variable("s", "x").version == 1
    with pytest.raises(TypeError, match="a Redis store has no option timeout_s"):
        connect(secret, timeout_s=1.0)


def test_a_server_with_an_anchor(secret: str, client: redis.Redis, valkey_prefix: str, tmp_path: Path) -> None:
    with connect(secret, anchor_dir=tmp_path / "anchors") as state:
        state.set_variable("s", "x", 2)
    client.delete(*(f"{{{valkey_prefix}}}:{name}" for name in ("head", "log")))
    argv = [sys.executable, "-m", "dspex_persist", "serve", "--db", secret, "--listen", "127.0.0.1:0"]
    done = subprocess.run(
        [*argv, "--anchor-dir", str(tmp_path / "anchors")],
        env=environment(),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=within(30),
        check=False,
    )
    printed = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 5, printed
    assert "it is another database than before" in printed
    assert "(--anchor-dir)" in printed
    assert "geheim" not in printed


class TestAddress(Addressed):
    pass


def test_recordings(secret: str, tmp_path: Path) -> None:
    recording = io.StringIO()
    with open_recording(secret, "s") as (header, commits):
        write_recording(header, commits, recording)
    lines = recording.getvalue().splitlines(keepends=True)
    report = import_session(secret, lines, session_id="copy")
    assert (report.path, report.commits) == (secret.replace("geheim", "***"), header.commits)
    assert import_session(tmp_path / "file.db", lines).commits == header.commits
    with open_audit(tmp_path / "file.db") as audit:
        assert audit.head() == header.commits
    again = io.StringIO()
    with open_recording(tmp_path / "file.db", "s") as (header, commits):
        write_recording(header, commits, again)
    assert again.getvalue() == recording.getvalue(), "not byte for byte"


def test_audits_say_what_to_do_instead(secret: str) -> None:
    with pytest.raises(UnsupportedError, match="import them into a file"):
        open_audit(secret)


def test_what_cannot_be_reached_says_so() -> None:
    with pytest.raises(UnavailableError, match="refused") as refused:
        connect("redis://me:geheim@127.0.0.1:1")
    assert "geheim" not in str(refused.value)
    assert "each part of the address" in str(refused.value)


@pytest.mark.parametrize("words", [("get", "s", "x"), ("session", "export", "s", "-o", "s.jsonl"), ("db", "check")])
def test_commands_say_what_to_look_at(run: Run, secret: str, words: tuple[str, ...]) -> None:
    wrong = secret.replace("me:geheim@", "me:geheim!@")
    for name in ("redis://me:geheim@127.0.0.1:1", wrong, f"{secret}&db=99"):
        code, printed = run(*words, "--db", name)
        assert (code, "host, port, user, password and database in --db" in printed) == (1, True), printed
    code, printed = run(*words, "--db", f"{secret}elsewhere")
    assert (code, "prefix (?prefix=NAME)" in printed) == (5, True), printed


@pytest.mark.parametrize(
    "words",
    [
        ("get", "s", "x"),
        ("get", "s"),
        ("set", "s", "x", "3"),
        ("session", "export", "s", "-o", "s.jsonl"),
        ("db", "check"),
        ("watch", "s", "x", "--since", "1", "--limit", "1"),
    ],
)
def test_commands(run: Run, secret: str, words: tuple[str, ...]) -> None:
    code, printed = run(*words, "--db", secret)
    assert code == 0, printed


def test_commands_take_the_durability_of_the_settings(
    run: Run, own_valkey: Valkey, own_client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_client.config_set("appendfsync", "everysec")
    url = address(own_valkey.url(), "own")
    with connect(url, durability="normal") as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 1)
    # What is there can be read, whatever a power cut would do to what is written.
    assert run("get", "s", "x", "--db", url) == (0, "1\n")
    code, printed = run("set", "s", "x", "2", "--db", url)
    assert (code, "choose the durability normal" in printed) == (5, True), printed
    monkeypatch.setenv("DSPEX_PERSIST_DURABILITY", "normal")
    for words in (
        ("get", "s", "x"),
        ("set", "s", "x", "2"),
        ("session", "export", "s", "-o", "s.jsonl"),
        ("session", "import", "s.jsonl", "--as", "copy"),
    ):
        code, printed = run(*words, "--db", url)
        assert code == 0, printed


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (("db", "backup", "copy.db"), "appendonlydir"),
        (("db", "restore", "copy.db"), "appendonlydir"),
        (("db", "vacuum"), "BGREWRITEAOF"),
        (("db", "stats"), "INFO memory"),
        (("audit", "web"), "session export"),
    ],
)
def test_commands_on_files_say_what_to_use_instead(run: Run, secret: str, words: tuple[str, ...], instead: str) -> None:
    code, printed = run(*words, "--db", secret)
    assert code == 2
    plain = " ".join(printed.replace("│", " ").split())
    assert "is for files, not for" in plain
    assert instead in plain
    if words[0] == "db":
        code, printed = run(*words, "--db", secret, "--json")
        document = json.loads(printed.splitlines()[0])
        assert (code, document["ok"], instead in document["error"]) == (2, False, True)


@pytest.mark.parametrize(
    ("suffix", "options", "says"),
    [
        ("&prfix=nope", (), "prfix"),
        ("%20", (), "prefix"),
        ("", ("--retention-age", "60"), "nothing there prunes it"),
    ],
)
def test_a_server_whose_settings_it_does_not_take_ends_as_one_with_invalid_settings(
    run: Run, secret: str, suffix: str, options: tuple[str, ...], says: str
) -> None:
    """A supervisor does not start it again."""
    code, printed = run("serve", "--db", f"{secret}{suffix}", "--listen", "127.0.0.1:0", *options)
    assert (code, says in printed) == (2, True), printed
    if suffix:
        code, printed = run("get", "s", "x", "--db", f"{secret}{suffix}")
        assert code == 2, printed


def test_commands_of_a_user_who_may_not_write(run: Run, secret: str, client: redis.Redis, valkey_prefix: str) -> None:
    client.execute_command("ACL", "SETUSER", "weak", "on", ">geheim", "~*", "&*", "+@read", "+@connection", "+info")
    code, printed = run("set", "s", "x", "3", "--db", secret.replace("me:", "weak:"))
    assert (code, "docs/valkey.md" in printed) == (1, True), printed
    assert "see whether the database runs" not in printed


def test_commands_on_a_store_whose_memory_is_full(run: Run, own_valkey: Valkey, own_client: redis.Redis) -> None:
    url = address(own_valkey.url(), "own")
    with connect(url) as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "integer", 1)
    own_client.config_set("maxmemory", "1mb")
    code, printed = run("set", "s", "x", "3", "--db", url)
    assert (code, "nothing was written" in printed) == (1, True), printed


def test_a_check_that_finds_problems(run: Run, secret: str, client: redis.Redis, valkey_prefix: str) -> None:
    client.hdel(f"{{{valkey_prefix}}}:live", "s")
    code, printed = run("db", "check", "--db", secret)
    assert code == 3
    assert "session s: it has not ended" in " ".join(printed.split())


def test_a_missing_log_is_not_created_by_a_command(run: Run, valkey: str, client: redis.Redis) -> None:
    url = address(valkey, "nothing")
    code, printed = run("set", "s", "x", "1", "--db", url)
    assert (code, "no sessions under the prefix" in printed) == (5, True), printed
    with pytest.raises(NotADatabaseError):
        open_recording(url, "s").__enter__()
    assert client.keys("{nothing}*") == []


def test_an_address_that_is_none() -> None:
    with pytest.raises(InvalidArgumentError, match="prefix"):
        connect("redis://host?prefix=a b")
