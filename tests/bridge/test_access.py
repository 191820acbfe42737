"""Every rpc with every kind of token: who is let in, what the others hear, and whose name the history has."""

import errno
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

import dspex_persist
from dspex_persist import Context
from dspex_persist.infra.access.peers import PeerUsers
from dspex_persist.infra.access.tokens import SCOPES
from dspex_persist.settings import Settings, SettingsError
from dspex_persist.state.audit import DenialQuery, HistoryQuery
from dspex_persist.state.bridge.access.denials import host_of
from dspex_persist.state.bridge.access.same_user import SameUser
from dspex_persist.state.bridge.access.scopes import SCOPE_OF
from dspex_persist.state.bridge.codec import BRIDGE_SERVICE
from dspex_persist.state.bridge.rpcs.audit import AUDIT_SERVICE
from dspex_persist.state.bridged import BridgedState
from dspex_persist.state.errors import (
    InvalidArgumentError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnavailableError,
)
from dspex_persist.testing.server import ServedDatabase
from dspex_persist.wiring.serving import serve
from tests.deadline import within

_LOADED = (health_pb2, reflection_pb2)

SERVICES = (
    BRIDGE_SERVICE,
    AUDIT_SERVICE,
    *map(
        descriptor_pool.Default().FindServiceByName,
        ("grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"),
    ),
)
METHODS: dict[str, MethodDescriptor] = {each.full_name: each for service in SERVICES for each in service.methods}
REFUSED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
TOKENS = {scope: f"token-of-{scope}" for scope in SCOPES}


def line(name: str, scopes: str, token: str) -> str:
    return f"{name} {scopes} sha256:{hashlib.sha256(token.encode()).hexdigest()}\n"


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("tokens") / "tokens"
    file.touch(0o600)
    file.write_text("".join(line(f"the-{scope}", scope, token) for scope, token in TOKENS.items()))
    return file


@pytest.fixture(scope="module")
def served(tokens: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedDatabase]:
    with ServedDatabase(tmp_path_factory.mktemp("served") / "a.db", {"token_file": tokens}) as served:
        yield served


def test_each_rpc_has_a_scope() -> None:
    """A new rpc needs a row: which scope it takes is a decision, not a default."""
    assert set(SCOPE_OF) == set(METHODS)
    assert set(SCOPE_OF.values()) == {"", "any", *SCOPES}
    assert [name for name, scope in SCOPE_OF.items() if scope == ""] == [
        "grpc.health.v1.Health.Check",
        "grpc.health.v1.Health.Watch",
    ]


def answer(channel: Any, method: MethodDescriptor, metadata: tuple[tuple[str, str], ...]) -> grpc.StatusCode:
    """Call an rpc with an empty request; return the status, or OK once it answers at all."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    try:
        if not method.server_streaming:
            channel.unary_unary(path)(b"", timeout=within(20), metadata=metadata)
            return grpc.StatusCode.OK
        if method.client_streaming:
            call = channel.stream_stream(path)(iter([b""]), timeout=within(20), metadata=metadata)
        else:
            call = channel.unary_stream(path)(b"", timeout=within(20), metadata=metadata)
        next(call, None)
        call.cancel()
    except grpc.RpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


def test_every_rpc_with_every_kind_of_token(served: ServedDatabase) -> None:
    kinds: dict[str, tuple[tuple[str, str], ...]] = {
        "none": (),
        "wrong": (("authorization", "Bearer wrong"),),
        "no bearer": (("authorization", TOKENS["admin"]),),
        "two": (("authorization", f"Bearer {TOKENS['admin']}"), ("authorization", f"Bearer {TOKENS['read']}")),
        **{scope: (("authorization", f"Bearer {token}"),) for scope, token in TOKENS.items()},
    }
    wrong = []
    with grpc.insecure_channel(served.target) as channel:
        for name, method in METHODS.items():
            for kind, metadata in kinds.items():
                scope, code = SCOPE_OF[name], answer(channel, method, metadata)
                if scope == "" or kind in (scope, "admin") or (scope == "any" and kind in SCOPES):
                    right = code not in REFUSED
                else:
                    right = code is REFUSED[kind in SCOPES]
                if not right or code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.DEADLINE_EXCEEDED):
                    wrong.append((name, kind, code))
    assert not wrong


def test_the_request_of_a_call_without_a_chance_is_not_read(served: ServedDatabase) -> None:
    """It may be large: it is not even waited for."""
    released = Event()

    def nothing() -> Iterator[bytes]:
        released.wait(within(20))
        yield from ()

    wrong = (("authorization", "Bearer wrong"),)
    too_little = (("authorization", f"Bearer {TOKENS['read']}"),)
    with grpc.insecure_channel(served.target) as channel:
        for name, method in METHODS.items():
            if SCOPE_OF[name] in ("", "read", "any"):
                continue
            path = f"/{method.containing_service.full_name}/{method.name}"
            for metadata, code in (((), REFUSED[0]), (wrong, REFUSED[0]), (too_little, REFUSED[1])):
                with pytest.raises(grpc.RpcError) as caught:
                    channel.stream_unary(path)(nothing(), timeout=within(20), metadata=metadata)
                error: Any = caught.value
                assert error.code() is code, name
    released.set()


def test_the_errors_say_what_to_do(served: ServedDatabase) -> None:
    with BridgedState(served.target) as state, pytest.raises(UnauthenticatedError) as none:
        state.initialize_session("s")
    assert str(none.value) == (
        "not authenticated: the call has no token, and this server demands one; connect(url, token=...), or set "
        "DSPEX_PERSIST_TOKEN, to a token of the server's token file"
    )
    with BridgedState(served.target, token="wrong") as state, pytest.raises(UnauthenticatedError, match="was revoked"):
        state.get_value("s", "x")
    with BridgedState(served.target, token=TOKENS["read"]) as state, pytest.raises(PermissionDeniedError) as denied:
        state.initialize_session("s")
    assert (denied.value.identity, denied.value.operation, denied.value.scope) == (
        "the-read",
        "InitializeSession",
        "write",
    )
    assert not denied.value.retryable
    with grpc.insecure_channel(served.target) as channel:
        call: Any = channel.unary_unary("/snakepit.bridge.BridgeService/Ping")
        with pytest.raises(grpc.RpcError) as raw:
            call(b"")
    error: Any = raw.value
    assert "send the header `authorization: Bearer TOKEN`" in error.details()


def test_the_history_names_the_owner_of_the_token(served: ServedDatabase) -> None:
    with BridgedState(served.target, token=TOKENS["admin"]) as state:
        state.initialize_session("named")
        state.register_variable("named", "x", "integer", 0)
        state.set_variable("named", "x", 1, actor="user:ada")
        state.set_variable("named", "x", 2, actor="the-admin")
        with state.audit() as audit:
            actors = [each.actor for each in audit.iterate(HistoryQuery(session="named"))]
    assert actors == ["the-admin", "the-admin for user:ada", "the-admin"]


def test_all_of_a_client_sends_the_token(
    served: ServedDatabase, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DSPEX_PERSIST_TOKEN", TOKENS["admin"])
    with Context("all", served.url) as ctx:
        ctx["x"] = 1
        with ctx.watch("x") as changes, ctx.transaction() as transaction:
            transaction["x"] = 2
        assert changes is not None
        assert ctx["x"] == 2
    with dspex_persist.open_audit(served.url) as audit:
        assert audit.head() > 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = (sys.executable, "-m", "dspex_persist", "get", "all", "x", "--target", served.target)
    got = subprocess.run(command, capture_output=True, text=True, timeout=within(60), check=False, env=environment)
    assert (got.stdout, got.stderr, got.returncode) == ("2\n", "", 0)
    environment["DSPEX_PERSIST_TOKEN"] = "wrong"
    got = subprocess.run(command, capture_output=True, text=True, timeout=within(60), check=False, env=environment)
    assert "set DSPEX_PERSIST_TOKEN to a token of the server's token file" in got.stderr
    assert got.returncode == 1


def test_a_revoked_token_is_refused_at_once(served: ServedDatabase, tokens: Path) -> None:
    before = tokens.read_text()
    with BridgedState(served.target, token="extra") as state:
        tokens.write_text(before + line("extra", "write", "extra"))
        state.initialize_session("revoked")
        tokens.write_text(before)
        with pytest.raises(UnauthenticatedError):
            state.initialize_session("revoked")


@pytest.mark.parametrize("wrong", ["", " ", "a\nb", "é", 5])
def test_what_cannot_be_a_token(wrong: Any) -> None:
    with pytest.raises(InvalidArgumentError, match="printable ASCII"):
        BridgedState("127.0.0.1:1", token=wrong)


def test_a_token_never_crosses_a_network_unencrypted_and_is_never_shown() -> None:
    for url in ("grpc://state.example.org:1", "grpc://192.0.2.1:1"):
        with pytest.raises(InvalidArgumentError, match="everybody on the way") as raised:
            dspex_persist.connect(url, token="secret-token")
        assert "secret-token" not in str(raised.value)
    with BridgedState("grpcs://192.0.2.1:1", token="secret-token") as state:
        assert "secret-token" not in repr(vars(state)["_peer"])


def test_a_server_refuses_a_wrong_token_file(tmp_path: Path) -> None:
    bad = tmp_path / "tokens"
    bad.touch(0o644)
    given: dict[str, Any] = {"db": tmp_path / "a.db", "token_file": bad}
    with pytest.raises(SettingsError, match="chmod 600") as raised:
        serve(Settings(**given))
    assert raised.value.setting == "token_file"
    assert [each.name for each in tmp_path.iterdir()] == ["tokens"]


def test_a_server_refuses_a_wrong_list_of_addresses(tmp_path: Path) -> None:
    given: dict[str, Any] = {"db": tmp_path / "a.db", "tool_addresses": ("10.1.0.0/16", "a:b")}
    with pytest.raises(SettingsError, match="'a:b' is invalid: expected HOST:PORT") as raised:
        serve(Settings(**given))
    assert raised.value.setting == "tool_addresses"


def test_refused_calls_are_in_the_audit_without_tokens(served: ServedDatabase) -> None:
    with BridgedState(served.target, token="a-wrong-token") as state, pytest.raises(UnauthenticatedError):
        state.get_value("s", "x")
    with BridgedState(served.target, token=TOKENS["write"]) as state, state.audit() as audit:
        with pytest.raises(PermissionDeniedError):
            state.get_value("s", "x")
        with pytest.raises(PermissionDeniedError):
            audit.denials()
    with BridgedState(served.target, token=TOKENS["admin"]) as state, state.audit() as audit:
        # Of two minutes, perhaps.
        listed, *_ = audit.denials(DenialQuery(identity="the-write", rpc="ListDenials"))
        denials = audit.denials(DenialQuery(rpc="GetVariable"))
        (newest,) = audit.denials(DenialQuery(limit=1))
        assert newest.last_at >= listed.last_at
    assert (listed.missing, listed.peer, listed.session_id) == ("scope admin", "ipv4:127.0.0.1", "")
    assert {(each.identity, each.missing) for each in denials} >= {
        ("", "the token is not valid here: it is wrong, or was revoked"),
        ("the-write", "scope read"),
    }
    assert all(token.encode() not in file.read_bytes() for token in TOKENS.values() for file in files_of(served))


@pytest.mark.parametrize(
    ("peer", "host"),
    [
        ("ipv4:10.0.0.7:40312", "ipv4:10.0.0.7"),
        ("ipv6:%5B::1%5D:40312", "ipv6:[::1]"),
        ("ipv6:%5Bfe80::1%25eth0%5D:40312", "ipv6:[fe80::1%eth0]"),
        ("unix:", "unix"),
        ("unix:/run/a.sock", "unix"),
    ],
)
def test_a_host_is_written_as_people_write_it(peer: str, host: str) -> None:
    assert host_of(Mock(peer=lambda: peer)) == host


def files_of(served: ServedDatabase) -> list[Path]:
    return [Path(f"{served.path}{suffix}") for suffix in ("", "-wal")]


def test_without_a_descriptor_to_ask_with_nobody_is_taken_for_another_user(monkeypatch: pytest.MonkeyPatch) -> None:
    noted = list[object]()
    users = SameUser("127.0.0.1", SimpleNamespace(note=lambda *what: noted.append(what)))
    users.serves(50051)

    def fail(*_: object) -> bool:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(PeerUsers, "are_we", fail)
    with pytest.raises(UnavailableError, match="whose the call is: Too many open files"):
        users.admit("Ping", SimpleNamespace(peer=lambda: "ipv4:127.0.0.1:1"))
    assert noted == []
