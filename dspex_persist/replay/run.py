"""Run the tools of a recording again."""

import asyncio
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
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
from dspex_persist.replay.tools import RunAgain, refused_lm_calls, stand_ins_for, stood_in_for
from dspex_persist.state.errors import DerivationError, InvalidArgumentError, quote
from dspex_persist.state.globs import compile_glob
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import (
    REASON,
    RECORDING_ID,
    TRACE_ID,
    TRANSACTION,
    ExecutionStatus,
    Origin,
    ToolOutcome,
    without_reason,
)
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
"""Called with the number of executions replayed so far, and of all that are to be."""
Tools: TypeAlias = Mapping[str, ToolCode] | Sequence[object] | str
"""A toolbox, or the contents of one: tools, objects with tools, and references such as `--tools` accepts."""

_REPEATABLE: Final = (ExecutionStatus.COMMITTED, ExecutionStatus.FAILED)
_NOT_CALLED: Final = "it was not called this time"
_REAL_TIME: Final = ("_pytest", "grpc", "uvloop")
"""Modules that keep the real time, because they deal with the outside world."""
_LISTS_MORE: Final = ("dspex_persist", "dspex_persist.errors")
"""Modules whose `__dir__` lists names that are imported on first use."""


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
    """Run the tools of a recording again, on the recorded state and inputs, and report every difference.

    Nothing is written, except for side effects of the tools' own code. Each execution starts from the recorded state,
    even if the ones before it came out differently.

    Args:
        recording: The recording, or the path of one.
        tools: The tools' code. Calls of other tools repeat what was recorded.
        since: The first execution, by the number of the commit that began it or by its id; "" for the beginning. The
            numbers are those of the recording or, if it was read from a database, those of the database.
        until: The last execution, included; "" for the end.
        only_tools: The names of the tools to replay; all if empty.
        live_lm: Whether to call language models. Without it, their recorded responses are returned. With it, a response
            that differs from the recorded one is a divergence.
        freeze: Whether to start the process's clock at the recorded time of each execution, if freezegun is installed
            and `live_lm` is false. `ctx.now()` returns the recorded times in any case.
        limits: The limits on values and executions; the defaults if omitted.
        progress: Called with the number of executions replayed so far, and of all.

    Raises:
        RecordingError: It is not a recording, or it is damaged, or part of the session was pruned.
        InvalidArgumentError: A point or a tool does not exist in it, or no execution began in the range.
    """
    recorded = load(recording)
    roots = find_executions(recorded.commits)
    numbers = Numbers(recorded)
    chosen = _chosen(roots, numbers, since, until, frozenset(only_tools))
    rerun = _Rerun(recorded, Toolbox.of(tools), live_lm, limits or Limits(), chosen)
    replayed: list[ReplayedExecution] = []
    # Between executions, too: a thread that one of them left behind must not call a model.
    guard = nullcontext() if live_lm else refused_lm_calls()
    with guard, rerun.open(), _clock(freeze and not live_lm) as move_to:
        for done, root in enumerate(chosen):
            if progress is not None:
                progress(done, len(chosen))
            move_to(root.at)
            replayed.extend(map(numbers.renumber, rerun.run(root)))
    if progress is not None:
        progress(len(chosen), len(chosen))
    replayed.sort(key=lambda each: each.commit)
    divergences = tuple(divergence for each in replayed for divergence in each.divergences)
    return ReplayReport(recorded.header.session_id, "tools", len(recorded.commits), tuple(replayed), divergences)


def _chosen(
    roots: Sequence[RecordedExecution], numbers: Numbers, since: str | int, until: str | int, names: frozenset[str]
) -> list[RecordedExecution]:
    bounds = range_of(roots, numbers, since, until)
    known = {root.tool for root in roots}
    for name in sorted(names - known):
        reason = f"no execution of {quote(name)} was recorded; there are {', '.join(sorted(known)) or 'none'}"
        raise InvalidArgumentError("only_tools", reason)
    named = [root for root in roots if not names or root.tool in names]
    chosen = [root for root in named if bounds.has(numbers.shown(root.number))]
    if named and not chosen:
        first, last = numbers.shown(named[0].number), numbers.shown(named[-1].number)
        of_names = f" of {', '.join(map(quote, sorted(names)))}" if names else ""
        places = f"the first began with commit {first}, the last with commit {last}"
        reason = f"no execution{of_names} began in commits {bounds.first} to {bounds.last}: {places}"
        raise InvalidArgumentError("since" if str(since) else "until", reason)
    return chosen


@contextmanager
def _clock(wanted: bool) -> Iterator[Callable[[datetime], None]]:
    """Yield a function that sets the process's clock, if freezegun is installed and it is `wanted`.

    The clock ticks on from there, so that code that waits for a time comes to an end.
    """
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
    """Hide the names that our modules import lazily while freezegun reads every name in every module.

    Reading them would import all of the package, including gRPC.
    """
    ours = [vars(sys.modules[name]) for name in _LISTS_MORE]
    listings = [names.pop("__dir__", None) for names in ours]
    try:
        yield
    finally:
        for names, listing in zip(ours, listings, strict=True):
            if listing is not None:
                names["__dir__"] = listing


class _Rerun:
    """A recording, and a runner to replay it."""

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
        self._store = ReplayStore()
        self._tools: dict[str, ToolCode] = {
            name: RunAgain(tool, self._store, live_lm) for name, tool in toolbox.items()
        }
        self._running: tuple[ToolRunner, Invoker, asyncio.AbstractEventLoop | None] | None = None
        # Differences between LM calls that were reported, and of which execution.
        self._told: dict[tuple[str, ...], str] = {}

    @contextmanager
    def open(self) -> Iterator[None]:
        """Start the runner; `run` can be called inside the block."""
        registered = partial(RemoteTool, port=None, limits=self._limits)
        # Use an event loop on this thread unless one is running here already: passing each execution to another thread,
        # and its outcome back, would take as long as the rest of a short one.
        loop = None if is_on_loop() else asyncio.SelectorEventLoop()
        home = Home(loop)
        invoker = Invoker(home, TOOL_THREADS, self._limits)
        runner = ToolRunner(self._store, home, {}, registered=registered, limits=self._limits)
        self._running = runner, invoker, loop
        try:
            yield
        finally:
            self._store.run = self._running = None
            runner.drain()
            home.close()
            if loop is not None:
                end_loop(loop)
            invoker.close()

    def run(self, root: RecordedExecution) -> Iterator[ReplayedExecution]:
        """Run an execution again with everything that it calls, and yield the outcome of each."""
        reason = _why_not(root, self._tools)
        if reason:
            yield from (_replayed(each, ReplayOutcome.SKIPPED, reason) for each in root.tree())
            return
        self._past.forget(root.number)
        run = ReplayRun(root, self._past, self._limits)
        if _reads_masked(root, run) or any(each.has_masked for each in stood_in_for(root, self._tools)):
            reason = "it reads a variable whose values were kept out of the recording"
            yield from (_replayed(each, ReplayOutcome.SKIPPED, reason) for each in root.tree())
            return
        if any(each.has_masked_calls for each in root.tree()):
            reason = "its LM calls quote values of variables that were kept out of the recording"
            yield from (_replayed(each, ReplayOutcome.SKIPPED, reason) for each in root.tree())
            return
        outcome = self._play(root, run)
        if run.root is None:
            yield _refused(root, outcome)
            yield from (_replayed(each, ReplayOutcome.SKIPPED, _NOT_CALLED) for each in root.tree() if each is not root)
        else:
            yield from map(self._briefly, _compared(root, run))

    def _briefly(self, replayed: ReplayedExecution) -> ReplayedExecution:
        """Return an execution without differences of its LM calls that an earlier one has had: of a prompt, usually."""
        divergences = tuple(map(self._told_once, replayed.divergences))
        return replayed if divergences == replayed.divergences else replace(replayed, divergences=divergences)

    def _told_once(self, divergence: Divergence) -> Divergence:
        if divergence.what is not Aspect.LM or not divergence.diff:
            return divergence
        changed = tuple(line for line in divergence.diff if line[:1] in ("+", "-"))
        earlier = self._told.setdefault(changed, divergence.execution_id)
        if earlier == divergence.execution_id:
            return divergence
        return replace(divergence, summary=f"{divergence.summary}; it differs as in {earlier}", diff=())

    def _play(self, root: RecordedExecution, run: ReplayRun) -> ToolOutcome:
        assert self._running is not None, "call it inside `open`"
        runner, invoker, loop = self._running
        self._store.run = run
        tools = self._tools | stand_ins_for(root, self._tools, self._store)
        runner.catalog.own = local_tools(tools, invoker)
        request = ToolRequest(
            run.state.session.id,
            root.tool,
            root.parameters,
            Origin(root.actor, root.cause, reason=root.metadata.get(REASON)),
            {key: text for key, text in without_reason(root.metadata).items() if key != TRACE_ID},
            timeout_s=TOOL_TIMEOUT_S,
        )
        with clock.reading(run.now):
            if loop is None:
                return runner.submit(request).result()
            return loop.run_until_complete(runner.execute(request))


def _why_not(root: RecordedExecution, tools: Collection[str]) -> str:
    """The reason why an execution cannot be run again; "" if it can."""
    if root.tool == TRANSACTION and TRANSACTION not in tools:
        return "it was a transaction of a client, whose code is not among the tools"
    if RECORDING_ID in root.metadata and not root.lm_calls:
        return "a client recorded in it what its own code did, which is not a tool"
    if RECORDING_ID in root.metadata:
        return "it recorded the LM calls of a program, which is not a tool: play them back (docs/lm-calls.md)"
    if not root.ended:
        return "it had not ended when the recording was made"
    if root.worker_id:
        return f"it ran in another process, in worker {root.worker_id}"
    if root.status not in _REPEATABLE:
        return f"it ended as {root.status.value.replace('_', ' ')}, which depends on other callers"
    if root.failure is not None and root.failure.type == DerivationError.__name__:
        return "a derived variable refused what it wrote, and its function is not in the recording"
    return ""


def _reads_masked(root: RecordedExecution, run: ReplayRun) -> bool:
    if not run.masked:
        return False
    masked = {variable.id: variable.name for variable in run.state.variables.values() if variable.id in run.masked}
    for execution in root.tree():
        end = execution.end
        if end is None:
            continue
        if any(seen is not None and seen.variable_id in masked for seen in end.reads.values()):
            return True
        if any(not pattern or any(map(compile_glob(pattern), masked.values())) for pattern in end.patterns):
            return True
    return False


def _replayed(
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
    """The outcome of an execution that could not begin: its tool is missing, or takes other parameters."""
    summary = "it is refused before it begins, and was not when it was recorded"
    diff = (f"+{type(outcome.error).__name__}: {outcome.error}",)
    return _replayed(root, ReplayOutcome.DIVERGED, "", (Divergence(Aspect.ERROR, summary, root.number, root.id, diff),))


def _compared(root: RecordedExecution, run: ReplayRun) -> Iterator[ReplayedExecution]:
    whole = not any(call.from_recording for call in run.calls.values())
    stood_in: set[str] = set()
    for execution in root.tree():
        call = run.calls.get(execution.id)
        if execution.parent_id in stood_in:
            stood_in.add(execution.id)
            yield _replayed(execution, ReplayOutcome.SKIPPED, "its caller was not run again")
        elif call is None:
            yield _replayed(execution, ReplayOutcome.SKIPPED, _NOT_CALLED)
        elif call.from_recording:
            stood_in.add(execution.id)
            where = f"it ran in worker {execution.worker_id}" if execution.worker_id else "its code is not here"
            yield _replayed(execution, ReplayOutcome.SKIPPED, f"{where}: what it did was taken from the recording")
        else:
            divergences = tuple(compare(call, run.names, whole and execution is root))
            outcome = ReplayOutcome.DIVERGED if divergences else ReplayOutcome.SAME
            yield _replayed(execution, outcome, "", divergences)
