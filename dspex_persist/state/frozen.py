"""Immutable mappings. Mappings from callers are copied into these, and callers get only these."""

from collections.abc import Iterator, Mapping
from typing import Any, Final, Generic, NoReturn, Self, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class FrozenDict(dict[K, V]):
    """An immutable dict. It is a subclass of dict so that JSON, protobuf and `copy` accept it."""

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


NO_ENTRIES: Final = FrozenDict[Any, Any]()
"""An empty mapping, for defaults."""


def freeze(mapping: Mapping[K, V]) -> FrozenDict[K, V]:
    """Return an immutable copy of the mapping, or the mapping itself if it is immutable."""
    return mapping if isinstance(mapping, FrozenDict) else FrozenDict(mapping)


_SHARDS: Final = 256


class SharedMap(Generic[K, V]):
    """A large immutable mapping. A change returns a new one, which shares most of its entries with the old one."""

    __slots__ = ("_shards",)

    def __init__(self, entries: Mapping[K, V] | None = None) -> None:
        self._shards: tuple[dict[K, V], ...] = _EMPTY
        if entries:
            shards: list[dict[K, V]] = [{} for _ in range(_SHARDS)]
            for key, entry in entries.items():
                shards[hash(key) % _SHARDS][key] = entry
            self._shards = tuple(shards)

    def get(self, key: K) -> V | None:
        """Return the entry of a key, or None."""
        return self._shards[hash(key) % _SHARDS].get(key)

    def values(self) -> Iterator[V]:
        """Iterate over all entries, in no particular order."""
        for shard in self._shards:
            yield from shard.values()

    def updated(self, entries: Mapping[K, V]) -> Self:
        """Return a mapping with these entries added or replaced."""
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
