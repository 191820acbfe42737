"""A store that was put back to an older copy, or lost commits, is noticed."""

import errno
import uuid
from pathlib import Path
from typing import Any

import pytest
import redis

from dspex_persist.addresses import canonical
from dspex_persist.state.anchor import SIZE, Anchor, Head, parse
from dspex_persist.state.errors import LostCommitsError, NotADatabaseError, StateError
from dspex_persist.state.model import Value
from dspex_persist.state.shared.server_anchor import ServerAnchor
from dspex_persist.state.valkey.valkey_state import ValkeyState
from tests.engines import wait_until
from tests.valkey.conftest import Open


def copy_of(client: redis.Redis, prefix: str) -> dict[bytes, bytes]:
    kept: Any = client
    names = [key for key in kept.scan_iter("{" + prefix + "}*") if not key.endswith((b":servers", b":leases"))]
    return {key: kept.dump(key) for key in names}


def put_back(client: redis.Redis, prefix: str, copy: dict[bytes, bytes]) -> None:
    # At once: a server that looks in between would find another database.
    with client.pipeline(transaction=True) as pipeline:
        for key in copy_of(client, prefix):
            pipeline.delete(key)
        for key, content in copy.items():
            pipeline.restore(key, 0, content)
        pipeline.execute()


def test_a_server_notices_that_its_store_was_put_back(
    open_server: Open, client: redis.Redis, valkey_prefix: str
) -> None:
    ended: list[BaseException] = []
    server = open_server(on_fatal=ended.append)
    server.initialize_session("s")
    before = copy_of(client, valkey_prefix)
    server.register_variable("s", "x", "integer", 0)
    put_back(client, valkey_prefix, before)
    with pytest.raises(StateError):
        server.register_variable("s", "y", "integer", 0)
    wait_until(lambda: bool(ended))
    assert "it ends at commit 1; commit 2 is gone" in str(ended[0])
    with pytest.raises(LostCommitsError):
        server.get_session("s")


def test_a_server_notices_that_another_one_has_written_on(
    open_server: Open, client: redis.Redis, valkey_prefix: str
) -> None:
    ended: list[BaseException] = []
    server = open_server(on_fatal=ended.append)
    server.initialize_session("s")
    before = copy_of(client, valkey_prefix)
    server.register_variable("s", "x", "integer", 0)
    put_back(client, valkey_prefix, before)
    other = open_server()
    for name in "abc":
        other.register_variable("s", name, "integer", 0)
    # It may have heard of them before.
    with pytest.raises(StateError):
        server.set_variable("s", "x", 1)
    wait_until(lambda: bool(ended))
    assert isinstance(ended[0], LostCommitsError)
    assert "commit 2 is not the one that this server has seen" in str(ended[0])


def test_a_server_notices_that_everything_is_gone(open_server: Open, client: redis.Redis, valkey_prefix: str) -> None:
    server = open_server()
    server.initialize_session("s")
    put_back(client, valkey_prefix, {})
    with pytest.raises(LostCommitsError, match="another database"):
        server._store.news()


# Found at a start


Copy = dict[bytes, bytes]


@pytest.fixture
def anchors(tmp_path: Path) -> Path:
    return tmp_path / "state" / "anchors"


@pytest.fixture
def older(open_server: Open, client: redis.Redis, valkey_prefix: str, anchors: Path) -> Copy:
    """A copy that lacks the last two commits, 3 and 4, of a store that a server with an anchor has left."""
    with open_server(anchor_dir=anchors) as server:
        server.initialize_session("s")
        server.register_variable("s", "x", "integer", 0)
        older = copy_of(client, valkey_prefix)
        server.set_variable("s", "x", 1)
        server.set_variable("s", "x", 2)
    return older


def write(server: ValkeyState, times: int) -> None:
    for number in range(times):
        server.set_variable("s", "x", number)


def test_an_older_copy_is_refused(
    open_server: Open, client: redis.Redis, valkey_prefix: str, anchors: Path, older: Copy
) -> None:
    (anchor,) = anchors.iterdir()
    assert anchor.stat().st_mode & 0o777 == 0o600
    with open_server(anchor_dir=anchors) as server:
        assert server.get_variable("s", "x").value == Value("2")
    put_back(client, valkey_prefix, older)
    with pytest.raises(LostCommitsError, match=r"ends at commit 2; commits 3 to 4 are gone.*delete their anchors"):
        open_server(anchor_dir=anchors)
    with open_server() as unknowing:
        write(unknowing, 3)
    with pytest.raises(LostCommitsError, match="commit 4 is not the one that this server has seen"):
        open_server(anchor_dir=anchors)
    anchor.unlink()
    open_server(anchor_dir=anchors)


def test_another_database_at_the_same_address_is_refused(
    open_server: Open, client: redis.Redis, valkey_prefix: str, anchors: Path, older: Copy
) -> None:
    newest = copy_of(client, valkey_prefix)
    put_back(client, valkey_prefix, {})
    for _ in range(2):
        with pytest.raises(LostCommitsError, match="it is another database than before"):
            open_server(anchor_dir=anchors)
    with open_server() as unknowing:
        unknowing.initialize_session("t")
    with pytest.raises(LostCommitsError, match="it is another database than before"):
        open_server(anchor_dir=anchors)
    assert len(list(anchors.iterdir())) == 1
    put_back(client, valkey_prefix, newest)
    with open_server(anchor_dir=anchors) as server:
        assert server.get_variable("s", "x").value == Value("2")


def test_an_anchor_has_what_others_have_committed(
    open_server: Open, client: redis.Redis, valkey_prefix: str, anchors: Path, older: Copy
) -> None:
    with open_server(anchor_dir=anchors) as server, open_server() as other:
        write(other, 2)
        assert server.get_variable("s", "x").version == 4
    put_back(client, valkey_prefix, older)
    with pytest.raises(LostCommitsError, match="commits 3 to 6 are gone"):
        open_server(anchor_dir=anchors)


def test_commits_stand_while_an_anchor_cannot_be_written(
    open_server: Open, anchors: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write(_: Anchor, head: Head) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with open_server(anchor_dir=anchors) as server, open_server() as other:
        with monkeypatch.context() as broken:
            broken.setattr(Anchor, "write", write)
            server.initialize_session("s")
            server.register_variable("s", "x", "integer", 0)
            other.set_variable("s", "x", 1)
            assert server.get_variable("s", "x").value == Value("1")
        (anchor,) = anchors.iterdir()
        assert parse(anchor.read_bytes()[:SIZE]) is None
        server.set_variable("s", "x", 2)
        known = parse(anchor.read_bytes()[:SIZE])
        assert known is not None
        assert known.sequence == 4
    told = [record.getMessage() for record in caplog.records if "the anchor is" in record.getMessage()]
    assert len(told) == 2
    assert "not written" in told[0]
    assert "Input/output error" in told[0]


def test_an_address_may_be_written_in_several_ways(tmp_path: Path) -> None:
    head, other = Head(3, bytes(32)), uuid.uuid4().hex
    first = ServerAnchor(
        tmp_path, "one", "redis://h", address=canonical("redis://h"), last=3, has_commit=lambda _: True
    )
    first.write(head)
    first.close()
    url = "valkey://me:secret@H:6379/0"
    with pytest.raises(LostCommitsError, match="it is another database than before"):
        ServerAnchor(tmp_path, other, url, address=canonical(url), last=0, has_commit=lambda _: True)


def test_a_running_server_with_an_anchor_ends(
    open_server: Open, client: redis.Redis, valkey_prefix: str, anchors: Path, older: Copy
) -> None:
    ended: list[BaseException] = []
    server = open_server(anchor_dir=anchors, on_fatal=ended.append)
    put_back(client, valkey_prefix, older)
    with pytest.raises(StateError):
        server.set_variable("s", "x", 3)
    wait_until(lambda: bool(ended))
    assert "commits 3 to 4 are gone" in str(ended[0])
    assert "delete their anchors" in str(ended[0])
    server.close()
    # It has not taken the older copy for what it knows.
    with pytest.raises(LostCommitsError, match="commits 3 to 4 are gone"):
        open_server(anchor_dir=anchors)


def test_databases_share_a_directory(own_valkey: Any, anchors: Path, older: Copy) -> None:
    url = own_valkey.url().replace("unix://", "redis+unix://")
    for prefix in ("one", "other"):
        for _ in range(2):
            with ValkeyState(f"{url}?prefix={prefix}", anchor_dir=anchors) as server:
                server.initialize_session(f"s{server.head_sequence}")
    assert len(list(anchors.iterdir())) == 3


def test_an_anchor_that_cannot_be_made(open_server: Open, anchors: Path) -> None:
    anchors.parent.mkdir()
    anchors.write_text("")
    with pytest.raises(NotADatabaseError, match=f"its anchor cannot be kept in {anchors}: File exists"):
        open_server(anchor_dir=anchors)


def test_an_id_that_names_no_file(
    open_server: Open, client: redis.Redis, valkey_prefix: str, anchors: Path, older: Copy
) -> None:
    client.hset("{" + valkey_prefix + "}:head", "database_id", "../../elsewhere")
    with pytest.raises(NotADatabaseError, match="its id is not one that dspex-persist gives"):
        open_server(anchor_dir=anchors)
