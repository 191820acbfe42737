"""How the commands on programs read and write them: on a running server or an open file, or in a file's history."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

from dspex_persist.cli.live.get import is_sensitive
from dspex_persist.cli.live.opening import state_of
from dspex_persist.cognitive.steps import Asked, Runs, Step, Work, run_work, run_work_aio
from dspex_persist.state import commands
from dspex_persist.state.audit import HistoryQuery
from dspex_persist.state.errors import InvalidArgumentError, UnsupportedError, VariableNotFoundError
from dspex_persist.state.globs import compile_glob

if TYPE_CHECKING:
    from dspex_persist.state.audit import AuditSource, HistoryEntry, VariableState
    from dspex_persist.wiring.databases import ReadsSessions


class OfState(Runs):
    """The session on an engine, or on a server."""

    def __init__(self, state: "ReadsSessions", *, reveal: bool) -> None:
        self._state = state
        self._reveal = reveal

    def _run_step(self, step: Step) -> Any:
        """See `Runs`."""
        if isinstance(step, Work):
            return run_work(step)
        if isinstance(step, Asked):
            terms = step.terms
            return self._state.run(step.command, terms.idempotency_key, actor=terms.actor, reason=terms.reason)
        result: Any = self._state.run(step)
        if self._reveal:
            return result
        if isinstance(step, commands.ListVariables):
            return [each for each in result if not is_sensitive(each.metadata)]
        if isinstance(step, commands.GetVariables):
            for name, variable in result.variables.items():
                if is_sensitive(variable.metadata):
                    raise _hidden(name)
        return result

    async def _run_step_aio(self, step: Step) -> Any:
        """See `Runs`."""
        return await run_work_aio(step) if isinstance(step, Work) else self._run_step(step)


@dataclass(frozen=True, slots=True)
class _Found:
    """What `GetVariables` returns."""

    variables: "Mapping[str, VariableState]"
    missing: Sequence[str] = field(default=())


class OfHistory(Runs):
    """The session in the history of a file, which can be read while a server has it open."""

    def __init__(self, source: "AuditSource", session: str) -> None:
        self._source = source
        self._session = session

    @cached_property
    def _variables(self) -> "Mapping[str, VariableState]":
        return {each.name: each for each in state_of(self._source, self._session)}

    def _run_step(self, step: Step) -> Any:
        """See `Runs`."""
        if isinstance(step, Work):
            return run_work(step)
        command = step.command if isinstance(step, Asked) else step
        if isinstance(command, commands.ListVariables):
            matches = compile_glob(command.pattern)
            return [each for name, each in self._variables.items() if matches(name) and not each.masked]
        if isinstance(command, commands.GetVariables):
            found = {name: self._variables[name] for name in command.identifiers if name in self._variables}
            for name, each in found.items():
                if each.masked:
                    raise _hidden(name)
            return _Found(found, [name for name in command.identifiers if name not in found])
        if isinstance(command, commands.GetVariableHistory):
            return self._history(command)
        raise UnsupportedError(f"{type(command).__name__} in the history of a file")

    async def _run_step_aio(self, step: Step) -> Any:
        """See `Runs`."""
        return await run_work_aio(step) if isinstance(step, Work) else self._run_step(step)

    def _history(self, command: commands.GetVariableHistory) -> "list[HistoryEntry]":
        name, before = command.identifier, command.before
        query = HistoryQuery(session=self._session, variable=name, newest_first=True)
        entries = (each for each in self._source.iterate(query) if each.name == name)
        first = next(entries, None)
        if first is None:
            raise VariableNotFoundError(self._session, name)

        def versions() -> "Iterator[HistoryEntry]":
            yield first
            for each in entries:
                # Another variable may have had the name before.
                if each.variable_id != first.variable_id:
                    return
                yield each

        matching = (each for each in versions() if before is None or each.version < before)
        return list(islice(matching, command.limit or 100))


def _hidden(name: str) -> InvalidArgumentError:
    return InvalidArgumentError("reveal", f"{name} is sensitive: add --reveal to read it")
