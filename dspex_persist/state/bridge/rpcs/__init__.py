"""The rpcs, each once: its question and its answer, as messages and back.

`BridgeServicer` serves what is in the table, and `BridgedState` calls it: a new unary rpc over a command is one entry.
Not in it are Ping, which asks nothing, and the two streams, WatchVariables and ExecuteStreamingTool. The audit service
has its own table, in `audit`.
"""

from collections.abc import Mapping
from typing import Any, Final

from dspex_persist.state.bridge.rpcs import optimization, sessions, tools, variables
from dspex_persist.state.bridge.rpcs.base import Rpc
from dspex_persist.state.commands import Command

RPCS: Final[tuple[Rpc[Any, Any], ...]] = (*sessions.RPCS, *variables.RPCS, *optimization.RPCS, *tools.RPCS)
BY_COMMAND: Final[Mapping[type[Command[Any]], Rpc[Any, Any]]] = {
    rpc.command: rpc for rpc in RPCS if rpc is not tools.EXECUTE_ELIXIR_TOOL
}
"""Which rpc carries a command; the other one for tools is for clients of the other side."""
