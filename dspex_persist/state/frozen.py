"""Mappings that nobody can change: what callers hand in is copied into them, and what they are handed is one."""

from collections.abc import Iterator, Mapping
from typing import Any, Final, Generic, NoReturn, Self, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class FrozenDict(dict[K, V]):
    """A dict that cannot be changed. A dict nevertheless: JSON, protobuf and `copy` take it for what it is."""

    __slots__ = ()

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("this mapping is read-only, and changing it would store nothing: change a copy, dict(...)")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __copy__(self) -> "FrozenDict[K, V]":
        return self

    def __deepcopy__(self, _: object) -> "FrozenDict[K, V]":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (dict(self),)


def freeze(mapping: Mapping[K, V]) -> FrozenDict[K, V]:
    """The mapping as it is now."""
    return mapping if isinstance(mapping, FrozenDict) else FrozenDict(mapping)


_SHARDS: Final = 256


class SharedMap(Generic[K, V]):
    """A large mapping that is never changed: a change makes another one, which shares nearly all of it."""

    __slots__ = ("_shards",)

    def __init__(self, entries: Mapping[K, V] | None = None) -> None:
        self._shards: tuple[dict[K, V], ...] = _EMPTY
        if entries:
            shards: list[dict[K, V]] = [{} for _ in range(_SHARDS)]
            for key, entry in entries.items():
                shards[hash(key) % _SHARDS][key] = entry
            self._shards = tuple(shards)

    def get(self, key: K) -> V | None:
        """The entry of a key; None if there is none."""
        return self._shards[hash(key) % _SHARDS].get(key)

    def values(self) -> Iterator[V]:
        """All entries, in no order."""
        for shard in self._shards:
            yield from shard.values()

    def updated(self, entries: Mapping[K, V]) -> Self:
        """The mapping with these entries besides, or instead of those under their keys."""
        shards, own = list(self._shards), set[int]()
        for key, entry in entries.items():
            place = hash(key) % _SHARDS
            if place not in own:
                own.add(place)
                shards[place] = shards[place].copy()
            shards[place][key] = entry
        changed = type(self)()
        changed._shards = tuple(shards)
        return changed


_EMPTY: Final[tuple[dict[Any, Any], ...]] = ({},) * _SHARDS
