"""Modules whose type a variable says: a registry of the types, and the module that follows the variable."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import dspy
from dspy.dsp.utils.settings import thread_local_overrides

from dspex_persist.cognitive.dspy import snapshots
from dspex_persist.cognitive.dspy.carrying import Carried, State, TypeChange, carry, changed_in, state_of
from dspex_persist.cognitive.dspy.entering import targets_of
from dspex_persist.cognitive.dspy.options import check
from dspex_persist.cognitive.dspy.paths import SELF, is_within, modules_in
from dspex_persist.cognitive.dspy.snapshots import Frame, Scope
from dspex_persist.cognitive.errors import BoundValueError
from dspex_persist.cognitive.joining import NOTHING
from dspex_persist.infra.logs import get_logger
from dspex_persist.spelling import closest, did_you_mean, quote
from dspex_persist.state.errors import InvalidArgumentError

OPTION: Final = "module_type"
INNER: Final = "module"
"""The attribute of a `VariableModule` that has the module of the present type."""
_DSPYS: Final = "dspy."
_TYPE: Final = "_dspex_persist_type"
"""The attribute of such a module that has the name of its type."""

_logger = get_logger(__name__)
_changing: Final = threading.RLock()


class ModuleTypes:
    """Which module types there are, by name: classes and functions of this process, which make modules."""

    def __init__(self) -> None:
        self._factories: dict[str, Callable[..., Any]] = {
            "Predict": dspy.Predict,
            "ChainOfThought": dspy.ChainOfThought,
            "ProgramOfThought": dspy.ProgramOfThought,
        }

    @property
    def names(self) -> tuple[str, ...]:
        """The names."""
        return tuple(self._factories)

    def register(self, name: str, factory: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
        """Add a type, or replace one."""
        given: object = name
        if not isinstance(given, str) or not given:
            raise InvalidArgumentError("name", f"it must be a text, not {name!r}")
        if isinstance(factory, dspy.Module) or not callable(factory):
            reason = f"it must be a class, or a function that makes a module, not a {type(factory).__name__}"
            raise InvalidArgumentError("factory", reason)
        self._factories[name] = partial(factory, **arguments) if arguments else factory

    def name_of(self, variable: str, value: object) -> str:
        """Return the type that the value of a variable names, as it was registered.

        Raises:
            BoundValueError: There is no such type.
        """
        check(OPTION, variable, value)
        name = str(value)
        for each in (name, name.removeprefix(_DSPYS)):
            if each in self._factories:
                return each
        meant = did_you_mean(closest(name.removeprefix(_DSPYS), self._factories))
        listed = f"there is no {quote(name)}; known are {', '.join(map(quote, self._factories))}"
        advice = meant or "register_module adds others"
        raise BoundValueError(OPTION, variable, value, f"{listed}; {advice}")

    def factory(self, name: str) -> Callable[..., Any]:
        """Return what makes modules of a type."""
        return self._factories[name]

    def make(self, name: str, signature: Any) -> Any:
        """Return a new module of a type."""
        try:
            module = self._factories[name](signature)
        except TypeError as error:
            reason = f"{name!r} made no module of the signature {signature.signature!r}: {error}"
            advice = f"register_module({name!r}, ..., ARGUMENT=...) passes further arguments"
            raise InvalidArgumentError("factory", f"{reason}; {advice}") from error
        if not isinstance(module, dspy.Module):
            reason = f"{name!r} made a {type(module).__name__}, not a dspy.Module"
            raise InvalidArgumentError("factory", reason)
        if _TYPE in vars(module):
            raise InvalidArgumentError("factory", f"{name!r} has made the same module before; it must make a new one")
        setattr(module, _TYPE, name)
        return module


class _Others:
    """The modules of other types that a program has used. Never changes; pickles have None instead.

    Attributes:
        types: Which types there are.
        modules: By type, the module that was used last.
        steps: By type, what was the program's type then, and its state: what is still like that needs no carrying.
        arrived: The state of the program's module when that became it.
    """

    __slots__ = ("arrived", "modules", "steps", "types")

    def __init__(
        self,
        types: ModuleTypes,
        modules: Mapping[str, Any],
        steps: Mapping[str, tuple[str, State]],
        arrived: State,
    ) -> None:
        self.types, self.modules, self.steps, self.arrived = types, modules, steps, arrived

    def __copy__(self) -> "_Others":
        return self

    def __deepcopy__(self, memo: object) -> "_Others":
        modules = {name: each.deepcopy() for name, each in self.modules.items()}
        return _Others(self.types, modules, self.steps, self.arrived)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class VariableModule(dspy.Module):  # type: ignore[misc]
    """A module whose type a variable says, made by `ModuleVariableResolver.create_module`.

    Each outermost call uses the type that the variable has when it begins. The predictors are those of `module`, which
    is replaced when the type changes.

    Attributes:
        module: The module of the type that was used last.
        type_change: What became of the state of its predictors when the type changed for the last time; None before.
    """

    _changed_at: int = 0
    """The number of the snapshot with which the type changed."""

    def __init__(self, types: ModuleTypes, signature: Any, name: str) -> None:
        super().__init__()
        self.signature = signature
        self.module = types.make(name, signature)
        self.type_change: TypeChange | None = None
        self._dspex_persist_others: _Others | None = _Others(types, {}, {}, state_of(self.module))

    @property
    def module_type(self) -> str:
        """The type of `module`, by the name under which it is registered."""
        return _type_of(self.module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module of the type that the variable has."""
        module, scope = self._chosen()
        with _within(scope):
            return module(*args, **kwargs)

    async def aforward(self, *args: Any, **kwargs: Any) -> Any:
        """Do the same without blocking the event loop."""
        module, scope = self._chosen()
        with _within(scope):
            return await module.acall(*args, **kwargs)

    def _chosen(self) -> tuple[Any, Scope | None]:
        """Return the module for the call that is in progress, and the scope for that, if it needs another one."""
        scope, others = snapshots.current(), self._dspex_persist_others
        choice = None if scope is None else scope.choices.get(OPTION)
        if scope is None or choice is None or others is None:
            return self.module, None
        name = others.types.name_of(choice.variable, scope.reading(choice).value)
        module = self.module
        if _type_of(module) != name:
            with _changing:
                module = self._of_type(name, choice.variable, scope)
        if not any(frame.binding.per for frame in scope.frames):
            return module, None
        frames = tuple(_aimed(frame, self, module) if frame.binding.per else frame for frame in scope.frames)
        return module, Scope(scope.module, frames, scope.choices, scope.snapshot, scope.live, scope.outer)

    def _of_type(self, name: str, variable: str, scope: Scope) -> Any:
        """Return the module of a type for a call, and replace the program's by it unless it is for this call only.

        It is, if a transaction has written the type, since others do not see that, and it may come to nothing; and if
        calls that began later have brought another type.
        """
        others, module, before = self._dspex_persist_others, self.module, self.module_type
        if others is None or before == name:
            return module
        state = state_of(module)
        found = others.modules.get(name)
        if found is None:
            paths = list(state)
        else:
            source, then = others.steps[name]
            paths = changed_in(state, then if source == before else others.arrived)
        target = others.types.make(name, self.signature) if found is None else found
        if paths:
            # Calls that are using it do not see what is carried over.
            target = target if found is None else found.deepcopy()
            plain = state_of(others.types.make(before, self.signature)) if before in others.types.names else {}
            carried = carry(state, plain, paths, target)
        else:
            carried = Carried()
        notes = (*carried.notes, *_aimless(scope, self, target))
        change = TypeChange(variable, before, name, carried.carried, carried.left, notes)
        is_lasting = scope.snapshot.around is NOTHING and scope.snapshot.number >= self._changed_at
        if is_lasting or paths:
            _tell(change)
        modules, steps, arrived = (
            {**others.modules, name: target},
            {**others.steps, name: (before, state)},
            others.arrived,
        )
        if is_lasting:
            arrived = state_of(target)
            steps[before] = (name, arrived)
            modules[before] = module
            self.type_change, self._changed_at = change, scope.snapshot.number
        self._dspex_persist_others = _Others(others.types, modules, steps, arrived)
        if is_lasting:
            self.module = target
        return target


def retyped(module: VariableModule, is_wanted: Callable[[type], bool]) -> Mapping[str, Any] | None:
    """Return the attributes that make a module one of another type, of whose class `is_wanted` is true.

    They are {} if it is of such a type. None: there is no such type.
    """
    others = module._dspex_persist_others
    if is_wanted(type(module.module)):
        return {}
    if others is None:
        return None
    for name in others.types.names:
        factory = others.types.factory(name)
        kind = factory.func if isinstance(factory, partial) else factory
        if isinstance(kind, type) and not is_wanted(kind):
            continue
        found = others.modules.get(name)
        inner = others.types.make(name, module.signature) if found is None else found.deepcopy()
        if is_wanted(type(inner)):
            state, before = state_of(inner), module.module_type
            modules, steps = {**others.modules, before: module.module}, {**others.steps, before: (name, state)}
            return {INNER: inner, "_dspex_persist_others": _Others(others.types, modules, steps, state)}
    return None


def _type_of(module: Any) -> str:
    return str(vars(module).get(_TYPE, type(module).__name__))


def _tell(change: TypeChange) -> None:
    logger = _logger.bind(variable=change.variable, before=change.before, after=change.after)
    logger.info("the module type has changed", carried=len(change.carried), left=len(change.left))
    for text in change.left:
        logger.warning(f"the module type has changed, and this was not carried over: {text}")
    for text in change.notes:
        logger.warning(f"the module type has changed: {text}")


@contextmanager
def _within(scope: Scope | None) -> Iterator[None]:
    if scope is None:
        yield
        return
    token = snapshots.put(scope)
    try:
        yield
    finally:
        thread_local_overrides.reset(token)


def _modules_with(program: Any, module: Any, inner: Any) -> tuple[str, list[tuple[str, Any]]]:
    """Return the path of what is in a `VariableModule`, and a program's modules with their paths if `inner` is that."""
    modules = modules_in(program)
    place = next((path for path, each in modules if each is module), None)
    if place is None:
        return "", modules
    inside = INNER if place == SELF else f"{place}.{INNER}"
    others = [pair for pair in modules if not is_within(pair[0], inside)]
    return inside, others + [(inside if path == SELF else f"{inside}.{path}", each) for path, each in modules_in(inner)]


def _aimed(frame: Frame, module: Any, inner: Any) -> Frame:
    """Return a frame whose `per` leads to the modules in `inner`."""
    inside, modules = _modules_with(frame.module, module, inner)
    if not inside:
        return frame
    return frame._replace(targets=targets_of(frame.binding, modules))


def _aimless(scope: Scope, module: Any, inner: Any) -> Iterator[str]:
    """Yield which paths of `per` lead to nothing if `inner` is what is in a `VariableModule`."""
    for frame in scope.frames:
        if frame.binding.per:
            inside, modules = _modules_with(frame.module, module, inner)
            paths = dict(modules)
            for path in frame.binding.per:
                if inside and is_within(path, inside) and path not in paths:
                    yield f"variables set options of {quote(path)}, which is not there now"


def variable_modules(program: Any) -> Iterator[tuple[str, VariableModule]]:
    """Yield the modules in a program whose type a variable may say, with their paths."""
    return ((path, each) for path, each in modules_in(program) if isinstance(each, VariableModule))


def check_type(module: VariableModule, variable: str, value: object) -> None:
    """Raise `BoundValueError` unless the value of a variable names a type of a module."""
    others = module._dspex_persist_others
    if others is not None:
        others.types.name_of(variable, value)
