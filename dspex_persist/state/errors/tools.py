"""Errors of tools and their executions."""

from dataclasses import dataclass

from dspex_persist.state.errors.base import StateError
from dspex_persist.state.errors.hints import Hint


@dataclass(eq=False)
class ToolNotFoundError(StateError):
    """There is no such tool."""

    error_code = "UNKNOWN_TOOL"
    template = "unknown tool {name!q}; {hint}"
    name: str
    hint: str


@dataclass(eq=False)
class ToolExistsError(StateError):
    """The name belongs to a tool of the server, which a registration cannot replace."""

    template = "tool {name!q} already exists: the server has a tool of this name"
    advice = Hint.ANOTHER_TOOL_NAME
    name: str


@dataclass(eq=False)
class ToolArgumentError(StateError):
    """An argument of a tool is wrong, missing or unknown; the execution did not begin."""

    error_code = "INVALID_PARAMETERS"
    template = "invalid parameter {parameter!q} of tool {tool!q}: {reason}"
    tool: str
    parameter: str
    reason: str


@dataclass(eq=False)
class MissingVariablesError(StateError):
    """The session lacks variables that the tool requires; the execution did not begin."""

    template = "tool {tool!q} needs variables that the session does not have: {names}"
    advice = Hint.REGISTER_VARIABLES
    tool: str
    names: str


@dataclass(eq=False)
class SessionBusyError(StateError):
    """Another execution runs in the session, and this one is not to run at the same time; it did not begin."""

    template = "session {session_id!q} is busy: {reason}"
    advice = Hint.REPEAT_LATER
    retryable = True
    session_id: str
    reason: str


@dataclass(eq=False)
class BudgetExceededError(StateError):
    """A budget of LM calls is used up; the next call was not made.

    Attributes:
        owner: Whose budget it is, such as "session 'shop'" or "tool 'triage'".
        unit: "tokens" or "USD".
        budget: How much may be used.
        used: How much has been used, in all executions of the session.
        setting: What states the budget: "max_tokens" or "max_cost".
    """

    template = "the LM calls of {owner} have used {used:,.15g} {unit} of a budget of {budget:,.15g}; no more are made"
    advice = Hint.RAISE_SESSION_BUDGET
    owner: str
    unit: str
    budget: float
    used: float
    setting: str


@dataclass(eq=False)
class ExecutionNotFoundError(StateError):
    """No execution of this id is running: it never began, or has ended."""

    template = "no execution {execution_id!q} is running: it never began, or has ended"
    advice = Hint.RUNNING_EXECUTION
    execution_id: str


@dataclass(eq=False)
class ExecutionElsewhereError(StateError):
    """The execution runs on another server of the same sessions, which has its snapshot and what it has written.

    Attributes:
        execution_id: The execution.
        address: Where clients reach that server; "" if it has not said.
    """

    template = "execution {execution_id!q} runs on another server{address!o:, %}"
    advice = Hint.CALL_ITS_SERVER
    execution_id: str
    address: str


@dataclass(eq=False)
class ExecutionEndedError(StateError):
    """The execution has ended: its code can no longer read or write."""

    template = "execution {execution_id} has ended ({status}): its code can no longer read or write"
    execution_id: str
    status: str


@dataclass(eq=False)
class TransactionEndedError(ExecutionEndedError):
    """The transaction has ended: nothing can be read or written in it any more."""

    template = "the transaction has ended ({status}){reason!o:, because %}: it can no longer read or write"
    advice = Hint.NEW_TRANSACTION
    reason: str = ""


@dataclass(eq=False)
class ExecutionConflictError(StateError):
    """Others changed variables that the execution read or wrote."""

    error_code = "CONFLICT"
    template = "conflict: meanwhile others changed {changes}; nothing was written"
    advice = Hint.RUN_AGAIN
    retryable = True
    execution_id: str
    changes: str


@dataclass(eq=False)
class ToolFailedError(StateError):
    """The tool failed; nothing was written.

    `kind` is the type of the exception that its code raised, if that is known.
    """

    template = "{reason}"
    execution_id: str
    reason: str
    kind: str = ""


@dataclass(eq=False)
class ToolInterruptedError(ToolFailedError):
    """The session, or the server, ended while the tool ran; nothing was written."""

    error_code = "INTERRUPTED"


@dataclass(eq=False)
class ToolTimedOutError(StateError):
    """The tool exceeded its time limit or its caller's; nothing was written."""

    error_code = "TIMED_OUT"
    template = "timed out: {reason}; nothing was written"
    execution_id: str
    reason: str


@dataclass(eq=False)
class RemoteToolError(StateError):
    """The process that runs the tool cannot be reached, or disconnected."""

    error_code = "UNAVAILABLE"
    template = "unavailable: tool {tool!q} at {address}: {reason}"
    retryable = True
    tool: str
    address: str
    reason: str


class ToolPoolError(StateError):
    """A tool could not run in a worker of a pool, or lost it; nothing was written. The root of such errors."""

    template = "tool {tool!q}: {reason}"


@dataclass(eq=False)
class PoolSaturatedError(ToolPoolError):
    """All workers of the pool are busy, and as many calls wait for one as may."""

    error_code = "POOL_SATURATED"
    retryable = True
    tool: str
    reason: str


@dataclass(eq=False)
class QueueTimeoutError(ToolPoolError):
    """No worker of the pool became free in time."""

    error_code = "QUEUE_TIMEOUT"
    retryable = True
    tool: str
    reason: str


@dataclass(eq=False)
class WorkerTimeoutError(ToolPoolError):
    """The worker did not finish the call within the time that its pool allows; nothing was written."""

    error_code = "WORKER_TIMEOUT"
    tool: str
    reason: str


@dataclass(eq=False)
class WorkerExitedError(ToolPoolError):
    """The worker ended, or was lost, while it ran the tool; nothing was written."""

    error_code = "WORKER_EXIT"
    tool: str
    reason: str
