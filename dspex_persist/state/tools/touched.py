"""Which variables a command reads and writes, and which commands can be part of an execution."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from dspex_persist.state import commands
from dspex_persist.state.commands import Command
from dspex_persist.state.commands.base import Reads
from dspex_persist.state.errors import (
    UnsupportedError,
)

R = TypeVar("R")


class Touched(NamedTuple):
    """What a command reads and writes: identifiers, a pattern of names, or the dependencies."""

    reads: Sequence[str] = ()
    writes: Sequence[str] = ()
    pattern: str | None = None
    dependencies: bool = False


def touched_by(command: Command[Any]) -> Touched:
    """Return what a command reads and writes; `UnsupportedError` for one that cannot be part of an execution."""
    touch = _TOUCH.get(type(command))
    if touch is None:
        raise UnsupportedError(f"{command.cause} inside an execution")
    return touch(command)


def _read(command: Any) -> Touched:
    return Touched((command.identifier,))


def _write(command: Any) -> Touched:
    return Touched(writes=(command.identifier,))


_TOUCH: Final[Mapping[type[Command[Any]], Callable[[Any], Touched]]] = {
    commands.GetVariable: _read,
    commands.GetVariableHistory: _read,
    commands.GetVariables: lambda command: Touched(command.identifiers),
    commands.ListVariables: lambda command: Touched(pattern=command.pattern),
    commands.SetVariable: _write,
    commands.ConstrainVariable: _write,
    commands.DeleteVariable: _write,
    commands.RollbackVariable: _write,
    commands.StartOptimization: _write,
    commands.StopOptimization: _write,
    commands.SetVariables: lambda command: Touched(writes=tuple(command.updates)),
    commands.RegisterVariable: lambda command: Touched(writes=(command.name,)),
    commands.RegisterVariables: lambda command: Touched(writes=tuple(each.name for each in command.definitions)),
    commands.AddDependency: lambda command: Touched((command.from_variable, command.to_variable), dependencies=True),
    commands.RemoveDependency: lambda command: Touched((command.from_variable, command.to_variable), dependencies=True),
    commands.GetDependencies: lambda command: Touched((command.identifier,), dependencies=True),
}


def is_transactional(command: Command[Any]) -> bool:
    """Whether the command runs inside the execution that the request names: all commands on variables do."""
    return type(command) in _TOUCH


def may_block(command: Command[Any]) -> bool:
    """Whether `Execution.run` may block an event loop: it reads the store's file, or matches many names."""
    return command.reads is Reads.HISTORY or isinstance(command, commands.RollbackVariable | commands.ListVariables)
