"""Whatever takes an address takes that of a PostgreSQL database, and no place that tells it shows its password."""

import gc
import io
import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from dspex_persist import Context, tool
from dspex_persist.state.abilities import Auditable, Forkable, Prunable, Recordable, Restorable
from dspex_persist.state.audit import SessionQuery
from dspex_persist.state.errors import InvalidArgumentError, NotADatabaseError, UnavailableError
from dspex_persist.state.recording import write_recording
from dspex_persist.wiring.connecting import connect, open_audit
from dspex_persist.wiring.recordings import import_session, open_recording
from tests.addressed import Addressed, Run
from tests.deadline import within
from tests.end_to_end.old_style import environment
from tests.prepared import commands


@tool
def twice(number: int) -> int:
    return 2 * number


@pytest.fixture
def secret(filled: str) -> str:
    """A database with something in it, by a URL with a password, which the server does not ask for."""
    return filled.replace("postgres@", "postgres:geheim@")


def test_connect(secret: str) -> None:
    with connect(secret, tools=[twice], session_ttl_s=60.0) as state, connect(secret) as other:
        assert state.url == secret.replace("geheim", "***")
        assert {"distributed", "durable", "audit", "tools"} <= state.capabilities
        for ability in (Auditable, Forkable, Prunable, Recordable, Restorable):
            assert isinstance(state, ability)
        state.set_variable("s", "x", 2)
        assert other.get_variable("s", "x").version == 1
    with pytest.raises(TypeError, match="a PostgreSQL database has no option timeout_s"):
        connect(secret, timeout_s=1.0)


class TestAddress(Addressed):
    pass


def test_history_and_recordings(secret: str) -> None:
    with open_audit(secret) as audit:
        assert [each.session_id for each in audit.iterate(SessionQuery())] == ["s"]
    recording = io.StringIO()
    with open_recording(secret, "s") as (header, commits):
        write_recording(header, commits, recording)
    report = import_session(secret, recording.getvalue().splitlines(keepends=True), session_id="copy")
    assert (report.path, report.commits) == (secret.replace("geheim", "***"), header.commits)


def test_nothing_is_left_of_a_history_that_was_closed(secret: str) -> None:
    def left() -> int:
        gc.collect()
        return sum(isinstance(each, Engine) for each in gc.get_objects())

    before = left()
    open_audit(secret).close()
    assert left() <= before


def test_reading_creates_nothing(url: str, connection: Any) -> None:
    for read in (open_audit, lambda url: open_recording(url, "s").__enter__()):
        with pytest.raises(NotADatabaseError, match="there are no sessions in its schema public"):
            read(url)
    assert connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)


def test_what_cannot_be_reached_says_so() -> None:
    with pytest.raises(UnavailableError, match="Connection refused") as refused:
        connect("postgresql://me:geheim@127.0.0.1:1/db")
    assert "geheim" not in str(refused.value)
    assert "postgresql://me:***@127.0.0.1:1/db" in str(refused.value)
    assert "each part of the address" in str(refused.value)


@pytest.mark.parametrize(
    "words", [("get", "s", "x"), ("audit", "sessions"), ("session", "export", "s", "-o", "s.jsonl"), ("db", "check")]
)
def test_commands_say_what_to_look_at(run: Run, filled: str, words: tuple[str, ...]) -> None:
    for name in ("postgresql://me:geheim@127.0.0.1:1/db", filled.replace("postgres@", "nobody:geheim@")):
        code, printed = run(*words, "--db", name)
        assert (code, "host, port, user, password and database in --db" in printed) == (1, True), printed
    code, printed = run(*words, "--db", f"{filled}&schema=elsewhere")
    assert (code, "name its schema (?schema=NAME)" in printed) == (5, True), printed


def test_a_user_who_may_not_read_says_so(run: Run, filled: str) -> None:
    import psycopg

    role = f"weak_{uuid.uuid4().hex}"
    with psycopg.connect(filled, autocommit=True) as owner:
        owner.execute(f"CREATE ROLE {role} LOGIN".encode())
        try:
            theirs = filled.replace("postgres@", f"{role}@")
            refused = [run("get", "s", "x", "--db", theirs)]
            owner.execute("CREATE SCHEMA theirs")
            owner.execute(f"GRANT USAGE ON SCHEMA theirs TO {role}".encode())
            unmade = run("serve", "--db", f"{theirs}&schema=theirs", "--listen", "127.0.0.1:0")
            owner.execute(f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}".encode())
            read = run("get", "s", "x", "--db", theirs)
            refused.append(run("set", "s", "x", "2", "--db", theirs))
            refused.append(run("serve", "--db", theirs, "--listen", "127.0.0.1:0"))
        finally:
            owner.execute(f"DROP OWNED BY {role}".encode())
            owner.execute(f"DROP ROLE {role}".encode())
    for code, printed in refused:
        assert (code, "have the owner of its tables grant" in printed) == (1, True), printed
        assert "see whether the database runs" not in printed
    assert read[0] == 0, read
    assert (unmade[0], "GRANT CREATE ON SCHEMA" in unmade[1]) == (5, True), unmade


@pytest.mark.parametrize(
    ("suffix", "options", "says"),
    [
        ("&shcema=nope", (), 'invalid URI query parameter: "shcema"'),
        ("", ("--limit", "session_id_length=2000"), "together at most 650"),
    ],
)
def test_a_server_whose_settings_it_does_not_take_ends_as_one_with_invalid_settings(
    run: Run, filled: str, suffix: str, options: tuple[str, ...], says: str
) -> None:
    """A supervisor does not start it again."""
    code, printed = run("serve", "--db", f"{filled}{suffix}", "--listen", "127.0.0.1:0", *options)
    assert (code, says in printed) == (2, True), printed
    if suffix:
        code, printed = run("get", "s", "x", "--db", f"{filled}{suffix}")
        assert (code, "invalid --db" in printed) == (2, True), printed


@pytest.mark.parametrize(
    "words",
    [
        ("get", "s", "x"),
        ("set", "s", "x", "3"),
        ("sessions", "list"),
        ("session", "show", "s"),
        ("session", "export", "s", "-o", "s.jsonl"),
        ("session", "fork", "s", "fork"),
        ("audit", "sessions"),
        ("audit", "history", "s"),
        ("audit", "verify", "--anchor", "heads.jsonl", "--write"),
        ("db", "check"),
        ("db", "check", "--json"),
        ("db", "prune", "--keep-versions", "1", "--confirm"),
    ],
)
def test_commands(run: Run, secret: str, words: tuple[str, ...]) -> None:
    code, printed = run(*words, "--db", secret)
    assert code == 0, printed


def test_verify_says_what_kept_heads_tell(run: Run, secret: str) -> None:
    words = ("audit", "verify", "--db", secret)
    assert "it has no anchor, so commits missing" in run(*words)[1]
    assert "had no head yet" in run(*words, "--anchor", "heads.jsonl", "--write")[1]
    code, printed = run(*words, "--anchor", "heads.jsonl")
    assert (code, "the newest kept head" in printed, "it has no anchor" in printed) == (0, True, False), printed


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (("db", "backup", "copy.db"), "pg_dump copies such a database while its servers run"),
        (("db", "restore", "copy.db"), "pg_restore or psql"),
        (("db", "vacuum"), "autovacuum"),
        (("db", "stats"), "pg_total_relation_size"),
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


def test_the_anchor_of_a_server_is_not_for_files(tmp_path: Path) -> None:
    words = ("serve", "--db", "file.db", "--anchor-dir", str(tmp_path / "anchors"))
    # In a process of its own: a server sets up the log of its process.
    ended = commands().run(words, cwd=tmp_path, env=environment(), timeout_s=within(60))
    assert (ended.returncode, "a file has its anchor beside it" in ended.stderr) == (2, True), ended.stderr


def test_a_missing_database_is_not_created_by_a_command(run: Run, url: str, connection: Any) -> None:
    for words in (("set", "s", "x", "1"), ("session", "fork", "s", "t"), ("db", "prune", "--keep-versions", "1")):
        code, printed = run(*words, "--db", url)
        assert (code, "there are no sessions" in printed) == (5, True), printed
    assert connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone() == (0,)


def test_a_context_refuses_what_is_no_address() -> None:
    with pytest.raises(InvalidArgumentError, match=r"postgresql://USER@HOST/DATABASE"):
        Context("s", "mysql://host/db")
