"""What a call of a bound program uses: a snapshot of its variables, and which of them apply where.

The scope of a call is in DSPy's settings, which is what DSPy's own threads inherit; other threads get it as `hook.py`
says. A scope never changes, so calls with different snapshots do not see each other.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextvars import Token
from typing import Any, Final, NamedTuple

from dspy import Predict, settings
from dspy.dsp.utils.settings import thread_local_overrides
from dspy.dsp.utils.utils import dotdict

from dspex_persist.cognitive import typed
from dspex_persist.cognitive.dspy.options import PROGRAM_OPTIONS
from dspex_persist.cognitive.dspy.paths import is_within, modules_in
from dspex_persist.cognitive.joining import NOTHING, Surroundings, joined, surroundings
from dspex_persist.cognitive.records import decode
from dspex_persist.cognitive.steps import Steps, ask, run, run_aio
from dspex_persist.cognitive.variables import Variables
from dspex_persist.state import commands

SCOPE: Final = "dspex_persist_scope"
"""The key of the scope in DSPy's settings."""
_AROUND: Final = "dspex_persist_surroundings"
"""The key of the execution, or the transaction, that code in a thread is part of."""
ATTRIBUTE: Final = "_dspex_persist_binding"
"""The attribute of a module that has its binding."""


class Binding:
    """Which variables set which options of a module.

    Copies of the module have the same binding. Pickles of the module have None instead of it, because a context works
    in its process only.
    """

    __slots__ = ("adapters", "ctx", "is_default", "live", "lms", "names", "options", "per")

    def __init__(
        self,
        ctx: Variables,
        options: Mapping[str, str],
        per: Mapping[str, Mapping[str, str]],
        *,
        is_default: bool = False,
        live: bool = False,
        lms: Mapping[str, Any] | None = None,
        adapters: Mapping[str, Any] | None = None,
    ) -> None:
        self.ctx = ctx
        self.options = options
        self.per = per
        self.is_default = is_default
        self.live = live
        self.lms = {} if lms is None else lms
        self.adapters = {} if adapters is None else adapters
        self.names = tuple(
            dict.fromkeys((*options.values(), *(name for each in per.values() for name in each.values())))
        )

    def replace(self, options: Mapping[str, str], per: Mapping[str, Mapping[str, str]]) -> "Binding":
        """Return a binding like this one, of other options."""
        return Binding(
            self.ctx,
            options,
            per,
            is_default=self.is_default,
            live=self.live,
            lms=self.lms,
            adapters=self.adapters,
        )

    def __copy__(self) -> "Binding":
        return self

    def __deepcopy__(self, memo: object) -> "Binding":
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def binding_of(module: Any) -> Binding | None:
    """Return the binding of a module, if it has one."""
    binding: Binding | None = vars(module).get(ATTRIBUTE)
    return binding


class Reading(NamedTuple):
    """The value of a variable, and the version that has it."""

    value: Any
    version: int


def reading(ctx: Variables, names: Iterable[str]) -> Steps[dict[str, Reading]]:
    """Read variables as of one moment.

    Raises:
        VariableNotFoundError: One of them is not there.
    """
    found = yield from ask(commands.GetVariables(ctx.session_id, tuple(names)))
    for name in found.missing:
        # Its error has the nearest name.
        yield from ask(commands.GetVariable(ctx.session_id, name))
    readings = {}
    for name, record in found.variables.items():
        value = (yield from typed.read(ctx, record)) if record.name in typed.names else decode(record)
        readings[name] = Reading(value, record.version)
    return readings


_Readings = dict[tuple[Variables, str], Reading]


class Snapshot:
    """What one outermost call has read.

    Attributes:
        readings: By context and name. Modules that join the call later, because they are not in the program's
            attributes, add theirs.
        ended: Whether the call has ended. Code that goes on afterwards keeps it, but the next call takes a new one.
        around: What the call is part of.
    """

    __slots__ = ("around", "ended", "readings")

    def __init__(self, around: Surroundings) -> None:
        self.around = around
        self.readings: _Readings = {}
        self.ended = False


class Named(NamedTuple):
    """A variable that a binding names for an option, and the module for which it does."""

    variable: str
    target: Any


class Frame(NamedTuple):
    """A bound module whose call is in progress, and by the `id` of each module in it, what `per` says about that."""

    binding: Binding
    module: Any
    targets: Mapping[int, Mapping[str, Named]]


class Choice(NamedTuple):
    """A variable that sets an option.

    Attributes:
        variable: Its name.
        target: The module for which the binding names it; it applies to what is in that.
        binding: The binding.
        depth: How deep in the call the bound module is.
    """

    variable: str
    target: Any
    binding: Binding
    depth: int


class Scope:
    """A module's call in progress, and what applies in it.

    Attributes:
        module: The module that is called.
        frames: The bound modules whose calls are in progress, outermost first.
        choices: By option, the variable that sets it.
        snapshot: What the outermost call has read.
        live: What was read last of the variables of bindings with `live=True`.
        is_calling: Whether an LM is being called: what that calls is up to it.
        outer: The scope of the caller.
        lm: The LM of the predictor that is called, once that has chosen it.
        attributes: The attributes of the module that variables set during this call.
    """

    __slots__ = ("attributes", "choices", "frames", "is_calling", "live", "lm", "module", "outer", "snapshot")

    def __init__(
        self,
        module: Any,
        frames: tuple[Frame, ...],
        choices: Mapping[str, Choice],
        snapshot: Snapshot,
        live: _Readings,
        outer: "Scope | None" = None,
        is_calling: bool = False,
    ) -> None:
        self.module, self.frames, self.choices = module, frames, choices
        self.snapshot, self.live, self.is_calling = snapshot, live, is_calling
        self.outer = outer
        self.lm: Any = None
        self.attributes: Mapping[str, Any] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __deepcopy__(self, memo: object) -> "Scope":
        return self

    def reading(self, choice: Choice) -> Reading:
        """Return what sets an option."""
        readings = self.live if choice.binding.live else self.snapshot.readings
        return readings[choice.binding.ctx, choice.variable]

    @property
    def has_program_options(self) -> bool:
        """Whether variables set more than options of LM calls."""
        return not PROGRAM_OPTIONS.keys().isdisjoint(self.choices)

    @property
    def is_live(self) -> bool:
        """Whether the next call of an LM has to read variables."""
        return any(frame.binding.live for frame in self.frames)

    def calling(self) -> "Scope":
        """Return the scope for what an LM does while it is called."""
        return Scope(self.module, self.frames, self.choices, self.snapshot, self.live, self.outer, True)

    def between_calls(self) -> "Scope":
        """Return the scope for code that will call the module, several times perhaps."""
        return Scope(None, self.frames, self.choices, self.snapshot, self.live)


def around() -> Surroundings:
    """Return the execution, or the transaction, that the running code is part of."""
    here = surroundings()
    if here is NOTHING:
        carried: Surroundings = thread_local_overrides.get().get(_AROUND, NOTHING)
        return carried
    return here


def carried() -> dict[str, Any]:
    """Return the settings that the code of another thread needs for its share in the call that is in progress."""
    overrides, here = thread_local_overrides.get(), around()
    scope = {SCOPE: overrides[SCOPE]} if SCOPE in overrides else {}
    return scope if here is NOTHING else {**scope, _AROUND: here}


def current() -> Scope | None:
    """Return the scope of the running code, if a call of a bound program is in progress.

    The execution of a tool that the program calls is no part of that: it reads variables in its own transaction.
    """
    scope: Scope | None = thread_local_overrides.get().get(SCOPE)
    if scope is None or scope.snapshot.around.session is not around().session:
        return None
    return scope


def put(scope: Scope | None, **others: Any) -> Token[Any]:
    """Make this the scope of the code in this context, with other settings of DSPy."""
    overrides = thread_local_overrides.get()
    token: Token[Any] = thread_local_overrides.set(dotdict({**overrides, **others, SCOPE: scope}))
    return token


# Entering a call

_Wanted = dict[Variables, dict[str, None]]


class Entry:
    """The beginning of a module's call: which variables it has to read, and the scope that it makes of them."""

    __slots__ = ("_around", "_binding", "_is_new", "_live", "_names", "_names_live", "_outer", "_snapshot", "module")

    def __init__(self, module: Any, outer: Scope | None, *, reads_live: bool) -> None:
        self.module, self._binding = module, binding_of(module)
        if outer is not None and outer.snapshot.ended and self._binding is not None:
            outer = None
        self._outer = outer
        self._is_new = self._binding is not None and not any(
            frame.module is module for frame in (() if outer is None else outer.frames[-1:])
        )
        self._around = around()
        self._snapshot = Snapshot(self._around) if outer is None else outer.snapshot
        self._live: _Readings = {}
        self._names: _Wanted = {}
        self._names_live: _Wanted = {}
        if outer is None:
            for _, each in modules_in(module):
                if (binding := binding_of(each)) is not None and not binding.live:
                    self._names.setdefault(binding.ctx, {}).update(dict.fromkeys(binding.names))
        elif self._binding is not None and not self._binding.live:
            known, ctx = self._snapshot.readings, self._binding.ctx
            missing = {name: None for name in self._binding.names if (ctx, name) not in known}
            if missing:
                self._names[ctx] = missing
        if reads_live or self._binding is not None:
            bindings = [] if outer is None else [frame.binding for frame in outer.frames]
            for binding in (*bindings, self._binding):
                if binding is not None and binding.live:
                    self._names_live.setdefault(binding.ctx, {}).update(dict.fromkeys(binding.names))

    @property
    def is_outermost(self) -> bool:
        """Whether no call of a bound module is in progress."""
        return self._outer is None

    def read(self) -> None:
        """Read the variables."""
        for ctx, names, readings in self._wanted():
            where = joined(ctx, self._around)
            self._take(ctx, run(where, reading(where, names)), readings)

    async def read_aio(self) -> None:
        """Read the variables without blocking the event loop."""
        for ctx, names, readings in self._wanted():
            where = joined(ctx, self._around)
            self._take(ctx, await run_aio(where, reading(where, names)), readings)

    def _wanted(self) -> Iterator[tuple[Variables, Iterable[str], _Readings]]:
        for ctx, names in self._names.items():
            yield ctx, names, self._snapshot.readings
        for ctx, names in self._names_live.items():
            yield ctx, names, self._live

    @staticmethod
    def _take(ctx: Variables, found: Mapping[str, Reading], readings: _Readings) -> None:
        for name, each in found.items():
            # Of two modules that join a call at the same time, both use what was read first.
            readings.setdefault((ctx, name), each)

    def scope(self) -> Scope:
        """Return the scope of the call."""
        outer, module, binding = self._outer, self.module, self._binding
        frames, choices, live = ((), {}, {}) if outer is None else (outer.frames, outer.choices, outer.live)
        if frames:
            choices = dict(choices)
            for depth, frame in enumerate(frames):
                if id(module) in frame.targets:
                    _choose(choices, frame.targets[id(module)], frame.binding, depth)
        if binding is not None and self._is_new:
            frame = Frame(binding, module, _targets_of(binding, module))
            choices = dict(choices)
            named = {option: Named(variable, module) for option, variable in binding.options.items()}
            _choose(choices, {**named, **frame.targets.get(id(module), {})}, binding, len(frames))
            frames = (*frames, frame)
        return Scope(module, frames, choices, self._snapshot, {**live, **self._live} if self._live else live, outer)


def _choose(choices: dict[str, Choice], options: Mapping[str, Named], binding: Binding, depth: int) -> None:
    """Let a binding set options, unless a binding of a module further inside does."""
    for option, (variable, target) in options.items():
        chosen = choices.get(option)
        if chosen is None or chosen.depth <= depth:
            choices[option] = Choice(variable, target, binding, depth)


def _targets_of(binding: Binding, program: Any) -> dict[int, dict[str, Named]]:
    """Return what `per` says about each module of a program; the longest path that leads to it counts most."""
    if not binding.per:
        return {}
    targets: dict[int, dict[str, Named]] = {}
    paths = sorted(binding.per, key=len)
    modules = modules_in(program)
    by_path = dict(modules)
    for path, module in modules:
        options = {
            option: Named(variable, by_path[other])
            for other in paths
            if is_within(path, other)
            for option, variable in binding.per[other].items()
        }
        if options:
            targets[id(module)] = options
    return targets


# What the recorder asks


def used() -> dict[str, int]:
    """Return the variables that apply to the running call, with their versions; {} outside of bound programs.

    Those of a second session have its id before their name, if they are called the same.
    """
    scope = current()
    if scope is None:
        return {}
    versions: dict[str, int] = {}
    sessions: dict[str, str] = {}
    for choice in scope.choices.values():
        session_id = choice.binding.ctx.session_id
        name = choice.variable
        if sessions.setdefault(name, session_id) != session_id:
            name = f"{session_id}:{name}"
        versions[name] = scope.reading(choice).version
    return versions


def predictor() -> str | None:
    """Return the path of the predictor that is running in its program; None if none is."""
    callers: list[Any] = settings.caller_modules or []
    running = next((module for module in reversed(callers) if isinstance(module, Predict)), None)
    if running is None:
        return None
    return next((path for program in _programs(callers) for path in _paths(program, running)), "")


def _programs(callers: list[Any]) -> Iterator[Any]:
    scope = current()
    if scope is not None and not any(module is scope.frames[0].module for module in callers):
        # In a thread that DSPy did not start.
        yield scope.frames[0].module
    yield from callers


def _paths(program: Any, module: Any) -> Iterator[str]:
    return (path for path, each in modules_in(program) if each is module)
