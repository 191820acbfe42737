"""What becomes of calls while the database fails, is away, or is not the one that this server knows."""

import contextlib
import errno
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from dspex_persist import Context
from dspex_persist.state.abilities import Transacts
from dspex_persist.state.anchor import Anchor, Head
from dspex_persist.state.commands import SetVariable
from dspex_persist.state.distributed import DistributedState, PostgresState
from dspex_persist.state.errors import (
    DamagedSessionError,
    FileChangedError,
    ForkedProcessError,
    LostCommitsError,
    NotADatabaseError,
    OutcomeUnknownError,
    ReadFailedError,
    StateError,
    StorageError,
    UnavailableError,
)
from dspex_persist.state.log_store import FencedError, WouldWaitError
from dspex_persist.state.model import Update, Value
from dspex_persist.state.provider import StateProvider
from dspex_persist.state.shared import SharedGroups, SharedState
from dspex_persist.state.store.history import answers
from dspex_persist.state.store.postgres import connections, cursors, writing
from dspex_persist.state.store.postgres.connections import Database
from dspex_persist.state.store.postgres.cursors import NoAnswerError
from dspex_persist.state.store.postgres.notices import Notices
from dspex_persist.state.store.postgres.postgres_log import PostgresLog
from dspex_persist.state.store.postgres.servers import Lease
from dspex_persist.state.store.session_store import StoreOptions
from dspex_persist.state.tools.with_tools import WithTools
from dspex_persist.wiring.connecting import connect, open_audit
from tests.deadline import within
from tests.end_to_end.old_style import serve, target_of
from tests.engines import Databases, Postgres, wait_until
from tests.late import Late
from tests.postgresql.conftest import fill
from tests.postgresql.proxy import Proxy

ours = Late("dspex_persist.optuna")
END_OTHERS = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> %s"


@pytest.fixture
def state(filled: str) -> Iterator[PostgresState]:
    with PostgresState(filled) as state:
        yield state


@pytest.fixture
def beside(filled: str) -> Iterator[Any]:
    """A connection that is not of ours."""
    with psycopg.connect(filled, autocommit=True) as connection:
        yield connection


@pytest.fixture
def proxy(filled: str) -> Iterator[Proxy]:
    # The path of a socket has at most some hundred bytes.
    with tempfile.TemporaryDirectory() as folder, Proxy(filled, Path(folder)) as proxy:
        yield proxy


def value(state: SharedState) -> Value | None:
    return state.get_variable("s", "x").value


# Connections that break


def test_connections_that_were_ended_are_replaced(state: PostgresState, beside: Any) -> None:
    for number in (2, 3):
        beside.execute(END_OTHERS, (beside.info.backend_pid,))
        assert state.set_variable("s", "x", number) == number - 1
        beside.execute(END_OTHERS, (beside.info.backend_pid,))
        assert value(state) == Value(str(number))


def test_a_commit_that_did_not_arrive_was_not_stored(proxy: Proxy) -> None:
    with PostgresState(proxy.url) as state:
        proxy.lose("before")
        with pytest.raises(StorageError, match="the connection to the database was lost"):
            state.set_variable("s", "x", 2)
        assert proxy.happened.is_set()
        assert value(state) == Value("1")
        assert state.set_variable("s", "x", 3) == 1


def test_a_commit_whose_answer_was_lost_was_stored(proxy: Proxy) -> None:
    with PostgresState(proxy.url) as state:
        proxy.lose("after")
        assert state.set_variable("s", "x", 2) == 1
        assert proxy.happened.is_set()
        assert value(state) == Value("2")
        assert state.set_variable("s", "x", 3) == 2


@pytest.fixture(params=["here", "on a server"])
def provider(request: pytest.FixtureRequest, proxy: Proxy, tmp_path: Path) -> Iterator[StateProvider]:
    """What runs on the database behind the proxy."""
    if request.param == "here":
        with DistributedState(proxy.url) as provider:
            yield provider
    else:
        with (
            serve(tmp_path / "unused.db", "--db", proxy.url) as server,
            connect(f"grpc://{target_of(server)}") as bridged,
        ):
            yield bridged


@pytest.mark.parametrize(("fault", "status"), [("before", "failed"), ("after", "committed")])
def test_the_status_of_a_transaction_is_what_became_of_its_commit(
    provider: StateProvider, proxy: Proxy, fault: Any, status: str
) -> None:
    transaction = Transacts.of(provider).begin_transaction("s")
    transaction.run(SetVariable("s", "x", Value("2")))
    proxy.lose(fault)
    with contextlib.suppress(StorageError):
        transaction.commit()
    assert proxy.happened.is_set()
    assert transaction.status == status
    assert provider.get_value("s", "x") == (2 if status == "committed" else 1)


def test_the_status_of_a_transaction_whose_commit_was_not_answered_is_unknown(proxy: Proxy) -> None:
    with WithTools(SharedState(SharedGroups(PostgresLog(proxy.url, settle_s=0.2)))) as provider:
        transaction = provider.begin_transaction("s")
        transaction.run(SetVariable("s", "x", Value("2")))
        proxy.lose("before", stays_away=True)
        with pytest.raises(OutcomeUnknownError):
            transaction.commit()
        assert transaction.status == "unknown"
        proxy.is_away = False


@pytest.mark.parametrize("fault", ["before", "after"])
def test_the_result_of_a_trial_is_not_lost_with_its_commit(proxy: Proxy, fault: Any) -> None:
    with DistributedState(proxy.url) as provider, Context("s", provider) as ctx:
        ctx.define("y", 1, constraints={"min": 0, "max": 9})
        study = ours.Study(ctx, ["y"])
        trial = study.ask()
        proxy.lose(fault)
        assert study.tell(trial, 0.5).values == (0.5,)
        assert proxy.happened.is_set()
        assert [each.state.name for each in study.trials] == ["COMPLETE"]


@pytest.mark.parametrize(("fault", "stored"), [("before", False), ("after", True)])
def test_an_unknown_outcome_is_settled_by_its_key(proxy: Proxy, fault: Any, stored: bool) -> None:
    with SharedState(SharedGroups(PostgresLog(proxy.url, settle_s=0.2))) as state:
        proxy.lose(fault, stays_away=True)
        with pytest.raises(OutcomeUnknownError, match="did not answer whether it has stored the commit"):
            state.set_variable("s", "x", 2, idempotency_key="once")
        with pytest.raises(UnavailableError):
            state.get_variable("s", "x")
        with pytest.raises(StateError) as refused:
            state.set_variable("s", "x", 9)
        assert isinstance(refused.value, UnavailableError | StorageError)
        proxy.is_away = False
        assert value(state) == Value("2" if stored else "1")
        assert state.set_variable("s", "x", 2, idempotency_key="once") == 1
        assert state.get_variable("s", "x").version == 1


def test_a_database_that_is_away_for_a_while(own_postgres: Postgres) -> None:
    url = own_postgres.url()
    fill(url)
    with PostgresState(url) as state, PostgresState(url) as other:
        own_postgres.take_away()
        for each in (state, other):
            with pytest.raises(UnavailableError):
                each.get_variable("s", "x")
            with pytest.raises((UnavailableError, StorageError)):
                each.set_variable("s", "x", 2)
        own_postgres.bring_back()
        assert state.set_variable("s", "x", 3) == 1
        assert value(other) == Value("3")


def test_a_server_that_compares_sizes_outlasts_an_absence(own_postgres: Postgres) -> None:
    url = own_postgres.url()
    fill(url)
    with PostgresState(url, StoreOptions(warn_size_bytes=1 << 40)) as state:
        own_postgres.take_away()
        state._on_writer(state._retention.on_idle)
        own_postgres.bring_back()
        assert state.set_variable("s", "x", 3) == 1


def test_tables_that_are_missing_for_a_while(filled: str, beside: Any) -> None:
    """As while a copy is being put back, or while the rights of the user are changed."""
    with PostgresState(filled) as state:
        beside.execute("ALTER TABLE execution_servers RENAME TO elsewhere")
        state._on_writer(state._groups.sweep)
        beside.execute("ALTER TABLE elsewhere RENAME TO execution_servers")
        assert state.set_variable("s", "x", 3) == 1


def test_a_watch_goes_on_after_its_server_was_killed(filled: str, state: PostgresState, tmp_path: Path) -> None:
    with serve(tmp_path / "unused.db", "--db", filled) as server:
        target = target_of(server)
        with connect(f"grpc://{target}") as client, client.watch("s", ["x"]) as watch:
            server.kill()
            for number in (2, 3):
                state.set_variable("s", "x", number)
            with serve(tmp_path / "unused.db", "--db", filled, "--listen", target):
                updates: list[Update] = []
                wait_until(lambda: bool(updates.extend(watch.pull()) or len(updates) == 2))
                assert [update.variable.version for update in updates] == [1, 2]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give up soon what does not answer: a connection, or a new one."""
    monkeypatch.setattr(cursors, "QUIET_S", 0.2)
    # The driver takes no less.
    monkeypatch.setitem(connections._NETWORK, "connect_timeout", "2")


@pytest.mark.usefixtures("impatient")
def test_a_database_that_takes_connections_and_answers_nothing(own_postgres: Postgres) -> None:
    url = own_postgres.url()
    fill(url)
    with PostgresState(url) as state:
        assert state.set_variable("s", "x", 2) == 1
        assert value(state) == Value("2")
        with own_postgres.stopped():
            for use in (lambda: value(state), lambda: state.set_variable("s", "x", 3)):
                with pytest.raises(UnavailableError):
                    use()
        wait_until(lambda: _succeeds(lambda: state.set_variable("s", "x", 4)))
        assert value(state) == Value("4")
        stopped = own_postgres.stopped()
        stopped.__enter__()
    stopped.__exit__(None, None, None)


def _succeeds(use: Callable[[], object]) -> bool:
    try:
        use()
    except (UnavailableError, StorageError, OutcomeUnknownError):
        return False
    return True


@pytest.mark.usefixtures("impatient")
def test_an_answer_may_take_long_while_the_database_is_there(filled: str) -> None:
    database = Database(filled)
    with database.connect() as patient, database.connect(is_brief=True) as brief:
        assert patient.execute("SELECT 1 FROM pg_sleep(0.7)").fetchone() == (1,)
        with pytest.raises(NoAnswerError, match="the database has not answered"):
            brief.execute("SELECT 1 FROM pg_sleep(0.7)")
        assert brief.broken


@pytest.mark.usefixtures("impatient")
def test_a_commit_that_takes_too_long_is_looked_up(
    filled: str, beside: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # As one does that waits for a synchronous standby.
    beside.execute("""
        CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(1.5); RETURN NULL; END $$;
        CREATE CONSTRAINT TRIGGER waits AFTER INSERT ON commits DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION wait()
    """)
    monkeypatch.setattr(writing, "_COMMIT_S", 0.4)
    with PostgresState(filled) as state:
        assert state.set_variable("s", "x", 2) == 1
        assert value(state) == Value("2")
    assert "commit settled" in caplog.text


def test_a_transaction_that_a_stopped_server_left_is_ended(state: PostgresState, filled: str) -> None:
    with contextlib.closing(PostgresLog(filled)) as stopped:
        writing = stopped._writing
        writing.connect().execute("SET idle_in_transaction_session_timeout = '100ms'")
        # In the transaction, it holds the lock.
        with pytest.raises(StorageError), stopped.group():  # noqa: PT012
            assert state.set_variable("s", "x", 3) == 1
            writing.driver.execute("SELECT 1")
        with stopped.group() as news:
            assert news is not None


# Other servers


def test_servers_tell_each_other(state: PostgresState, beside: Any) -> None:
    beside.execute('LISTEN "dspex_persist.public"')
    state.set_variable("s", "x", 2)
    assert [each.channel for each in beside.notifies(timeout=within(5), stop_after=1)] == ["dspex_persist.public"]


def test_servers_tell_each_other_in_a_schema_with_a_long_name(url: str) -> None:
    own = f"{url}&schema={'%C3%A9' * 31}"
    heard, told = threading.Event(), threading.Event()
    PostgresState(own).close()
    listening, telling = (Notices(Database(own), Lease(Database(own), name, 10)) for name in ("one", "other"))
    try:
        # Once it listens, whatever it hears is from the other one.
        listening.listen(lambda: (heard if told.is_set() else told).set())
        assert told.wait(within(10))
        # It says at once that it is there.
        telling.listen(lambda: None)
        assert heard.wait(within(10))
    finally:
        listening.close()
        telling.close()


def test_a_lost_notice_is_not_missed(state: PostgresState, filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Notices, "tell", lambda _: None)
    with PostgresState(filled) as other, state.watch("s", ["x"]) as watch:
        other.set_variable("s", "x", 2)
        assert next(iter(watch)).variable.version == 1


# Commits that are gone


def ended(state: PostgresState, use: Callable[[], object]) -> BaseException:
    """Why the engine has ended after a call."""
    with pytest.raises(StateError):
        use()
    wait_until(lambda: state._failed is not None)
    assert state._failed is not None
    return state._failed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("UPDATE head SET sequence = sequence - 1", "commit 3 is gone"),
        (
            "UPDATE head SET hash = decode(repeat('77', 32), 'hex')",
            "commit 3 is not the one that this server has seen",
        ),
        ("UPDATE head SET database_id = 'another'", "it is another database than before"),
        # As while a copy is being put back.
        ("DELETE FROM head", "its table head is empty, so nothing says where the log ends"),
    ],
)
def test_a_database_that_was_replaced_ends_its_server(filled: str, beside: Any, change: str, reason: str) -> None:
    heard: list[BaseException] = []
    with PostgresState(filled, on_fatal=heard.append) as state:
        beside.execute(change.encode())
        error = ended(state, lambda: state.set_variable("s", "x", 2))
        assert isinstance(error, LostCommitsError)
        assert reason in str(error)
        assert "delete their anchors" in str(error)
        wait_until(lambda: heard == [error])
        with pytest.raises(LostCommitsError):
            state.get_variable("s", "x")


@pytest.mark.parametrize("change", ["UPDATE head SET sequence = sequence - 1", "DELETE FROM head"])
def test_a_server_that_has_seen_a_loss_is_not_started_again(
    filled: str, beside: Any, tmp_path: Path, change: str
) -> None:
    with serve(tmp_path / "unused.db", "--db", filled) as server:
        beside.execute(change.encode())
        # The code of a start that is refused, on which supervisors do not start it again.
        assert server.wait(within(10)) == 5
        assert f"{filled} has lost acknowledged commits" in server.stderr_tail
        assert "acknowledged writes are safe" not in server.stderr_tail


@pytest.mark.parametrize("table", ["head", "alembic_version"])
def test_a_copy_that_was_put_back_incompletely_is_refused(filled: str, beside: Any, table: str) -> None:
    beside.execute(f"DELETE FROM {table}".encode())
    with pytest.raises(NotADatabaseError, match=f"its table {table} is empty"):
        PostgresState(filled)


def test_a_newer_release_ends_older_servers(filled: str, beside: Any) -> None:
    with PostgresState(filled) as state:
        beside.execute("UPDATE alembic_version SET version_num = '0999'")
        error = ended(state, lambda: state.set_variable("s", "x", 2))
        assert isinstance(error, FileChangedError)
        assert "has upgraded it to schema 0999" in str(error)


def test_an_older_copy_is_refused(postgres: Databases, filled: str, tmp_path: Path) -> None:
    anchors = tmp_path / "state" / "anchors"
    with PostgresState(filled, anchor_dir=anchors) as state:
        state.set_variable("s", "x", 2)
        state.set_variable("s", "x", 3)
    (anchor,) = anchors.iterdir()
    assert anchor.stat().st_mode & 0o777 == 0o600
    with PostgresState(filled, anchor_dir=anchors) as state:
        assert value(state) == Value("3")
    older = postgres.copy("filled", fill)
    try:
        with pytest.raises(LostCommitsError, match="commits 4 to 5 are gone"):
            PostgresState(older, anchor_dir=anchors)
        with PostgresState(older) as unknowing:
            for number in range(3):
                unknowing.set_variable("s", "x", number)
        with pytest.raises(LostCommitsError, match="commit 5 is not the one that this server has seen"):
            PostgresState(older, anchor_dir=anchors)
        anchor.unlink()
        PostgresState(older, anchor_dir=anchors).close()
    finally:
        postgres.drop(older)


def test_commits_stand_while_an_anchor_cannot_be_written(
    filled: str, beside: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(_: Anchor, head: Head) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with PostgresState(filled, anchor_dir=tmp_path) as state, PostgresState(filled) as other:
        monkeypatch.setattr(Anchor, "write", write)
        assert state.set_variable("s", "x", 2) == 1
        assert other.set_variable("s", "x", 3) == 2
        assert value(state) == Value("3")


def test_a_transaction_is_rolled_back_once(filled: str, beside: Any) -> None:
    notices: list[str | None] = []
    with contextlib.closing(PostgresLog(filled)) as log, contextlib.closing(PostgresLog(filled)) as other:
        log._writing.connect().add_notice_handler(lambda notice: notices.append(notice.message_primary))
        with other.group(), pytest.raises(WouldWaitError), log.group(wait=False):
            pass
        beside.execute("UPDATE servers SET epoch = epoch + 1")
        with pytest.raises(FencedError), log.group():
            pass
        with log.group():
            pass
    # "there is no transaction in progress"
    assert notices == []


def test_another_database_at_the_same_address_is_refused(filled: str, beside: Any, tmp_path: Path) -> None:
    PostgresState(filled, anchor_dir=tmp_path).close()
    beside.execute("UPDATE head SET database_id = 'another'")
    with pytest.raises(LostCommitsError, match="it is another database than before"):
        PostgresState(filled, anchor_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


# Rows that somebody has changed


def test_a_damaged_session_is_one_of_a_database(filled: str, beside: Any) -> None:
    beside.execute("ALTER TABLE sessions DISABLE TRIGGER USER")
    beside.execute("UPDATE sessions SET metadata = '7'")
    with PostgresState(filled) as state:
        with pytest.raises(DamagedSessionError) as read:
            state.get_variable("s", "x")
        with pytest.raises(DamagedSessionError) as written:
            state.set_variable("s", "x", 2)
        for refused in (read, written):
            assert "its data in the database is damaged" in str(refused.value)
            assert "a check of the database names what is wrong" in str(refused.value)


def test_unreadable_rows_are_of_the_database(filled: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def head_of(_: object) -> int:
        raise ValueError("not a number")

    monkeypatch.setattr(answers, "head_of", head_of)
    with open_audit(filled) as audit, pytest.raises(ReadFailedError) as refused:
        audit.head()
    assert str(refused.value).startswith(f"{filled} could not be read: it has damaged rows (ValueError)")


# Forks


def test_a_forked_child_uses_no_connection_of_its_parent(state: PostgresState) -> None:
    state.set_variable("s", "x", 2)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            state.get_variable("s", "x")
        except ForkedProcessError:
            state.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert state.set_variable("s", "x", 3) == 2
    assert value(state) == Value("3")
    assert threading.active_count() > 1
