"""The commands: every operation on a session, implemented once for all backends."""

from dspex_persist.state.commands.base import Command
from dspex_persist.state.commands.dependencies import AddDependency
from dspex_persist.state.commands.executions import (
    BeginExecution,
    ExecuteTool,
    FinishExecution,
    InterruptExecutions,
    ListTools,
    RegisterTools,
)
from dspex_persist.state.commands.optimization import StartOptimization, StopOptimization
from dspex_persist.state.commands.recordings import FinishImport, ForkSession, ImportCommit, ImportSession
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
    PublishVariable,
    RegisterVariable,
    RollbackVariable,
    SetVariable,
    SetVariables,
)

__all__ = [
    "AddDependency",
    "BeginExecution",
    "CleanupSession",
    "Command",
    "DeleteVariable",
    "ExecuteTool",
    "ExpireSession",
    "FinishExecution",
    "FinishImport",
    "ForkSession",
    "GetSession",
    "GetVariable",
    "GetVariableHistory",
    "GetVariables",
    "Heartbeat",
    "ImportCommit",
    "ImportSession",
    "InitializeSession",
    "InterruptExecutions",
    "ListTools",
    "ListVariables",
    "PublishVariable",
    "ReadState",
    "RegisterTools",
    "RegisterVariable",
    "RollbackVariable",
    "SetVariable",
    "SetVariables",
    "StartOptimization",
    "StopOptimization",
    "TouchSession",
]
