"""The beginning of a module's call: which variables it has to read, and the scope that it makes of them."""

from collections.abc import Iterable, Mapping
from contextvars import Token
from typing import Any

from dspy.dsp.utils.settings import thread_local_overrides

from dspex_persist.cognitive.dspy import choosing
from dspex_persist.cognitive.dspy.paths import is_within, modules_in
from dspex_persist.cognitive.dspy.snapshots import (
    Binding,
    Choice,
    Frame,
    Named,
    Reading,
    Readings,
    Scope,
    Snapshot,
    around,
    binding_of,
    hide,
    put,
    reading,
)
from dspex_persist.cognitive.errors import BoundValueError
from dspex_persist.cognitive.joining import joined
from dspex_persist.cognitive.steps import run, run_aio
from dspex_persist.cognitive.variables import Variables


class Entry:
    """A call that begins: first read, then enter its block, which has the scope.

    Attributes:
        module: The module.
        is_outermost: Whether no call of a bound module is in progress.
    """

    __slots__ = ("_around", "_binding", "_live", "_outer", "_snapshot", "_token", "_wanted", "module")

    def __init__(self, module: Any, outer: Scope | None, *, reads_live: bool) -> None:
        binding = binding_of(module)
        if outer is not None and outer.snapshot.ended and binding is not None:
            outer = None
        self.module, self._binding, self._outer = module, binding, outer
        self._around = around()
        self._snapshot = Snapshot(self._around) if outer is None else outer.snapshot
        self._live: Readings = {}
        self._wanted: list[tuple[Variables, tuple[str, ...], Readings]] = []
        if outer is None:
            self._want(_bindings_in(module), self._snapshot.readings, live=False)
        elif binding is not None:
            self._want((binding,), self._snapshot.readings, live=False)
        if reads_live or (binding is not None and binding.has_program_options):
            outside = () if outer is None else (frame.binding for frame in outer.frames)
            self._want((*outside, *(() if binding is None else (binding,))), self._live, live=True)

    def _want(self, bindings: Iterable[Binding], readings: Readings, *, live: bool) -> None:
        wanted: dict[int, tuple[Variables, tuple[str, ...]]] = {}
        for binding in bindings:
            if binding.live is live:
                key = id(binding.ctx)
                before = wanted[key][1] if key in wanted else ()
                names = tuple(name for name in binding.names if (key, name) not in readings and name not in before)
                if names:
                    wanted[key] = binding.ctx, (*before, *names)
        self._wanted.extend((ctx, names, readings) for ctx, names in wanted.values())

    @property
    def is_outermost(self) -> bool:
        """Whether no call of a bound module is in progress."""
        return self._outer is None

    def read(self) -> None:
        """Read the variables, each context's as of one moment."""
        for ctx, names, readings in self._wanted:
            where = self._where(ctx)
            _take(ctx, run(where, reading(where, names)), readings)

    async def read_aio(self) -> None:
        """Do the same without blocking the event loop."""
        for ctx, names, readings in self._wanted:
            where = self._where(ctx)
            _take(ctx, await run_aio(where, reading(where, names)), readings)

    def _where(self, ctx: Variables) -> Variables:
        self._snapshot.contexts.append(ctx)
        return joined(ctx, self._around)

    def _scope(self) -> Scope:
        outer, module, binding = self._outer, self.module, self._binding
        frames: tuple[Frame, ...] = ()
        choices: Mapping[str, Choice] = {}
        live = self._live
        if outer is not None:
            frames, choices = outer.frames, outer.choices
            live = {**outer.live, **live} if live else outer.live
        for depth, frame in enumerate(frames):
            if id(module) in frame.targets:
                choices = _chosen(choices, frame.targets[id(module)], frame.binding, depth)
        if binding is not None and not (frames and frames[-1].module is module):
            targets = targets_of(binding, modules_in(module)) if binding.per else {}
            named = {option: Named(variable, module) for option, variable in binding.options.items()}
            choices = _chosen(choices, {**named, **targets.get(id(module), {})}, binding, len(frames))
            frames = (*frames, Frame(binding, module, targets))
        return Scope(module, frames, choices, self._snapshot, live, outer)

    def __enter__(self) -> Scope:
        scope = self._scope()
        others = None
        if scope.has_program_options:
            try:
                scope.attributes = choosing.attributes_in(scope)
                others = choosing.settings_in(scope)
            except BoundValueError as error:
                self._hide(error)
                raise
        self._token: Token[Any] = put(scope, others)
        return scope

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        thread_local_overrides.reset(self._token)
        if isinstance(error, BoundValueError):
            self._hide(error)
        if self._outer is None:
            self._snapshot.ended = True

    def _hide(self, error: BoundValueError) -> None:
        outer = {} if self._outer is None else self._outer.live
        for readings in (self._snapshot.readings, outer, self._live):
            hide(error, [(name, each) for (_, name), each in readings.items()])


def _bindings_in(program: Any) -> list[Binding]:
    """Return the bindings of a program and of the modules in it."""
    return [binding for _, module in modules_in(program) if (binding := binding_of(module)) is not None]


def _take(ctx: Variables, found: Mapping[str, Reading], readings: Readings) -> None:
    for name, each in found.items():
        # Of two modules that join a call at the same time, both use what was read first.
        readings.setdefault((id(ctx), name), each)


def _chosen(
    choices: Mapping[str, Choice], options: Mapping[str, Named], binding: Binding, depth: int
) -> dict[str, Choice]:
    """Return the choices after a binding has set options, unless a binding of a module further inside does."""
    chosen = dict(choices)
    for option, (variable, target) in options.items():
        before = chosen.get(option)
        if before is None or before.depth <= depth:
            chosen[option] = Choice(variable, target, binding, depth)
    return chosen


def targets_of(binding: Binding, modules: list[tuple[str, Any]]) -> dict[int, dict[str, Named]]:
    """Return what `per` says about each module of a program; the longest path that leads to it counts most."""
    targets: dict[int, dict[str, Named]] = {}
    by_path = dict(modules)
    paths = sorted((path for path in binding.per if path in by_path), key=len)
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
