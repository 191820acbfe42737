"""What a line of the token file says beside the scopes: how much, until when, whose certificate. One server for all."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from queue import Queue
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
from freezegun import freeze_time
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

from dspex_persist import clock
from dspex_persist.infra.access import tokens
from dspex_persist.settings import Settings, SettingsError
from dspex_persist.state.audit import DenialQuery, HistoryQuery
from dspex_persist.state.bridge.access.denials import Denials
from dspex_persist.state.bridge.access.scopes import Access, names_of
from dspex_persist.state.bridge.workers.callbacks import Callbacks
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.denials import Refused
from dspex_persist.state.errors import (
    PermissionDeniedError,
    QuotaExceededError,
    RateLimitedError,
    UnauthenticatedError,
    UnavailableError,
)
from dspex_persist.testing.server import ServedDatabase
from dspex_persist.wiring.serving import serve
from tests.certificates import Authority, Pair
from tests.deadline import within
from tests.other_users import as_user


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokens") / "tokens"


@pytest.fixture(scope="module")
def admin(file: Path) -> str:
    return tokens.add(file, "root", ["admin"])


@pytest.fixture(scope="module")
def served(file: Path, admin: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDatabase]:
    with ServedDatabase(tmp_path_factory.mktemp("served") / "a.db", {"token_file": file}) as served:
        with BridgedState(served.target, token=admin) as state:
            state.initialize_session("s")
            state.register_variable("s", "x", "integer", 0)
        yield served


def flood(served: ServedDatabase, token: str) -> Any:
    with grpc.insecure_channel(served.target) as channel:
        call: Any = channel.unary_unary("/snakepit.bridge.BridgeService/Ping")
        try:
            for _ in range(1_000):
                call(b"", metadata=(("authorization", f"Bearer {token}"),), timeout=within(20))
        except grpc.RpcError as error:
            return error
    raise AssertionError("none was refused")


def test_too_many_calls_are_refused_with_the_time_to_wait_and_our_clients_wait(
    served: ServedDatabase, file: Path, admin: str
) -> None:
    token = tokens.add(file, "eager", ["read", "write"], {"rate": "20/s"})
    error = flood(served, token)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.details().startswith(
        "eager may make 20 calls per second and makes more; nothing was done; repeat in 0."
    )
    trailers = dict(error.trailing_metadata())
    assert 0 < int(trailers["grpc-retry-pushback-ms"]) <= 50
    delay = RetryInfo()
    assert any(each.Unpack(delay) for each in Status.FromString(trailers["grpc-status-details-bin"]).details)
    assert 0 < delay.retry_delay.ToMilliseconds() <= 50
    with BridgedState(served.target, token=token, timeout_s=within(60)) as state, state.audit() as audit:
        versions = [state.set_variable("s", "x", number) for number in range(30)]
        assert versions == list(range(versions[0], versions[0] + 30)), "each was written once"
        for _ in range(5):
            audit.head()
    with BridgedState(served.target, token=admin) as state, state.audit() as audit:
        assert {each.missing for each in audit.denials(DenialQuery(identity="eager"))} == {
            "more than 20 calls per second"
        }


def test_a_client_that_may_not_wait_long_enough_says_what_to_do(served: ServedDatabase, file: Path) -> None:
    token = tokens.add(file, "slow", ["read"], {"rate": "2/h"})
    with BridgedState(served.target, token=token, timeout_s=within(20)) as state:
        state.get_value("s", "x")
        with pytest.raises(RateLimitedError, match="2 calls per hour") as raised:
            state.get_value("s", "x")
    assert raised.value.retryable
    assert 0 < raised.value.retry_in_s <= 1_800


def test_a_call_whose_request_is_being_sent_is_in_progress(served: ServedDatabase, file: Path) -> None:
    token = tokens.add(file, "slow-to-send", ["read"], {"inflight": "2"})
    released, header = threading.Event(), (("authorization", f"Bearer {token}"),)
    ended: Queue[Any] = Queue()

    def nothing() -> Iterator[bytes]:
        released.wait(within(20))
        yield b""

    with grpc.insecure_channel(served.target) as channel:
        sending = channel.stream_unary("/snakepit.bridge.BridgeService/Ping")
        calls = [sending.future(nothing(), metadata=header, timeout=within(20)) for _ in range(3)]
        for each in calls:
            each.add_done_callback(ended.put)
        # The one that is too many is answered without its request.
        assert (
            ended.get(timeout=within(20))
            .details()
            .startswith("slow-to-send may make 2 calls in progress and makes more")
        )
        released.set()
        assert sum(each.exception() is None for each in calls) == 2


def test_calls_in_progress_are_counted_until_they_end(served: ServedDatabase, file: Path) -> None:
    token = tokens.add(file, "busy", ["read"], {"inflight": "2"})
    with BridgedState(served.target, token=token, timeout_s=0.3) as state:
        first, second = state.watch("s"), state.watch("s")
        with pytest.raises(RateLimitedError, match="2 calls in progress"):
            state.get_value("s", "x")
        first.close()
        second.close()
    with BridgedState(served.target, token=token, timeout_s=within(20)) as state, ThreadPoolExecutor(4) as threads:
        assert len(list(threads.map(lambda _: state.get_value("s", "x"), range(16)))) == 16


def test_an_expired_token_says_when(served: ServedDatabase, file: Path) -> None:
    token = tokens.add(file, "past", ["read"], {"expires": "2090-01-01"})
    file.write_text(file.read_text().replace("2090-01-01T00:00:00Z", "2026-01-02T03:04"))
    expired = pytest.raises(UnauthenticatedError, match="the token expired on 2026-01-02 at 03:04 UTC")
    with BridgedState(served.target, token=token) as state, expired:
        state.get_value("s", "x")


class Watcher:
    """Waits on a thread for the end of a watch."""

    def __init__(self, served: ServedDatabase, token: str) -> None:
        self._state = BridgedState(served.target, token=token)
        self._watch = self._state.watch("s")
        self._ended = threading.Event()
        self._watch.notify(self._ended.set)

    def error(self) -> BaseException:
        try:
            assert self._ended.wait(within(20))
            with pytest.raises((UnauthenticatedError, PermissionDeniedError)) as raised:
                self._watch.pull()
            return raised.value
        finally:
            self._state.close()


def test_open_streams_end_when_the_token_is_revoked_expires_or_loses_the_scope(
    served: ServedDatabase, file: Path, admin: str
) -> None:
    revoked = Watcher(served, tokens.add(file, "revoked", ["read"]))
    expiring = Watcher(served, tokens.add(file, "expiring", ["read"], {"expires": "2100-01-01"}))
    reduced = Watcher(served, tokens.add(file, "reduced", ["read"]))
    with BridgedState(served.target, token=tokens.add(file, "stays", ["read", "write"])) as stays:
        watch = stays.watch("s")
        transaction = stays.begin_transaction("s")
        tokens.revoke(file, "revoked")
        assert "was revoked" in str(revoked.error())
        soon = (clock.now() + timedelta(seconds=0.2)).isoformat()
        text = file.read_text().replace("reduced read", "reduced write").replace("2100-01-01T00:00:00Z", soon)
        file.write_text(text)
        assert "reduced may not call WatchVariables: its token lacks the scope read" in str(reduced.error())
        assert "the token expired on" in str(expiring.error())
        transaction.abort()
        stays.set_variable("s", "x", -1)
        arrived = threading.Event()
        watch.notify(arrived.set)
        while not watch.pull():
            assert arrived.wait(within(20))
    with BridgedState(served.target, token=admin) as state, state.audit() as audit:
        denied = audit.denials(DenialQuery(rpc="WatchVariables"))
    ended = [each.identity for each in denied if each.missing == "a token that is still valid: its stream was ended"]
    assert sorted(ended) == ["expiring", "reduced", "revoked"]


# Certificates


def test_the_names_in_a_certificate() -> None:
    facts = {"x509_common_name": [b"ada"], "x509_subject_alternative_name": [b"a.example.org", b"ada@example.org"]}
    assert names_of(facts) == ["ada", "a.example.org", "ada@example.org"]
    assert names_of({"transport_security_type": [b"ssl"]}) == []


def secured(target: str, authority: Authority, pair: Pair | None, token: str | None = None) -> BridgedState:
    files = {} if pair is None else {"cert": pair.cert, "key": pair.key}
    return BridgedState(f"grpcs://{target}", ca=authority.cert, token=token, timeout_s=within(20), **files)


def test_without_tokens_the_name_in_the_certificate_is_the_actor(authority: Authority, tmp_path: Path) -> None:
    server, ada = authority.issue("server"), authority.issue("ada lovelace", "email:ada@example.org")
    settings = {"tls_cert": server.cert, "tls_key": server.key, "client_ca": authority.cert}
    with ServedDatabase(tmp_path / "a.db", settings) as served:
        with secured(served.target, authority, ada) as state:
            state.initialize_session("s")
            state.register_variable("s", "x", "integer", 0, actor="user:bob")
            with state.audit() as audit:
                assert [each.actor for each in audit.iterate(HistoryQuery())] == ["ada_lovelace for user:bob"]
                assert audit.denials() == ()
        with secured(served.target, authority, None) as state, pytest.raises(UnavailableError):
            state.get_value("s", "x")


def test_with_tokens_a_certificate_needs_a_line_or_a_token(authority: Authority, tmp_path: Path) -> None:
    server, known, other = (
        authority.issue("server"),
        authority.issue("known", "DNS:known.example.org"),
        authority.issue("other"),
    )
    file = tmp_path / "tokens"
    token = tokens.add(file, "somebody", ["read"])
    file.write_text(f"{file.read_text()}reports read,write cert:known.example.org expires=2100-01-01\n")
    settings = {"tls_cert": server.cert, "tls_key": server.key, "client_ca": authority.cert, "token_file": file}
    with ServedDatabase(tmp_path / "a.db", settings) as served:
        with secured(served.target, authority, known) as state:
            state.initialize_session("s")
            state.register_variable("s", "x", "integer", 0)
            with pytest.raises(PermissionDeniedError, match="reports may not call ListDenials"), state.audit() as audit:
                audit.denials()
        with secured(served.target, authority, known, token) as state, pytest.raises(PermissionDeniedError) as denied:
            state.set_variable("s", "x", 1)
        assert denied.value.identity == "somebody", "the token says who it is"
        refused = pytest.raises(UnauthenticatedError, match="no line for its certificate")
        with secured(served.target, authority, other) as state, refused:
            state.get_value("s", "x")
        file.write_text(file.read_text().replace("2100", "2020"))
        expired = pytest.raises(UnauthenticatedError, match="line of the certificate in the token file expired on 2020")
        with secured(served.target, authority, known) as state, expired:
            state.get_value("s", "x")


def test_sessions_and_stored_bytes(served: ServedDatabase, file: Path) -> None:
    token = tokens.add(file, "tenant", ["read", "write"], {"sessions": "1", "bytes": "1KiB"})
    with BridgedState(served.target, token=token, timeout_s=within(20)) as state:
        state.initialize_session("mine")
        state.register_variable("mine", "text", "string", "x" * 500)
        with pytest.raises(QuotaExceededError, match="tenant may have 1 live sessions, and would have 2"):
            state.initialize_session("more", actor="user:ada")
        with pytest.raises(QuotaExceededError, match="tenant may have 1,024 stored bytes, and would have 1,102"):
            state.set_variable("mine", "text", "x" * 598)
        # It began neither.
        assert state.set_variable("s", "x", 7)


# Other users of this machine


AS_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")


def check_another_user_is_refused(target: str, token: str = "", user: int = 65534) -> None:
    metadata = (("authorization", f"Bearer {token}"),) if token else ()
    calling = (
        "import grpc, sys\n"
        f"with grpc.insecure_channel({target!r}) as channel:\n"
        "    try:\n"
        "        channel.unary_unary('/snakepit.bridge.BridgeService/Ping')(b'', timeout=60,\n"
        f"            metadata={metadata})\n"
        "    except grpc.RpcError as error:\n"
        "        print(error.code().name, error.details())\n"
    )
    command = as_user(user, sys.executable, "-c", calling)
    answer = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/")
    assert answer.stdout.startswith(
        "UNAUTHENTICATED not authenticated: the call comes from a process of another user; run it as the user of"
    ), answer


@AS_ROOT
def test_processes_of_other_users_are_refused(file: Path, admin: str, tmp_path: Path) -> None:
    with ServedDatabase(tmp_path / "a.db", {"same_user": True, "token_file": file}) as served:
        with BridgedState(served.target, token=admin, timeout_s=within(20)) as state:
            state.initialize_session("s")
        check_another_user_is_refused(served.target, admin)
        with BridgedState(served.target, token=admin, timeout_s=within(20)) as state, state.audit() as audit:
            (denied,) = audit.denials()
    assert denied.missing == "a process of the user of the server"


@AS_ROOT
def test_they_are_noted_at_the_port_of_a_worker_too() -> None:
    class Servicer:
        def __getattr__(self, name: str) -> Any:
            async def method(_request: object, _context: object) -> None:
                raise AssertionError(name)

            return method

    async def test() -> None:
        servicer: Any = Servicer()
        callbacks = Callbacks(Mock(), servicer, servicer, Denials(noted.append))
        port = await callbacks.serve("127.0.0.1:0", 1024 * 1024)
        try:
            await asyncio.to_thread(check_another_user_is_refused, f"127.0.0.1:{port}")
        finally:
            await callbacks.close()

    noted: list[Refused] = []
    asyncio.run(test())
    rpc = "snakepit.bridge.BridgeService.Ping"
    assert noted == [Refused("", "ipv4:127.0.0.1", rpc, "", "a process of the user of the server")]


def test_it_is_for_loopback_only(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="other machines can reach"):
        serve(Settings(db=tmp_path / "a.db", listen="0.0.0.0:0", insecure=True, same_user=True))
    assert not list(tmp_path.iterdir())


def test_open_streams_are_looked_at_only_if_something_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokens"
    token = tokens.add(path, "a", ["read"], {"expires": "2100-01-01"})
    asked = []
    look_up = tokens.Tokens.look_up
    monkeypatch.setattr(tokens.Tokens, "look_up", lambda self, digest: (asked.append(digest), look_up(self, digest))[1])

    class Call:
        def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
            return (("authorization", f"Bearer {token}"),)

        def peer(self) -> str:
            return "unix:"

    async def test() -> None:
        access = Access(tokens.Tokens(path))
        task = asyncio.create_task(asyncio.sleep(within(60)))
        admissions = [access.admit("snakepit.bridge.BridgeService.WatchVariables", Call(), task) for _ in range(50)]
        access._look()
        asked.clear()
        for _ in range(10):
            access._look()
        assert asked == []
        with freeze_time("2100-01-02"):
            access._look()
        assert len(asked) == 50
        with pytest.raises(asyncio.CancelledError):
            await task
        assert [type(admission.end(asyncio.CancelledError())) for admission in admissions if admission] == [
            UnauthenticatedError
        ] * 50

    asyncio.run(test())
