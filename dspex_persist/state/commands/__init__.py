"""The commands: every operation on a session, implemented once for all backends."""

from dspex_persist.state.commands.base import Command
from dspex_persist.state.commands.dependencies import AddDependency, GetDependencies, RemoveDependency
from dspex_persist.state.commands.derivations import ComputeDerived, Derivation
from dspex_persist.state.commands.executions import (
    BeginExecution,
    ExecuteTool,
    FinishExecution,
    InterruptExecutions,
    ListTools,
    RegisterTools,
    SumLmCalls,
)
from dspex_persist.state.commands.optimization import StartOptimization, StopOptimization
from dspex_persist.state.commands.publishing import PublishVariable
from dspex_persist.state.commands.recordings import FinishImport, ForkSession, ImportCommit, ImportSession
from dspex_persist.state.commands.restore import RestoreSession
from dspex_persist.state.commands.rules import AddRule, ListRules, RemoveRule
from dspex_persist.state.commands.sessions import (
    CleanupSession,
    EndMovedSession,
    ExpireSession,
    GetSession,
    Heartbeat,
    HoldSession,
    InitializeSession,
    PeekSession,
    ReadState,
    ResumeSession,
    TouchSession,
)
from dspex_persist.state.commands.variables import (
    ConstrainVariable,
    DeleteVariable,
    GetVariable,
    GetVariableHistory,
    GetVariables,
    ListVariables,
    RegisterVariable,
    RegisterVariables,
    RollbackVariable,
    SetVariable,
    SetVariables,
)

__all__ = [
    "AddDependency",
    "AddRule",
    "BeginExecution",
    "CleanupSession",
    "Command",
    "ComputeDerived",
    "ConstrainVariable",
    "DeleteVariable",
    "Derivation",
    "EndMovedSession",
    "ExecuteTool",
    "ExpireSession",
    "FinishExecution",
    "FinishImport",
    "ForkSession",
    "GetDependencies",
    "GetSession",
    "GetVariable",
    "GetVariableHistory",
    "GetVariables",
    "Heartbeat",
    "HoldSession",
    "ImportCommit",
    "ImportSession",
    "InitializeSession",
    "InterruptExecutions",
    "ListRules",
    "ListTools",
    "ListVariables",
    "PeekSession",
    "PublishVariable",
    "ReadState",
    "RegisterTools",
    "RegisterVariable",
    "RegisterVariables",
    "RemoveDependency",
    "RemoveRule",
    "RestoreSession",
    "ResumeSession",
    "RollbackVariable",
    "SetVariable",
    "SetVariables",
    "StartOptimization",
    "StopOptimization",
    "SumLmCalls",
    "TouchSession",
]
