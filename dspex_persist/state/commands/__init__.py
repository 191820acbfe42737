"""Every operation on a session, each written once."""

from dspex_persist.state.commands.base import Command
from dspex_persist.state.commands.dependencies import AddDependency
from dspex_persist.state.commands.optimization import StartOptimization, StopOptimization
from dspex_persist.state.commands.sessions import (
    CleanupSession,
    ExpireSession,
    GetSession,
    Heartbeat,
    InitializeSession,
    ReadState,
    TouchSession,
)
from dspex_persist.state.commands.variables import (
    DeleteVariable,
    GetVariable,
    GetVariableHistory,
    GetVariables,
    ListVariables,
    RegisterVariable,
    RollbackVariable,
    SetVariable,
    SetVariables,
)

__all__ = [
    "AddDependency",
    "CleanupSession",
    "Command",
    "DeleteVariable",
    "ExpireSession",
    "GetSession",
    "GetVariable",
    "GetVariableHistory",
    "GetVariables",
    "Heartbeat",
    "InitializeSession",
    "ListVariables",
    "ReadState",
    "RegisterVariable",
    "RollbackVariable",
    "SetVariable",
    "SetVariables",
    "StartOptimization",
    "StopOptimization",
    "TouchSession",
]
