"""The variables of a session as a mapping that behaves like a dict."""

from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, MutableMapping, ValuesView
from typing import Any, NoReturn, Protocol, Self, cast

from dspex_persist.errors import DspexError
from dspex_persist.state.errors import InvalidArgumentError, VariableNotFoundError


class Holds(Protocol):
    """What has the variables: a context, for example."""

    def __getitem__(self, name: str) -> Any: ...
    def __setitem__(self, name: str, value: object) -> None: ...
    def __delitem__(self, name: str) -> None: ...
    def __contains__(self, name: object) -> bool: ...
    def __iter__(self) -> Iterator[str]: ...
    def __len__(self) -> int: ...

    @property
    def get_many(self) -> Callable[[], dict[str, Any]]: ...

    @property
    def _write_many(self) -> Callable[[Mapping[str, object]], object]: ...


class Attributes:
    """A session's variables as attributes: `ctx.v.temperature`. Names that are no identifiers need `[]`."""

    __slots__ = ("_owner",)

    def __init__(self, owner: Holds) -> None:
        object.__setattr__(self, "_owner", owner)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            # Python and notebooks look for many of these, which are no variables.
            raise AttributeError(name)
        try:
            return self._owner[name]
        except VariableNotFoundError as error:
            raise AttributeError(str(error)) from None

    def __setattr__(self, name: str, value: object) -> None:
        if name.startswith("_"):
            raise AttributeError(f"{name!r} begins with an underscore: write it with ctx[{name!r}] = ...")
        self._owner[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del self._owner[name]
        except VariableNotFoundError as error:
            raise AttributeError(str(error)) from None

    def __reduce__(self) -> NoReturn:
        raise TypeError("the attributes of ctx.v cannot be copied or pickled: ctx.variables.copy() returns a dict")

    def __dir__(self) -> list[str]:
        try:
            return [name for name in self._owner if name.isidentifier()]
        except DspexError:
            # Completion asks at any time.
            return []

    def __repr__(self) -> str:
        try:
            return f"<variables {', '.join(self._owner)}>"
        except DspexError:
            return f"<variables of {self._owner!r}>"


class VariableMapping(MutableMapping[str, Any]):
    """A session's variables as a dict: the names in the order in which they were defined, and their values.

    What concerns several variables uses one consistent read, or one commit. Iteration goes over the names as they were
    when it began, so others may write meanwhile.
    """

    __slots__ = ("_owner",)
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, owner: Holds) -> None:
        self._owner = owner

    def _is_of(self, owner: object) -> bool:
        """Whether these are the variables of a context."""
        return self._owner is owner

    def __getitem__(self, name: str) -> Any:
        return self._owner[name]

    def __setitem__(self, name: str, value: object) -> None:
        self._owner[name] = value

    def __delitem__(self, name: str) -> None:
        del self._owner[name]

    def __contains__(self, name: object) -> bool:
        return name in self._owner

    def __iter__(self) -> Iterator[str]:
        return iter(self._owner)

    def __len__(self) -> int:
        return len(self._owner)

    def get(self, name: object, default: Any = None) -> Any:
        """Return the value, or `default` if there is no such variable."""
        try:
            return self._owner[name] if isinstance(name, str) else default
        except VariableNotFoundError:
            return default

    def pop(self, name: object, *default: Any) -> Any:
        """Delete a variable and return its value; the default if there is no such variable, or else raise."""
        if default and not isinstance(name, str):
            return default[0]
        return super().pop(cast(str, name), *default)

    def popitem(self) -> tuple[str, Any]:
        """Delete the variable that was defined last, and return its name and value."""
        everything = self.copy()
        if not everything:
            raise KeyError("popitem(): there are no variables")
        name = next(reversed(everything))
        return name, self.pop(name)

    def clear(self) -> None:
        """Delete all variables."""
        for name in self:
            self.pop(name, None)

    def copy(self) -> dict[str, Any]:
        """Return names and values as a dict."""
        return self._owner.get_many()

    def keys(self) -> KeysView[str]:
        """Return the names, as of one moment."""
        return dict.fromkeys(self._owner).keys()

    def items(self) -> ItemsView[str, Any]:
        """Return names and values, as of one moment."""
        return self.copy().items()

    def values(self) -> ValuesView[Any]:
        """Return the values, as of one moment."""
        return self.copy().values()

    def update(self, changes: Any = (), /, **more: Any) -> None:
        """Write several values, all or none; names that are not defined are defined, unless the context is strict."""
        try:
            merged = dict(changes, **more)
        except (TypeError, ValueError):
            kind = "None" if changes is None else type(changes).__name__
            raise InvalidArgumentError("changes", f"it must be a mapping, such as a dict, not {kind}") from None
        self._owner._write_many(merged)

    def __eq__(self, other: object) -> bool:
        return self.copy() == dict(other) if isinstance(other, Mapping) else NotImplemented

    def __or__(self, other: object) -> dict[str, Any]:
        return self.copy() | dict(other) if isinstance(other, Mapping) else NotImplemented

    def __ror__(self, other: object) -> dict[str, Any]:
        return dict(other) | self.copy() if isinstance(other, Mapping) else NotImplemented

    def __ior__(self, other: Any) -> Self:  # type: ignore[misc]
        self.update(other)
        return self

    def __reversed__(self) -> Iterator[str]:
        return reversed(list(self))

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy is a dict, as that of `copy`, and so is what arrives in another process.
        return dict, (self.copy(),)

    def __repr__(self) -> str:
        try:
            return repr(self.copy())
        except DspexError:
            # A debugger shows it at any time, also when the context is closed.
            return f"<variables of {self._owner!r}>"
