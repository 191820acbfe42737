"""What a call of a bound program uses: a snapshot of its variables, and which of them apply where.

The scope of a call is in DSPy's settings, which is what DSPy's own threads inherit; other threads get it as `hook.py`
says. A scope never changes, so calls with different snapshots do not see each other.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextvars import Token
from functools import lru_cache
from typing import Any, Final, NamedTuple, TypeAlias

from dspy import Predict, settings
from dspy.dsp.utils.settings import thread_local_overrides
from dspy.dsp.utils.utils import dotdict

from dspex_persist.cognitive import typed
from dspex_persist.cognitive.dspy.options import LM_OPTIONS, PROGRAM_OPTIONS, check
from dspex_persist.cognitive.dspy.paths import modules_in
from dspex_persist.cognitive.errors import BoundValueError
from dspex_persist.cognitive.joining import NOTHING, Surroundings, surroundings
from dspex_persist.cognitive.records import decode
from dspex_persist.cognitive.steps import Steps, ask
from dspex_persist.cognitive.variables import Variables
from dspex_persist.state import commands
from dspex_persist.state.masking import MASK, Secrets
from dspex_persist.state.model import SENSITIVE
from dspex_persist.state.tools.session import current_session

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

    @property
    def has_program_options(self) -> bool:
        """Whether it sets more than options of LM calls."""
        return any(not PROGRAM_OPTIONS.keys().isdisjoint(each) for each in (self.options, *self.per.values()))

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

    def __repr__(self) -> str:
        options = (*self.options.items(), *self.per.items())
        listed = ", ".join(f"{name}={each!r}" for name, each in options)
        return f"<Binding to session {self.ctx.session_id!r}: {listed}>"

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
    """The value of a variable, and the version that has it. `secrets` masks it in texts, if it is sensitive."""

    value: Any
    version: int
    secrets: Secrets | None = None


# Making one checks its arguments, which takes as long as it takes to carry it out.
_query = lru_cache(maxsize=256)(commands.GetVariables)


def reading(ctx: Variables, names: tuple[str, ...]) -> Steps[dict[str, Reading]]:
    """Read variables as of one moment.

    Raises:
        VariableNotFoundError: One of them is not there.
    """
    found = yield from ask(_query(ctx.session_id, names))
    for name in found.missing:
        # Its error has the nearest name.
        yield from ask(commands.GetVariable(ctx.session_id, name))
    readings = {}
    for name, record in found.variables.items():
        value = (yield from typed.read(ctx, record)) if record.name in typed.names else decode(record)
        sensitive = record.metadata.get(SENSITIVE, "").lower() == "true"
        readings[name] = Reading(value, record.version, Secrets((record.value,)) if sensitive else None)
    return readings


def hide(error: object, readings: Iterable[tuple[str, Reading]]) -> None:
    """Mask the value of a sensitive variable in an error about that value: errors get into logs and the journal."""
    if isinstance(error, BoundValueError):
        for name, each in readings:
            if name == error.variable and each.secrets is not None:
                error.value = MASK
                error.reason = each.secrets.masked(error.reason)


Readings: TypeAlias = dict[tuple[int, str], Reading]
"""What was read, by the `id` of the context and the name of the variable."""


_numbers: Final = itertools.count(1)


class Snapshot:
    """What one outermost call has read.

    Attributes:
        readings: The variables. Modules that join the call later, because they are not in the program's attributes,
            add theirs.
        ended: Whether the call has ended. Code that goes on afterwards keeps it, but the next call takes a new one.
        around: What the call is part of.
        number: Its number in this process: those of later calls are greater.
        contexts: Those that were read. They are kept, because another one could get the `id` of one that is gone.
    """

    __slots__ = ("around", "contexts", "ended", "number", "readings")

    def __init__(self, around: Surroundings) -> None:
        self.around = around
        self.readings: Readings = {}
        self.contexts: list[Variables] = []
        self.ended = False
        self.number = next(_numbers)


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


class LmOption(NamedTuple):
    """An option of LM calls that a variable sets, with the variable and its value.

    `is_default` says that it applies only if nothing else says the option; `is_sensitive`, that its value is not to be
    shown.
    """

    option: str
    variable: str
    value: Any
    is_default: bool
    is_sensitive: bool


class Scope:
    """A module's call in progress, and what applies in it.

    Attributes:
        module: The module that is called.
        frames: The bound modules whose calls are in progress, outermost first.
        choices: By option, the variable that sets it.
        snapshot: What the outermost call has read.
        live: What was read last of the variables of bindings with `live=True`.
        outer: The scope of the caller.
        lm: The LM of the predictor that is called, once that has chosen it.
        filled: The options that variables have added to those of the predictor's call.
        attributes: The attributes of the module that variables set during this call.
    """

    __slots__ = (
        "_lm_options",
        "attributes",
        "choices",
        "filled",
        "frames",
        "live",
        "lm",
        "module",
        "outer",
        "snapshot",
    )

    def __init__(
        self,
        module: Any,
        frames: tuple[Frame, ...],
        choices: Mapping[str, Choice],
        snapshot: Snapshot,
        live: Readings,
        outer: "Scope | None" = None,
    ) -> None:
        self.module, self.frames, self.choices = module, frames, choices
        self.snapshot, self.live, self.outer = snapshot, live, outer
        self.lm: Any = None
        self.filled: Mapping[str, Any] = {}
        self.attributes: Mapping[str, Any] = {}
        self._lm_options: tuple[LmOption, ...] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __deepcopy__(self, memo: object) -> "Scope":
        return self

    def reading(self, choice: Choice) -> Reading:
        """Return what sets an option."""
        readings = self.live if choice.binding.live else self.snapshot.readings
        return readings[id(choice.binding.ctx), choice.variable]

    @property
    def lm_options(self) -> tuple[LmOption, ...]:
        """The options of LM calls that variables set.

        Raises:
            BoundValueError: An option does not take the value of its variable.
        """
        options = self._lm_options
        if options is None:
            options = self._lm_options = tuple(self._checked())
        return options

    def _checked(self) -> Iterator[LmOption]:
        for option, choice in self.choices.items():
            if option in LM_OPTIONS:
                value, _, secrets = self.reading(choice)
                check(option, choice.variable, value)
                yield LmOption(option, choice.variable, value, choice.binding.is_default, secrets is not None)

    @property
    def has_program_options(self) -> bool:
        """Whether variables set more than options of LM calls."""
        return not PROGRAM_OPTIONS.keys().isdisjoint(self.choices)

    @property
    def is_live(self) -> bool:
        """Whether the next call of an LM has to read variables."""
        return any(frame.binding.live for frame in self.frames)

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
    if scope is None:
        return None
    # The first comparison is for speed: every call of an LM passes here.
    session = scope.snapshot.around.session
    return scope if session is current_session.get() or session is around().session else None


def put(scope: Scope, others: Mapping[str, Any] | None = None) -> Token[Any]:
    """Make this the scope of the code in this context, with other settings of DSPy."""
    overrides = dotdict(thread_local_overrides.get())
    overrides[SCOPE] = scope
    if others:
        overrides.update(others)
    token: Token[Any] = thread_local_overrides.set(overrides)
    return token


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
