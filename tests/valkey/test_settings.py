"""Stores whose settings lose what was acknowledged are refused, when a server begins and later."""

from pathlib import Path
from typing import Any

import pytest
import redis

from dspex_persist.state.errors import NotADatabaseError, StorageError, UnavailableError
from dspex_persist.state.valkey.durability import StoreSettings
from dspex_persist.state.valkey.valkey_state import ValkeyState
from tests.engines import Valkey, wait_until
from tests.valkey.conftest import Open
from tests.valkey.proxy import Proxy


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("appendfsync", "everysec", "appendfsync is everysec, so that a power cut"),
        ("appendfsync", "no", "appendfsync is no"),
        ("no-appendfsync-on-rewrite", "yes", "no-appendfsync-on-rewrite is yes"),
        ("maxmemory-policy", "allkeys-lru", "maxmemory-policy is allkeys-lru"),
        ("appendonly", "no", "appendonly is no"),
    ],
)
def test_settings_that_lose_what_was_acknowledged_are_refused(
    open_own: Open, own_client: redis.Redis, name: str, value: str, reason: str
) -> None:
    own_client.config_set(name, value)
    with pytest.raises(NotADatabaseError, match=reason):
        open_own()


def test_with_the_durability_normal_a_power_cut_may_lose_the_last_second(
    open_own: Open, own_client: redis.Redis
) -> None:
    own_client.config_set("appendfsync", "everysec")
    server = open_own(durability="normal")
    server.initialize_session("s")
    own_client.config_set("appendfsync", "no")
    with pytest.raises(NotADatabaseError, match="set it to everysec or always"):
        open_own(durability="normal")


def test_a_setting_that_changes_meanwhile_stops_the_writes(open_own: Open, own_client: redis.Redis) -> None:
    server, other = open_own(lease_s=0.2), open_own()
    server.initialize_session("s")
    other.initialize_session("not in memory")
    own_client.config_set("appendfsync", "everysec")
    wait_until(lambda: server._store._refusal is not None)
    with pytest.raises(StorageError, match=r"^nothing was written: \S+: appendfsync is everysec"):
        server.initialize_session("t")
    for session in ("s", "not in memory"):
        assert len(server.list_variables(session)) == 0
    own_client.config_set("appendfsync", "always")
    wait_until(lambda: server._store._refusal is None)
    server.initialize_session("t")


def test_a_replica_is_refused(own_valkey: Valkey, open_own: Open, own_client: redis.Redis) -> None:
    own_client.replicaof("127.0.0.1", 1)
    with pytest.raises(NotADatabaseError, match=r"it is a replica of 127\.0\.0\.1:1"):
        open_own()


class Told:
    """A store that tells of itself what a test says."""

    def __init__(self, config: Any = None, **facts: Any) -> None:
        self._facts = {"redis_version": "7.2.4", "role": "master", "aof_enabled": 1, **facts}
        self._config = config

    def info(self) -> dict[str, Any]:
        return self._facts

    def config_get(self, *names: str) -> Any:
        if self._config is None:
            raise redis.ResponseError("unknown command 'CONFIG'")
        return self._config


def test_old_servers_and_clusters_are_refused() -> None:
    settings = StoreSettings("redis://h")
    with pytest.raises(NotADatabaseError, match=r"Redis 6\.2\.14"):
        settings.check(Told(redis_version="6.2.14"))
    with pytest.raises(NotADatabaseError, match="part of a cluster"):
        settings.check(Told(cluster_enabled=1))


def test_a_store_that_does_not_tell_its_settings_is_waited_for_or_refused() -> None:
    assert StoreSettings("redis://h").check(Told()) is True
    assert StoreSettings("redis://h", "normal").check(Told()) is False
    with pytest.raises(NotADatabaseError, match="assume=durable"):
        StoreSettings("redis://h").check(Told(redis_version="7.0.15"))
    assert StoreSettings("redis://h", assumes_durable=True).check(Told(redis_version="7.0.15")) is False


@pytest.fixture
def waits_for_disk(own_client: redis.Redis) -> None:
    """A store that can be asked to have everything on disk: Redis from 7.2 on, and Valkey."""
    facts: Any = own_client.info()
    if tuple(map(int, facts["redis_version"].split(".")[:2])) < (7, 2):
        pytest.skip("it has no WAITAOF")


@pytest.mark.usefixtures("waits_for_disk")
def test_each_append_waits_for_the_disk_if_nobody_may_ask_for_the_settings(
    own_valkey: Valkey, open_own: Open, own_client: redis.Redis
) -> None:
    own_client.execute_command("ACL", "SETUSER", "default", "-config")
    server = open_own()
    assert server._store._waits_for_disk
    server.initialize_session("s")
    own_valkey.restart()
    assert len(server.list_variables("s")) == 0


@pytest.mark.usefixtures("waits_for_disk")
def test_a_commit_whose_answer_was_lost_is_on_disk_before_it_is_acknowledged(
    own_valkey: Valkey, open_own: Open, own_client: redis.Redis, tmp_path: Path
) -> None:
    own_client.execute_command("ACL", "SETUSER", "default", "-config")
    proxy = Proxy(own_valkey.url().removeprefix("unix://"), tmp_path / "s")
    server = open_own(proxy.url)
    server.initialize_session("s")
    proxy.lose("after")
    server.register_variable("s", "x", "integer", 1)
    assert proxy.happened.is_set()
    own_valkey.restart()
    assert server.get_variable("s", "x").version == 0
    server.close()
    proxy.close()


def test_a_user_with_few_rights_is_enough(own_valkey: Valkey, own_client: redis.Redis) -> None:
    rights = ["+@all", "-@dangerous", "+info", "+config|get", "~{few}:*", "&{few}:*"]
    own_client.execute_command("ACL", "SETUSER", "ada", "on", ">s3cret", *rights)
    url = own_valkey.url().replace("unix://", "redis+unix://ada:s3cret@")
    with ValkeyState(f"{url}?prefix=few") as server, ValkeyState(f"{url}?prefix=few") as other:
        assert "s3cret" not in server.url
        server.initialize_session("s")
        server.register_variable("s", "x", "integer", 1)
        assert other.set_variable("s", "x", 2) == 1
        server.cleanup_session("s")
    with pytest.raises(UnavailableError, match=r"NOPERM|permission"):
        ValkeyState(f"{url}?prefix=other")


# Memory that is full


def test_a_full_memory_refuses_writes_and_nothing_else(open_own: Open, own_client: redis.Redis) -> None:
    server = open_own()
    server.initialize_session("s")
    server.register_variable("s", "x", "integer", 1)
    own_client.config_set("maxmemory", 1)
    with pytest.raises(StorageError, match="maxmemory"):
        server.set_variable("s", "x", 2)
    assert server.get_variable("s", "x").value.json == "1"
    server._store.renew()
    assert [version.version for version in server.get_variable_history("s", "x")] == [0]
    own_client.config_set("maxmemory", 0)
    assert server.set_variable("s", "x", 2) == 1
