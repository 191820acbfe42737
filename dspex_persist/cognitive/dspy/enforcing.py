"""The hooks by which variables take effect: in calls of modules, in predictors, and in calls of LMs."""

import functools
import threading
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from contextvars import ContextVar, Token
from typing import Any, Final

from dspy import Module, Predict, settings
from dspy.lm15 import Request

from dspex_persist.cognitive.dspy import choosing, refusals, request_options, snapshots
from dspex_persist.cognitive.dspy.entering import Entry
from dspex_persist.cognitive.dspy.options import check_for, synonyms, wire_name
from dspex_persist.cognitive.dspy.requests import secrets_of
from dspex_persist.cognitive.dspy.snapshots import LmOption, Scope, binding_of
from dspex_persist.cognitive.errors import BoundValueError
from dspex_persist.state.tools.failures import conceal

# Calls of LMs

_calling: ContextVar[Scope | None] = ContextVar("dspex_persist_calling", default=None)
"""The scope in which an LM is being called. What that calls is up to it."""


def enforced(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `__call__` of an LM class: the options of a bound program's calls become those that its variables say."""

    @functools.wraps(call)
    def enforcing(lm: Any, *args: Any, **kwargs: Any) -> Any:
        scope = snapshots.current()
        if scope is None or _is_apart(scope, lm):
            return call(lm, *args, **kwargs)
        if _reads_here(scope):
            entry = Entry(scope.module, scope, reads_live=True)
            entry.read()
            with entry as scope, _Call(scope, lm, args, kwargs) as arguments:
                return call(lm, *arguments.args, **arguments.kwargs)
        with _Call(scope, lm, args, kwargs) as arguments:
            return call(lm, *arguments.args, **arguments.kwargs)

    return enforcing


def enforced_async(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `acall` of an LM class."""

    @functools.wraps(call)
    async def enforcing(lm: Any, *args: Any, **kwargs: Any) -> Any:
        scope = snapshots.current()
        if scope is None or _is_apart(scope, lm):
            return await call(lm, *args, **kwargs)
        if _reads_here(scope):
            entry = Entry(scope.module, scope, reads_live=True)
            await entry.read_aio()
            with entry as scope, _Call(scope, lm, args, kwargs) as arguments:
                return await call(lm, *arguments.args, **arguments.kwargs)
        with _Call(scope, lm, args, kwargs) as arguments:
            return await call(lm, *arguments.args, **arguments.kwargs)

    return enforcing


def _is_apart(scope: Scope, lm: Any) -> bool:
    """Whether an LM is called by another LM, or as the second LM of a `TwoStepAdapter`, which is not the program's."""
    calling = _calling.get()
    if calling is not None and calling.module is scope.module and calling.snapshot is scope.snapshot:
        return True
    return scope.lm is not None and scope.lm is not lm and getattr(settings.adapter, "extraction_model", None) is lm


def _reads_here(scope: Scope) -> bool:
    """Whether this call of an LM is one of the program's own code; a predictor has read before it makes its call."""
    return scope.is_live and not isinstance(scope.module, Predict)


class _Call:
    """A call of an LM, whose arguments are those that variables say."""

    __slots__ = ("_changes", "_lm", "_scope", "_token", "args", "kwargs")

    def __init__(self, scope: Scope, lm: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._scope, self._lm, self.args, self.kwargs = scope, lm, args, kwargs
        request = args[0] if args else kwargs.get("request")
        if isinstance(request, Request):
            self._changes = _changes(scope, lm, request_options.said_in(request, kwargs), request)
            if self._changes:
                self.args, self.kwargs = (), {**kwargs, **request_options.with_options(request, self._changes)}
        else:
            self._changes = _changes(scope, lm, kwargs)
            if self._changes:
                gone = {synonym for name in self._changes for synonym in synonyms(name)}
                self.kwargs = {name: said for name, said in kwargs.items() if name not in gone} | self._changes

    def __enter__(self) -> "_Call":
        self._token: Token[Scope | None] = _calling.set(self._scope)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        _calling.reset(self._token)
        if error is not None:
            conceal(error, secrets_of(self._lm, self.kwargs))
        if isinstance(error, Exception) and self._changes:
            refusals.explain(error, self._lm, self._set_here())

    def _set_here(self) -> list[LmOption]:
        return [each for each in self._scope.lm_options if wire_name(each.option, self._lm) in self._changes]


def _changes(scope: Scope, lm: Any, said: Mapping[str, Any], request: Any = None) -> dict[str, Any]:
    """Return the options of a call of an LM that variables set, by their names there."""
    changes: dict[str, Any] = {}
    for each in scope.lm_options:
        name = wire_name(each.option, lm)
        # An `lm15.Request` says all of its options itself.
        if each.is_default and name not in scope.filled and _is_said(name, said, lm if request is None else None):
            continue
        check_for(lm, name, each.variable, each.value)
        if request is not None and not request_options.can_say(name):
            raise BoundValueError(
                each.option, each.variable, each.value, "an lm15.Request cannot say it", str(lm.model)
            )
        changes[name] = each.value
    return changes


def _is_said(name: str, said: Mapping[str, Any], lm: Any) -> bool:
    """Whether a call, or its LM, says an option."""
    defaults = getattr(lm, "kwargs", {})
    return any(said.get(each) is not None or defaults.get(each) is not None for each in synonyms(name))


# Calls of modules


def _has_to_enter(module: Any, scope: Scope | None) -> bool:
    """Whether something applies in a module's call that does not in its caller's."""
    if binding_of(module) is not None:
        return scope is None or scope.module is not module or scope.snapshot.ended
    if scope is None or scope.module is module:
        return False
    if isinstance(module, Predict) or any(frame.targets for frame in scope.frames):
        return True
    return any(option in scope.choices and choosing.can_set(module, option) for option in choosing.ATTRIBUTES)


recording_of: Callable[[Any], Any] | None = None
"""Returns what records the LM calls of an outermost call of a program, if its context does that. Set by `recording`."""


def _recorded(entry: Entry) -> Any:
    """Return a context manager, of both kinds, for a call that may have to be recorded."""
    recording = recording_of(entry.module) if recording_of is not None and entry.is_outermost else None
    return recording or _NOTHING


_NOTHING: Final = nullcontext()


def _entering(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function of a module class whose calls are calls of the module."""

    @functools.wraps(call)
    def entering(module: Any, *args: Any, **kwargs: Any) -> Any:
        scope = snapshots.current()
        if not _has_to_enter(module, scope):
            return call(module, *args, **kwargs)
        entry = Entry(module, scope, reads_live=isinstance(module, Predict))
        entry.read()
        with _recorded(entry), entry as within:
            return call(module, *args, **_with_iterations(within, kwargs))

    return entering


def _entering_async(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    async def entering(module: Any, *args: Any, **kwargs: Any) -> Any:
        scope = snapshots.current()
        if not _has_to_enter(module, scope):
            return await call(module, *args, **kwargs)
        entry = Entry(module, scope, reads_live=isinstance(module, Predict))
        await entry.read_aio()
        async with _recorded(entry):
            with entry as within:
                return await call(module, *args, **_with_iterations(within, kwargs))

    return entering


def _with_iterations(scope: Scope, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a module's call; those of agents may say how many iterations they make at most."""
    most = scope.attributes.get("max_iters")
    if most is None or "max_iters" not in kwargs or scope.choices["max_iters"].binding.is_default:
        return kwargs
    return {**kwargs, "max_iters": most}


def _batching(batch: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `Module.batch`, so that one snapshot is valid for all calls of a batch."""

    @functools.wraps(batch)
    def batching(module: Any, *args: Any, **kwargs: Any) -> Any:
        scope = snapshots.current()
        if not _has_to_enter(module, scope):
            return batch(module, *args, **kwargs)
        entry = Entry(module, scope, reads_live=False)
        entry.read()
        with _recorded(entry), entry as scope:
            snapshots.put(scope.between_calls())
            return batch(module, *args, **kwargs)

    return batching


# Predictors


def _preparing(preprocess: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what merges the options of a predictor's call, so that adapters and DSPy's defaults take the variables in.

    DSPy raises a temperature of 0.0 to 0.7 when it asks for several answers; what a variable says stays.
    """

    @functools.wraps(preprocess)
    def preparing(predict: Any, **kwargs: Any) -> Any:
        scope = snapshots.current()
        if scope is None or scope.module is not predict:
            return preprocess(predict, **kwargs)
        if scope.has_program_options:
            kwargs = choosing.prepared(scope, predict, kwargs)
        lm = kwargs.get("lm", predict.lm) or settings.lm
        own = kwargs.get("config", {})
        said = {**predict.config, **own}
        set_here = {}
        for each in scope.lm_options:
            name = wire_name(each.option, lm)
            if not (each.is_default and _is_said(name, said, lm)):
                set_here[name] = each.value
        if set_here:
            kwargs = {**kwargs, "config": {**own, **set_here}}
        scope.filled = set_here
        scope.lm, config, signature, demos, inputs = preprocess(predict, **kwargs)
        return scope.lm, {**config, **set_here}, signature, demos, inputs

    return preparing


_installing = threading.Lock()
_installed = False


def install() -> None:
    """Hook DSPy's module classes, permanently. Calls of modules that are not bound cost little more."""
    global _installed
    with _installing:
        if _installed:
            return
        _installed = True
        for kind, name, wrapper in (
            (Module, "__call__", _entering),
            (Module, "batch", _batching),
            (Module, "acall", _entering_async),
            (Predict, "forward", _entering),
            (Predict, "aforward", _entering_async),
            (Predict, "_forward_preprocess", _preparing),
        ):
            setattr(kind, name, wrapper(vars(kind)[name]))
