"""Which variables a command reads and writes, and which commands can be part of an execution."""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

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
    match command:
        case commands.GetVariable() | commands.GetVariableHistory():
            return Touched((command.identifier,))
        case commands.GetVariables():
            return Touched(command.identifiers)
        case commands.ListVariables():
            return Touched(pattern=command.pattern)
        case commands.SetVariable() | commands.DeleteVariable() | commands.RollbackVariable():
            return Touched(writes=(command.identifier,))
        case commands.StartOptimization() | commands.StopOptimization():
            return Touched(writes=(command.identifier,))
        case commands.SetVariables():
            return Touched(writes=tuple(command.updates))
        case commands.RegisterVariable():
            return Touched(writes=(command.name,))
        case commands.AddDependency():
            return Touched((command.from_variable, command.to_variable), dependencies=True)
    raise UnsupportedError(f"{command.cause} inside an execution")


def is_transactional(command: Command[Any]) -> bool:
    """Whether the command runs inside the execution that the request names: all commands on variables do."""
    try:
        touched_by(command)
    except UnsupportedError:
        return False
    return True


def may_block(command: Command[Any]) -> bool:
    """Whether `Execution.run` may block an event loop: it reads the store's file, or matches many names."""
    return command.reads is Reads.HISTORY or isinstance(command, commands.RollbackVariable | commands.ListVariables)
