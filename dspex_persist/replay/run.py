"""Running the tools of a recording again."""

import asyncio
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import datetime
from functools import partial
from typing import Final, TypeAlias

from dspex_persist import clock
from dspex_persist.cognitive.toolbox import Toolbox
from dspex_persist.infra.threads import end_loop, is_on_loop
from dspex_persist.replay.compare import compare
from dspex_persist.replay.execution import ReplayRun, ReplayStore
from dspex_persist.replay.numbers import Numbers, range_of
from dspex_persist.replay.rebuild import Past
from dspex_persist.replay.recorded import RecordedExecution, Recording, Source, find_executions, load
from dspex_persist.replay.report import Aspect, Divergence, ReplayedExecution, ReplayOutcome, ReplayReport
from dspex_persist.replay.tools import RunAgain, in_place_of, no_lm_asked, stand_ins_for
from dspex_persist.state.commands.globs import compile_glob
from dspex_persist.state.errors import InvalidArgumentError, quote
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import ExecutionStatus, Origin, ToolOutcome
from dspex_persist.state.provider import TOOL_TIMEOUT_S
from dspex_persist.state.tools.home import Home
from dspex_persist.state.tools.invoke import Invoker
from dspex_persist.state.tools.local import local_tools
from dspex_persist.state.tools.ports import ToolCode
from dspex_persist.state.tools.remote import RemoteTool
from dspex_persist.state.tools.requests import ToolRequest
from dspex_persist.state.tools.runner import ToolRunner
from dspex_persist.state.tools.with_tools import TOOL_THREADS

Progress: TypeAlias = Callable[[int, int], None]
"""Told how many executions are done, of how many."""
Tools: TypeAlias = Mapping[str, ToolCode] | Sequence[object] | str
"""A toolbox, or what is to be in one: tools, instances that have some, and what `--tools` takes."""

_REPEATABLE: Final = (ExecutionStatus.COMMITTED, ExecutionStatus.FAILED)
_NOT_CALLED: Final = "it was not called this time"
_REAL_TIME: Final = ("_pytest", "grpc", "uvloop")
"""Modules that work with the world outside, where the time is what it is."""
_LISTS_MORE: Final = ("dspex_persist", "dspex_persist.errors")
"""Modules whose `__dir__` has names that are imported when they are asked for."""


def replay(
    recording: Source,
    tools: Tools,
    *,
    since: str | int = "",
    until: str | int = "",
    only_tools: Iterable[str] = (),
    live_lm: bool = False,
    freeze: bool = True,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> ReplayReport:
    """Run the tools of a recording again, on the recorded state with what was recorded; what came out differently.

    Nothing is written anywhere, except by what the tools' code does besides. An execution stands on the state that was
    recorded, whatever became of those before it. `since` and `until` say which, by commits of the recording or ids of
    executions, both included; `only_tools` are the names of those tools that are to run. Commits and executions have
    the numbers of the recording; where it was read from a database, as `record` does, those of the database.

    Language models are not asked: their recorded answers are played back. With `live_lm` they are asked, and what they
    answer otherwise is a divergence. Where freezegun is installed, `freeze` has the process's clock begin each
    execution at its recorded time; `ctx.now()` needs none of that.

    Raises `RecordingError` for what is no recording, `InvalidArgumentError` for points and names that it does not have,
    and for those between which no execution began.
    """
    recorded = load(recording)
    roots = find_executions(recorded.commits)
    numbers = Numbers(recorded)
    chosen = _chosen(roots, numbers, since, until, frozenset(only_tools))
    rerun = _Rerun(recorded, Toolbox.of(tools), live_lm, limits or Limits(), chosen)
    told: list[ReplayedExecution] = []
    # Between executions, too: a thread that one of them has left behind asks nobody.
    guard = nullcontext() if live_lm else no_lm_asked()
    with guard, rerun.open(), _clock(freeze and not live_lm) as move_to:
        for done, root in enumerate(chosen):
            if progress is not None:
                progress(done, len(chosen))
            move_to(root.at)
            told.extend(map(numbers.told, rerun.run(root)))
    if progress is not None:
        progress(len(chosen), len(chosen))
    told.sort(key=lambda each: each.commit)
    divergences = tuple(divergence for each in told for divergence in each.divergences)
    return ReplayReport(recorded.header.session_id, "tools", len(recorded.commits), tuple(told), divergences)


def _chosen(
    roots: Sequence[RecordedExecution], numbers: Numbers, since: str | int, until: str | int, names: frozenset[str]
) -> list[RecordedExecution]:
    meant = range_of(roots, numbers, since, until)
    known = {root.tool for root in roots}
    for name in sorted(names - known):
        reason = f"no execution of {quote(name)} was recorded; there are {', '.join(sorted(known)) or 'none'}"
        raise InvalidArgumentError("only_tools", reason)
    named = [root for root in roots if not names or root.tool in names]
    chosen = [root for root in named if meant.has(numbers.shown(root.number))]
    if named and not chosen:
        first, last = numbers.shown(named[0].number), numbers.shown(named[-1].number)
        of_names = f" of {', '.join(map(quote, sorted(names)))}" if names else ""
        reason = f"no execution{of_names} began in commits {meant.first} to {meant.last}: the first began with commit "
        raise InvalidArgumentError("since" if str(since) else "until", f"{reason}{first}, the last with commit {last}")
    return chosen


@contextmanager
def _clock(wanted: bool) -> Iterator[Callable[[datetime], None]]:
    """What sets the process's clock, if it can be set. It goes on from there: code that waits must come to an end."""
    try:
        from freezegun import freeze_time
    except ImportError:
        wanted = False
    if not wanted:
        yield lambda _moment: None
        return
    freezing = freeze_time(tick=True, real_asyncio=True, ignore=list(_REAL_TIME))
    with _listing_what_is_loaded():
        frozen = freezing.start()
    try:
        yield frozen.move_to
    finally:
        freezing.stop()


@contextmanager
def _listing_what_is_loaded() -> Iterator[None]:
    """While freezegun asks every module for all that it lists: ours list what they would import only then, gRPC too."""
    ours = [vars(sys.modules[name]) for name in _LISTS_MORE]
    listings = [names.pop("__dir__", None) for names in ours]
    try:
        yield
    finally:
        for names, listing in zip(ours, listings, strict=True):
            if listing is not None:
                names["__dir__"] = listing


class _Rerun:
    """A recording with a runner over it."""

    def __init__(
        self,
        recording: Recording,
        toolbox: Mapping[str, ToolCode],
        live_lm: bool,
        limits: Limits,
        chosen: Sequence[RecordedExecution],
    ) -> None:
        bases = (number - 1 for root in chosen for each in root.tree() for _, number in each.published)
        self._past = Past(recording.commits, {*bases, *(root.number for root in chosen)})
        self._limits = limits
        self._stage = ReplayStore()
        self._tools: dict[str, ToolCode] = {
            name: RunAgain(tool, self._stage, live_lm) for name, tool in toolbox.items()
        }
        self._running: tuple[ToolRunner, Invoker, asyncio.AbstractEventLoop | None] | None = None

    @contextmanager
    def open(self) -> Iterator[None]:
        """While it is open, `run` can be called."""
        registered = partial(RemoteTool, port=None, limits=self._limits)
        # On this very thread, which has nothing else to do, unless a loop runs there already: to hand each execution
        # over to another thread, and its outcome back, takes as long as the rest of a short one.
        loop = None if is_on_loop() else asyncio.SelectorEventLoop()
        home = Home(loop)
        invoker = Invoker(home, TOOL_THREADS, self._limits)
        runner = ToolRunner(self._stage, home, {}, registered=registered, limits=self._limits)
        self._running = runner, invoker, loop
        try:
            yield
        finally:
            self._stage.take = self._running = None
            runner.drain()
            home.close()
            if loop is not None:
                end_loop(loop)
            invoker.close()

    def run(self, root: RecordedExecution) -> Iterator[ReplayedExecution]:
        """Run an execution again with all that it called; what became of each."""
        reason = _why_not(root)
        if reason:
            yield from (_told(each, ReplayOutcome.SKIPPED, reason) for each in root.tree())
            return
        self._past.forget(root.number)
        take = ReplayRun(root, self._past, self._limits)
        if _reads_masked(root, take) or any(each.has_masked for each in in_place_of(root, self._tools)):
            reason = "it reads a variable whose values were kept out of the recording"
            yield from (_told(each, ReplayOutcome.SKIPPED, reason) for each in root.tree())
            return
        outcome = self._play(root, take)
        if take.root is None:
            yield _refused(root, outcome)
            yield from (_told(each, ReplayOutcome.SKIPPED, _NOT_CALLED) for each in root.tree() if each is not root)
        else:
            yield from _compared(root, take)

    def _play(self, root: RecordedExecution, take: ReplayRun) -> ToolOutcome:
        assert self._running is not None, "it is open"
        runner, invoker, loop = self._running
        self._stage.take = take
        tools = self._tools | stand_ins_for(root, self._tools, self._stage)
        runner.tools = local_tools(tools, invoker)
        request = ToolRequest(
            take.state.session.id,
            root.tool,
            root.parameters,
            Origin(root.actor, root.cause),
            root.metadata,
            timeout_s=TOOL_TIMEOUT_S,
        )
        with clock.reading(take.now):
            if loop is None:
                return runner.submit(request).result()
            return loop.run_until_complete(runner.execute(request))


def _why_not(root: RecordedExecution) -> str:
    """Why an execution cannot be run again; "" if it can."""
    if not root.ended:
        return "it had not ended when the recording was made"
    if root.worker_id:
        return f"it ran in another process, in worker {root.worker_id}"
    if root.status not in _REPEATABLE:
        return f"it ended as {root.status.value.replace('_', ' ')}, which depends on others"
    return ""


def _reads_masked(root: RecordedExecution, take: ReplayRun) -> bool:
    if not take.masked:
        return False
    masked = {variable.id: variable.name for variable in take.state.variables.values() if variable.id in take.masked}
    for execution in root.tree():
        end = execution.end
        if end is None:
            continue
        if any(seen is not None and seen.variable_id in masked for seen in end.reads.values()):
            return True
        if any(not pattern or any(map(compile_glob(pattern), masked.values())) for pattern in end.patterns):
            return True
    return False


def _told(
    execution: RecordedExecution, outcome: ReplayOutcome, reason: str = "", divergences: tuple[Divergence, ...] = ()
) -> ReplayedExecution:
    return ReplayedExecution(
        execution.id,
        execution.tool,
        execution.number,
        execution.attempt,
        execution.parent_id,
        execution.status.value,
        outcome,
        reason,
        divergences,
    )


def _refused(root: RecordedExecution, outcome: ToolOutcome) -> ReplayedExecution:
    """It could not even begin: there is no such tool any more, or it takes other parameters."""
    summary = "it is refused before it begins, and was not when it was recorded"
    diff = (f"+{type(outcome.error).__name__}: {outcome.error}",)
    return _told(root, ReplayOutcome.DIVERGED, "", (Divergence(Aspect.ERROR, summary, root.number, root.id, diff),))


def _compared(root: RecordedExecution, take: ReplayRun) -> Iterator[ReplayedExecution]:
    whole = not any(played.from_recording for played in take.played.values())
    stood_in: set[str] = set()
    for execution in root.tree():
        played = take.played.get(execution.id)
        if execution.parent_id in stood_in:
            stood_in.add(execution.id)
            yield _told(execution, ReplayOutcome.SKIPPED, "it was called by one that was not run again")
        elif played is None:
            yield _told(execution, ReplayOutcome.SKIPPED, _NOT_CALLED)
        elif played.from_recording:
            stood_in.add(execution.id)
            where = f"it ran in worker {execution.worker_id}" if execution.worker_id else "its code is not here"
            yield _told(execution, ReplayOutcome.SKIPPED, f"{where}: what it did was taken from the recording")
        else:
            found = tuple(compare(played, take.names, whole and execution is root))
            yield _told(execution, ReplayOutcome.DIVERGED if found else ReplayOutcome.SAME, "", found)
