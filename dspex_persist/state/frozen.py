"""Mappings that nobody can change: what callers hand in is copied into them, and what they are handed is one."""

from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

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
