"""The tools of a replay: those whose code runs again, and those that do what was recorded instead."""

import builtins
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractContextManager, aclosing, closing, contextmanager
from dataclasses import replace
from typing import Any

from dspex_persist.cognitive.lm_guard import Refusal, refusing
from dspex_persist.replay.execution import ReplayedCall, ReplayStore
from dspex_persist.replay.recorded import RecordedExecution
from dspex_persist.state import commands, errors, values
from dspex_persist.state.commands import Command
from dspex_persist.state.events import VariableRegistered
from dspex_persist.state.limits import Limits
from dspex_persist.state.model import ChangeKind, Failure, ToolSpec, Value
from dspex_persist.state.recording import RecordedVersion
from dspex_persist.state.tools.ports import ToolCode, ToolKind
from dspex_persist.state.tools.session import ToolSession


class RunAgain:
    """A tool whose own code runs, with the recorded attempt, and the recorded times where it asks for the time.

    Where it asks a language model it is given the recorded answer or, with `live_lm`, what the model says today.
    """

    def __init__(self, tool: ToolCode, stage: ReplayStore, live_lm: bool) -> None:
        # What would have ended as a conflict is to be told, not tried again.
        self.spec = replace(tool.spec, retries=0)
        self.kind = tool.kind
        self.reads_plainly = tool.reads_plainly
        self.result_type = tool.result_type
        self._tool = tool
        self._stage = stage
        self._live_lm = live_lm

    def bind(self, parameters: Mapping[str, Value], limits: Limits) -> Mapping[str, object]:
        """As the tool itself does."""
        return self._tool.bind(parameters, limits)

    def start(self, session: ToolSession, arguments: Mapping[str, object]) -> Any:
        """Call the tool's code."""
        take = self._stage.current
        played = take.played[session.execution_id]
        session.attempt = played.recorded.attempt if played.recorded is not None else 1
        session.read_clock = take.times_of(session.execution_id)
        match self.kind:
            case ToolKind.FUNCTION:
                with self._playing(played):
                    return self._tool.start(session, arguments)
            case ToolKind.COROUTINE:
                return self._await(played, session, arguments)
            case ToolKind.GENERATOR:
                return self._generate(played, session, arguments)
        return self._generate_later(played, session, arguments)

    async def _await(self, played: ReplayedCall, session: ToolSession, arguments: Mapping[str, object]) -> Any:
        with self._playing(played):
            return await self._tool.start(session, arguments)

    def _generate(self, played: ReplayedCall, session: ToolSession, arguments: Mapping[str, object]) -> Iterator[Any]:
        with self._playing(played), closing(self._tool.start(session, arguments)) as started:
            yield from started

    async def _generate_later(
        self, played: ReplayedCall, session: ToolSession, arguments: Mapping[str, object]
    ) -> AsyncIterator[Any]:
        with self._playing(played):
            async with aclosing(self._tool.start(session, arguments)) as started:
                async for chunk in started:
                    yield chunk

    @contextmanager
    def _playing(self, played: ReplayedCall) -> Iterator[None]:
        """Have calls of language models answered from the recording, and what differs kept."""
        if not _may_ask_a_model(played):
            yield from self._refusing(played)
            return
        from dspex_persist.cognitive.dspy import playing

        calls = played.recorded.lm_calls if played.recorded is not None else ()
        with playing(calls, live=self._live_lm) as playback:
            # It is complete when the block has ended, and looked at later.
            played.lm = playback.divergences
            yield

    def _refusing(self, played: ReplayedCall) -> Iterator[None]:
        """The code may still come to import DSPy."""
        if self._live_lm:
            yield
            return
        with no_lm_asked() as refusal:
            played.lm = refusal.divergences
            yield


def no_lm_asked() -> AbstractContextManager[Refusal]:
    """Have LM calls of which nobody can say whose they are refused, while it is open."""

    def install() -> None:
        from dspex_persist.cognitive import dspy

        dspy.install()

    return refusing(install)


def _may_ask_a_model(played: ReplayedCall) -> bool:
    """Importing DSPy takes seconds: only where there is something to play back, or where the code may have it."""
    return "dspy" in sys.modules or bool(played.recorded is not None and played.recorded.lm_calls)


class StandIn:
    """In place of a tool that is not at hand, or that ran in another process: what it did then is done again."""

    kind = ToolKind.FUNCTION
    reads_plainly = True
    result_type = ""

    def __init__(self, name: str, stage: ReplayStore) -> None:
        self.spec = ToolSpec(name)
        self._stage = stage

    def bind(self, parameters: Mapping[str, Value], limits: Limits) -> Mapping[str, object]:
        """Whatever it is called with."""
        return {}

    def start(self, session: ToolSession, arguments: Mapping[str, object]) -> Any:
        """Write what was written, then return what was returned, or raise what was raised."""
        played = self._stage.current.played[session.execution_id]
        if played.recorded is None:
            hint = "its code is not here, and there is no other call of it in the recording"
            raise errors.ToolNotFoundError(self.spec.name, hint)
        played.from_recording = True
        for execution in played.recorded.tree():
            self._publish(session, execution)
        written = [version for each in played.recorded.tree() for version in each.written]
        # Of each variable in the order of its versions, whoever of them wrote it.
        for version in sorted(written, key=lambda each: each.version):
            command = _repeating(session.session_id, version, played.recorded)
            session.execution.run(command, replace(session.origin, source=version.source))
        if played.recorded.failure is not None:
            raise exception_like(played.recorded.failure)
        result = played.recorded.result
        return values.decode_loosely(result) if result is not None else None

    def _publish(self, session: ToolSession, execution: RecordedExecution) -> None:
        for version, _ in execution.published:
            assert version.value is not None, "a published version has a value"
            command = commands.PublishVariable(
                session.session_id, session.execution_id, version.name, version.value, version.metadata
            )
            session.execution.take_published(self._stage.submit(command, session.origin).result())


def _repeating(session_id: str, version: RecordedVersion, execution: RecordedExecution) -> Command[Any]:
    """The command that makes such a version."""
    name, value = version.name, version.value
    match version.kind:
        case ChangeKind.DELETED:
            return commands.DeleteVariable(session_id, name)
        case ChangeKind.ROLLED_BACK:
            return commands.RollbackVariable(session_id, name, int(version.metadata["rolled_back_to"]))
        case ChangeKind.LOCK_BROKEN:
            return commands.StopOptimization(session_id, name, force=True)
    assert value is not None, "only a deletion has no value"
    if version.kind is ChangeKind.REGISTERED:
        facts = _registered(version.variable_id, execution)
        return commands.RegisterVariable(session_id, name, facts.type, value, facts.constraints, version.metadata)
    return commands.SetVariable(session_id, name, value, version.metadata)


def _registered(variable_id: str, execution: RecordedExecution) -> VariableRegistered:
    events = (event for event in execution.events if isinstance(event, VariableRegistered))
    return next(event for event in events if event.variable_id == variable_id)


def exception_like(failure: Failure) -> Exception:
    """An exception of the type that was recorded, by name, if it is one of Python's or of this package's; else one
    that is called so. Its text is the recorded one."""
    known = getattr(builtins, failure.type, None) or getattr(errors, failure.type, None)
    base = known if isinstance(known, type) and issubclass(known, Exception) else Exception
    if issubclass(base, BaseExceptionGroup):
        # None can be made without the errors that were in it.
        base = Exception
    made = type(failure.type, (base,), {"__init__": lambda _: None, "__str__": lambda _: failure.message})
    error: Exception = made()
    return error


def in_place_of(recorded: RecordedExecution, tools: Mapping[str, ToolCode]) -> Iterator[RecordedExecution]:
    """What an execution called that cannot run again."""
    called = (each for child in recorded.children for each in child.tree())
    return (each for each in called if each.worker_id or each.tool not in tools)


def stand_ins_for(
    recorded: RecordedExecution, tools: Mapping[str, ToolCode], stage: ReplayStore
) -> dict[str, ToolCode]:
    """Stand-ins for what an execution called that cannot run again."""
    names = {each.tool for each in in_place_of(recorded, tools)} - {recorded.tool}
    return {name: StandIn(name, stage) for name in names}
