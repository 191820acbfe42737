"""Handles: one variable with the type that a program expects of its values."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Final, Generic, NoReturn, Protocol, Self, TypeVar

from dspex_persist.cognitive import typed
from dspex_persist.cognitive.changes import Change, Choice, Pace, read_value
from dspex_persist.cognitive.describing import History
from dspex_persist.cognitive.records import VariableInfo
from dspex_persist.cognitive.steps import BoundVerb, Runs, Step, Steps, verb
from dspex_persist.cognitive.watching import Changes, Watchers
from dspex_persist.spelling import shorten
from dspex_persist.state import arguments
from dspex_persist.state.errors import InvalidArgumentError, InvalidValueError

T = TypeVar("T")

_NO_TYPES: Final = (bool, bytes, complex, dict, float, int, list, set, str, tuple)
"""Classes whose instances are often given instead of a type."""
_PLAIN: Final = frozenset[type]({bool, int, float, str, list, dict})


class Owner(Runs, Protocol):
    """What a handle needs of its context."""

    @property
    def get(self) -> BoundVerb[..., Any]: ...
    @property
    def set(self) -> BoundVerb[..., int]: ...
    @property
    def update(self) -> BoundVerb[..., Any]: ...
    @property
    def delete(self) -> BoundVerb[..., None]: ...
    @property
    def info(self) -> BoundVerb[..., VariableInfo]: ...
    @property
    def history(self) -> BoundVerb[..., History]: ...
    @property
    def rollback(self) -> BoundVerb[..., Any]: ...
    @property
    def _watchers(self) -> Watchers: ...
    @property
    def session_id(self) -> str: ...


class Variable(Runs, Generic[T]):
    """A variable of a session whose values are of a known type: `ctx.handle("temperature", float)`.

    Making one asks nothing: the variable may be defined later. Its verbs are those of the context, without the name.

    Attributes:
        name: The name of the variable.
        kind: The type of its values.
    """

    def __init__(self, owner: Owner, name: str, kind: type[T]) -> None:
        if isinstance(kind, _NO_TYPES):
            raise _no_kind(kind)
        self._owner = owner
        self.name = name
        self.kind = kind

    def _run_step(self, step: Step) -> Any:
        """See `Runs`."""
        return self._owner._run_step(step)

    async def _run_step_aio(self, step: Step) -> Any:
        """See `Runs`."""
        return await self._owner._run_step_aio(step)

    @property
    def value(self) -> T:
        """The value. Assigning writes it.

        Raises:
            VariableNotFoundError: There is no such variable.
            InvalidValueError: The value is not of the type of the handle.
        """
        return self.get()

    @value.setter
    def value(self, value: T) -> None:
        self.set(value)

    @verb
    def get(self) -> Steps[T]:
        """Return the value; raises as `value` does."""
        info: VariableInfo = yield from self._owner.info._steps(self.name)
        kind = self.kind if typed.is_model(self.kind) else None
        if kind is not None or info.name in typed.names:
            return self._read((yield from typed.read(self._owner, info.record, kind=kind)))
        return self._read(info.value)

    @verb
    def set(
        self,
        value: T,
        *,
        create: bool = False,
        expected_version: int | None = None,
        reason: str | None = None,
        actor: str | None = None,
    ) -> Steps[int]:
        """Write a value, and return the new version; see `Context.set`."""
        written = self._written(value)
        return (
            yield from self._owner.set._steps(
                self.name,
                written,
                create=create,
                expected_version=expected_version,
                reason=reason,
                actor=actor,
            )
        )

    @verb
    def update(
        self,
        function: Callable[[T], T],
        *,
        retries: int = 100,
        reason: str | None = None,
        actor: str | None = None,
    ) -> Steps[T]:
        """Write what a function makes of the value, atomically, and return the new one; see `Context.update`."""

        def change(value: Any) -> Any:
            return self._written(function(self._read(value)))

        if typed.is_model(self.kind):
            # The value may be of an older version of the model.
            yield from self.get._steps()
        value = yield from self._owner.update._steps(self.name, change, retries=retries, reason=reason, actor=actor)
        return self._read(value)

    @verb
    def delete(self, *, reason: str | None = None, actor: str | None = None) -> Steps[None]:
        """Delete the variable. Its history is kept."""
        yield from self._owner.delete._steps(self.name, reason=reason, actor=actor)

    @verb
    def info(self) -> Steps[VariableInfo]:
        """Return the variable itself: its type, version, constraints, metadata, lock."""
        return (yield from self._owner.info._steps(self.name))

    @verb
    def history(self, limit: int = 0, *, before: int | None = None) -> Steps[History]:
        """Return versions of the variable, newest first; see `Context.history`."""
        return (yield from self._owner.history._steps(self.name, limit, before=before))

    @verb
    def rollback(self, version: int, *, reason: str | None = None, actor: str | None = None) -> Steps[T]:
        """Write the value of an earlier version as a new version, and return it."""
        return self._read((yield from self._owner.rollback._steps(self.name, version, reason=reason, actor=actor)))

    def watch(
        self,
        *,
        filter: Callable[[Change[T]], object] | None = None,
        debounce_s: float | None = None,
        throttle_s: float | None = None,
        include_initial: bool = False,
        after: int | None = None,
    ) -> Changes[T]:
        """Watch the variable: iterate with `for` or `async for`; see `Context.watch`."""
        return self._owner._watchers.changes(
            Choice((self.name,)),
            filter,
            Pace(debounce_s, throttle_s),
            include_initial=arguments.flag("include_initial", include_initial),
            after=after,
            read=lambda record: self._read(read_value(self._owner.session_id, record)),
        )

    def _read(self, value: Any) -> T:
        kind: Any = self.kind
        if _is_plain(kind):
            if type(value) is kind:
                return value  # type: ignore[no-any-return]
            if kind is float and type(value) is int:
                return float(value)  # type: ignore[return-value]
            raise InvalidValueError(self.name, f"it is {_shown(value)}, and the handle expects {kind.__name__}")
        from pydantic import ValidationError

        try:
            read: T = _adapter(kind).validate_python(value)
        except ValidationError as error:
            expected = getattr(kind, "__name__", str(kind))
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            reason = f"it is not a {expected}: {f'{where}: ' if where else ''}{first['msg']}"
            raise InvalidValueError(self.name, reason) from None
        return read

    def _written(self, value: Any) -> Any:
        kind: Any = self.kind
        # A model is dumped by the verb that writes it.
        return value if _is_plain(kind) or typed.is_model(kind) else _adapter(kind).dump_python(value, mode="json")

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: object) -> Self:
        # A reference to the variable, as names are.
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a handle works only with its context, in its process: send its name, {self.name!r}, and make another one "
            "there with ctx.handle(...), or send its value"
        )

    def __repr__(self) -> str:
        return f"<Variable {self.name!r} of {getattr(self.kind, '__name__', self.kind)}>"


def _is_plain(kind: object) -> bool:
    return isinstance(kind, type) and kind in _PLAIN


def _no_kind(kind: object) -> InvalidArgumentError:
    reason = f"{_shown(kind)} is no type of values: give bool, int, float, str, list, dict, list[float], or a model"
    return InvalidArgumentError("kind", reason)


def _adapter(kind: Any) -> Any:
    # Imported here, because it takes time, and most handles are of plain types.
    from pydantic.errors import PydanticUserError

    try:
        return _cached_adapter(kind)
    except (PydanticUserError, TypeError, NameError):
        raise _no_kind(kind) from None


@lru_cache(256)
def _cached_adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _shown(value: object) -> str:
    return shorten(repr(value), 60)
