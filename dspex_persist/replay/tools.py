"""The tools of a replay: some run their code again, others are stand-ins that repeat what was recorded."""

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
from dspex_persist.state.model import REASON, ChangeKind, Failure, ToolSpec, Value, without_reason
from dspex_persist.state.recording import RecordedVersion
from dspex_persist.state.tools.ports import ToolCode, ToolKind
from dspex_persist.state.tools.session import ToolSession


class RunAgain:
    """Runs a tool's code, with the recorded attempt number and, from `ctx.now()`, the recorded times.

    Its language model calls return the recorded responses or, with `live_lm`, ask the model.
    """

    def __init__(self, tool: ToolCode, store: ReplayStore, live_lm: bool) -> None:
        # A conflict is a difference to report, not a reason to retry.
        self.spec = replace(tool.spec, retries=0)
        self.kind = tool.kind
        self.reads_plainly = tool.reads_plainly
        self.result_type = tool.result_type
        self._tool = tool
        self._store = store
        self._live_lm = live_lm

    def bind(self, parameters: Mapping[str, Value], limits: Limits) -> Mapping[str, object]:
        """Bind the parameters as the tool does."""
        return self._tool.bind(parameters, limits)

    def start(self, session: ToolSession, arguments: Mapping[str, object]) -> Any:
        """Call the tool's code."""
        run = self._store.current
        call = run.calls[session.execution_id]
        session.attempt = call.recorded.attempt if call.recorded is not None else 1
        session.read_clock = run.times_of(session.execution_id)
        match self.kind:
            case ToolKind.FUNCTION:
                with self._playing(call):
                    return self._tool.start(session, arguments)
            case ToolKind.COROUTINE:
                return self._await(call, session, arguments)
            case ToolKind.GENERATOR:
                return self._generate(call, session, arguments)
        return self._generate_later(call, session, arguments)

    async def _await(self, call: ReplayedCall, session: ToolSession, arguments: Mapping[str, object]) -> Any:
        with self._playing(call):
            return await self._tool.start(session, arguments)

    def _generate(self, call: ReplayedCall, session: ToolSession, arguments: Mapping[str, object]) -> Iterator[Any]:
        with self._playing(call), closing(self._tool.start(session, arguments)) as started:
            yield from started

    async def _generate_later(
        self, call: ReplayedCall, session: ToolSession, arguments: Mapping[str, object]
    ) -> AsyncIterator[Any]:
        with self._playing(call):
            async with aclosing(self._tool.start(session, arguments)) as started:
                async for chunk in started:
                    yield chunk

    @contextmanager
    def _playing(self, call: ReplayedCall) -> Iterator[None]:
        """Answer language model calls from the recording, and collect the differences."""
        if not _may_call_a_model(call):
            yield from self._refusing(call)
            return
        from dspex_persist.cognitive.dspy import playing

        calls = call.recorded.lm_calls if call.recorded is not None else ()
        with playing(calls, live=self._live_lm) as playback:
            # The list is filled while the block runs, and compared after it.
            call.lm = playback.divergences
            yield

    def _refusing(self, call: ReplayedCall) -> Iterator[None]:
        """Refuse language model calls: the tool's code may still import DSPy."""
        if self._live_lm:
            yield
            return
        with refused_lm_calls() as refusal:
            call.lm = refusal.divergences
            yield


def refused_lm_calls() -> AbstractContextManager[Refusal]:
    """Return a context in which LM calls that belong to no known execution are refused."""

    def install_hooks() -> None:
        # Not from the package, whose import may be what imports DSPy.
        from dspex_persist.cognitive.dspy.hook import install

        install()

    return refusing(install_hooks)


def _may_call_a_model(call: ReplayedCall) -> bool:
    """Whether to import DSPy, which takes seconds: if it is imported already, or if calls were recorded."""
    return "dspy" in sys.modules or bool(call.recorded is not None and call.recorded.lm_calls)


class StandIn:
    """Takes the place of a tool whose code is not available or ran in a worker: repeats what it did when recorded."""

    kind = ToolKind.FUNCTION
    reads_plainly = True
    result_type = ""

    def __init__(self, name: str, store: ReplayStore) -> None:
        self.spec = ToolSpec(name)
        self._store = store

    def bind(self, parameters: Mapping[str, Value], limits: Limits) -> Mapping[str, object]:
        """Accept any parameters."""
        return {}

    def start(self, session: ToolSession, arguments: Mapping[str, object]) -> Any:
        """Repeat the recorded writes, then return the recorded result or raise the recorded error."""
        call = self._store.current.calls[session.execution_id]
        if call.recorded is None:
            hint = "its code is not here, and the recording has no other call of it"
            raise errors.ToolNotFoundError(self.spec.name, hint)
        call.from_recording = True
        for execution in call.recorded.tree():
            self._publish(session, execution)
        written = [version for each in call.recorded.tree() for version in each.written]
        # Write each variable in the order of its versions, whichever execution of the tree wrote them.
        for version in sorted(written, key=lambda each: each.version):
            command = _repeating(session.session_id, version, call.recorded)
            origin = replace(session.origin, source=version.source, reason=version.metadata.get(REASON))
            session.execution.run(command, origin)
        if call.recorded.failure is not None:
            raise exception_like(call.recorded.failure)
        result = call.recorded.result
        return values.decode_loosely(result) if result is not None else None

    def _publish(self, session: ToolSession, execution: RecordedExecution) -> None:
        for version, _ in execution.published:
            assert version.value is not None, "a published version has a value"
            metadata, origin = without_reason(version.metadata), session.origin
            command = commands.PublishVariable(
                session.session_id, session.execution_id, version.name, version.value, metadata
            )
            origin = replace(origin, reason=version.metadata.get(REASON))
            session.execution.take_published(self._store.submit(command, origin).result())


def _repeating(session_id: str, version: RecordedVersion, execution: RecordedExecution) -> Command[Any]:
    """The command that creates such a version."""
    name, value, metadata = version.name, version.value, without_reason(version.metadata)
    match version.kind:
        case ChangeKind.DELETED:
            return commands.DeleteVariable(session_id, name)
        case ChangeKind.ROLLED_BACK:
            return commands.RollbackVariable(session_id, name, int(metadata["rolled_back_to"]))
        case ChangeKind.LOCK_BROKEN:
            return commands.StopOptimization(session_id, name, force=True)
    assert value is not None, "only a deletion has no value"
    if version.kind is ChangeKind.REGISTERED:
        facts = _registered(version.variable_id, execution)
        return commands.RegisterVariable(session_id, name, facts.type, value, facts.constraints, metadata)
    return commands.SetVariable(session_id, name, value, metadata)


def _registered(variable_id: str, execution: RecordedExecution) -> VariableRegistered:
    events = (event for event in execution.events if isinstance(event, VariableRegistered))
    return next(event for event in events if event.variable_id == variable_id)


def exception_like(failure: Failure) -> Exception:
    """Return an exception with the recorded type name and message.

    If Python or this package has an exception type of that name, the exception is an instance of it.
    """
    known = getattr(builtins, failure.type, None) or getattr(errors, failure.type, None)
    base = known if isinstance(known, type) and issubclass(known, Exception) else Exception
    if issubclass(base, BaseExceptionGroup):
        # An exception group cannot be created without exceptions, which are not recorded.
        base = Exception
    kind = type(failure.type, (base,), {"__init__": lambda _: None, "__str__": lambda _: failure.message})
    error: Exception = kind()
    return error


def stood_in_for(recorded: RecordedExecution, tools: Mapping[str, ToolCode]) -> Iterator[RecordedExecution]:
    """Return the executions that this one called and that cannot run again."""
    called = (each for child in recorded.children for each in child.tree())
    return (each for each in called if each.worker_id or each.tool not in tools)


def stand_ins_for(
    recorded: RecordedExecution, tools: Mapping[str, ToolCode], store: ReplayStore
) -> dict[str, ToolCode]:
    """Return stand-ins for the tools that this execution called and that cannot run again."""
    names = {each.tool for each in stood_in_for(recorded, tools)} - {recorded.tool}
    return {name: StandIn(name, store) for name in names}
