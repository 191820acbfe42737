"""Whether the settings of a store let it keep what it has acknowledged."""

from collections.abc import Mapping
from typing import Any, Final, Literal, TypeAlias

import redis

from dspex_persist.infra.logs import get_logger
from dspex_persist.state.errors import NotADatabaseError

Durability: TypeAlias = Literal["full", "normal"]
_OLDEST: Final = (7, 0)
_WITH_WAITAOF: Final = (7, 2)
_ASKED: Final = ("appendfsync", "no-appendfsync-on-rewrite")
_logger: Final = get_logger(__name__)


class StoreSettings:
    """The settings that our promises depend on.

    Args:
        name: How errors name the store.
        durability: "full" if each commit has to be on disk before it is acknowledged; with "normal", a power cut may
            lose the last ones.
        assumes_durable: Whether the operator says that it is durable, so that nobody has to ask.
    """

    def __init__(self, name: str, durability: Durability = "full", *, assumes_durable: bool = False) -> None:
        self._name = name
        self._durability = durability
        self._assumes = assumes_durable

    def check(self, client: Any) -> bool:
        """Look at the settings.

        Returns:
            Whether each append has to wait until it is on disk, because nobody may ask whether the store does so.

        Raises:
            redis.RedisError: It cannot be asked.
            NotADatabaseError: It may lose what it has acknowledged, or does not take writes.
        """
        facts: Mapping[str, Any] = client.info()
        version = tuple(int(part) for part in str(facts.get("redis_version", "0.0")).split(".")[:2])
        self._refuse(
            {
                f"it is Redis {facts.get('redis_version')}; Redis 7.0 or Valkey is needed": version < _OLDEST,
                f"it is a replica of {facts.get('master_host')}:{facts.get('master_port')}, which takes no writes: "
                "name the primary": facts.get("role") not in ("master", None),
                "it is a part of a cluster: name a server that is not": bool(int(facts.get("cluster_enabled") or 0)),
                f"its maxmemory-policy is {facts.get('maxmemory_policy')}, so that it would delete what it is to keep: "
                "set it to noeviction": facts.get("maxmemory_policy", "noeviction") != "noeviction",
            }
        )
        if self._assumes:
            return False
        has_file = bool(int(facts.get("aof_enabled") or 0))
        self._refuse({"appendonly is no, so that it forgets everything when it ends: set it to yes": not has_file})
        try:
            settings = client.config_get(*_ASKED)
        except redis.ResponseError as error:
            return self._unknown(version, error)
        self._refuse_settings(**{name.replace("-", "_"): value for name, value in _texts(settings).items()})
        return False

    def _refuse_settings(self, appendfsync: str = "", no_appendfsync_on_rewrite: str = "no", **_: str) -> None:
        is_full = self._durability == "full"
        self._refuse(
            {
                f"appendfsync is {appendfsync}, so that a power cut may lose what was acknowledged: set it to always, "
                "or choose the durability normal": is_full and appendfsync != "always",
                "appendfsync is no: set it to everysec or always": appendfsync == "no",
                "no-appendfsync-on-rewrite is yes, so that a power cut may lose what was acknowledged: set it to no, "
                "or choose the durability normal": is_full and no_appendfsync_on_rewrite == "yes",
            }
        )

    def _unknown(self, version: tuple[int, ...], error: redis.ResponseError) -> bool:
        """Return what `check` does if the store does not tell its settings."""
        if self._durability == "normal":
            return False
        self._refuse(
            {
                f"it does not tell its appendfsync ({error}): allow CONFIG GET, or add assume=durable to the address "
                "if it is always": version < _WITH_WAITAOF
            }
        )
        _logger.info("each append waits for the disk", reason=f"the store does not tell its appendfsync: {error}")
        return True

    def _refuse(self, faults: Mapping[str, bool]) -> None:
        for reason, is_so in faults.items():
            if is_so:
                raise NotADatabaseError(self._name, reason)


def _texts(settings: Mapping[Any, Any]) -> dict[str, str]:
    return {_text(name): _text(value) for name, value in settings.items()}


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
