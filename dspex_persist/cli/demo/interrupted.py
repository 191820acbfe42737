"""The demo's scenes with a tool that is killed after its last write, before it ends."""

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from dspex_persist.cli.demo.scenes import Observer
from dspex_persist.cli.demo.stage import PATIENCE_S, SESSION, DemoContext, DemoFailedError
from dspex_persist.state.audit import ExecutionQuery, ExecutionSummary
from dspex_persist.state.errors import StateError
from dspex_persist.state.model import ExecutionStatus, ToolOutcome

if TYPE_CHECKING:
    from dspex_persist.state.abilities import ExecutesTools
    from dspex_persist.state.provider import StateProvider

_OLD: Final = {"street": "Old Lane 1", "postcode": "1000", "town": "Oldham"}
_NEW: Final = {"street": "New Road 2", "postcode": "2000", "town": "Newton"}
_KEY: Final = "move-1"
_STEP_S: Final = 0.2


class Mover:
    """A client that executes the tool, in a thread. `error`: the error that it got instead of an outcome."""

    def __init__(self, client: "ExecutesTools") -> None:
        self.error: StateError | None = None
        self._client = client
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            move(self._client)
        except StateError as error:
            self.error = error

    def join(self) -> None:
        """Wait until the client has noticed that the server is gone."""
        self._thread.join(PATIENCE_S)
        if self.error is None:
            raise DemoFailedError("the client that executed the tool got no error when the server died")


def move(client: "ExecutesTools") -> ToolOutcome:
    """Execute the tool: the same request each time, with the same idempotency key."""
    return client.execute_tool(SESSION, "move", _NEW, idempotency_key=_KEY, timeout_s=PATIENCE_S)


def begin(stage: DemoContext, client: "ExecutesTools", observer: Observer) -> Mover:
    """Let the tool write everything, but not end."""
    stage.say("A tool changes an address. It writes three variables, slowly, in one transaction:")
    for name, text in _OLD.items():
        client.register_variable(SESSION, name, "string", text)
    client.register_variable(SESSION, "steps_done", "integer", 0)
    client.register_variable(SESSION, "seconds_a_step", "float", _STEP_S)
    mover = Mover(client)
    observer.wait_for(lambda _: client.get_value(SESSION, "steps_done") == 3, "three steps of the tool")
    rows = [(name, _NEW[name], text) for name, text in _address(client).items()]
    stage.show("It has written all three", ("variable", "the tool sees", "everyone else sees"), rows)
    stage.add("What it publishes is visible at once: [bold]steps_done[/] is 3. The tool is still running.")
    _expect(_address(client), _OLD, "while the tool ran")
    return mover


def show(stage: DemoContext, client: "ExecutesTools") -> None:
    """After the kill: none of its writes are visible, the journal says so, and repeating the request succeeds once."""
    stage.say("And the tool that was running? None of its writes are visible:")
    stage.show("The address", ("variable", "value"), list(_address(client).items()))
    _expect(_address(client), _OLD, "after the kill")
    client.set_variable(SESSION, "seconds_a_step", 0.0)
    stage.say("Its client repeats the request, twice, with the same idempotency key. The tool runs once, and commits:")
    first, second = move(client), move(client)
    stage.show("The address", ("variable", "value"), list(_address(client).items()))
    _expect(_address(client), _NEW, "after the tool had run again")
    if not first.success or (second.execution_id, second.result) != (first.execution_id, first.result):
        raise DemoFailedError(f"the same request was answered {first} and {second}")
    stage.say("The journal has both executions. This is [bold]dspex-persist audit executions[/]:")
    executions = _journal(stage)
    rows = [
        (each.execution_id[:14] + "…", each.tool, each.status.value, each.writes, each.error) for each in executions
    ]
    stage.show("The journal of the tool", ("execution", "tool", "status", "wrote#", "why"), rows)
    expected = [ExecutionStatus.INTERRUPTED, ExecutionStatus.COMMITTED]
    if [each.status for each in executions] != expected:
        raise DemoFailedError(f"the journal should say interrupted, committed, but says {rows}")


def _address(client: "StateProvider") -> dict[str, str]:
    variables = client.get_variables(SESSION, tuple(_OLD)).variables
    return {name: variables[name].value.json.strip('"') for name in _OLD}


def _expect(address: Mapping[str, str], expected: Mapping[str, str], when: str) -> None:
    if address != expected:
        raise DemoFailedError(f"the address {when} should be {expected}, but is {address}")


def _journal(stage: DemoContext) -> list[ExecutionSummary]:
    from dspex_persist import open_audit

    with open_audit(stage.database) as audit:
        return list(audit.iterate(ExecutionQuery(session=SESSION, tool="move", newest_first=False)))
