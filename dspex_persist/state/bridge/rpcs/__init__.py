"""The table of rpcs: for each one, the translation of its request and its response, in both directions.

`BridgeServicer` serves the rpcs in the table, and `BridgedState` calls them, so a new unary rpc for a command is one
entry. Not in the table are Ping, which has no command, and the streams WatchVariables and ExecuteStreamingTool. The
queries of the audit service are in `audit`; the commands that it serves, which the bridge protocol lacks, in `beside`.
"""

from collections.abc import Mapping
from typing import Any, Final

from dspex_persist.state.bridge.rpcs import beside, optimization, sessions, tools, variables
from dspex_persist.state.bridge.rpcs.base import Rpc
from dspex_persist.state.commands import Command

RPCS: Final[tuple[Rpc[Any, Any], ...]] = (*sessions.RPCS, *variables.RPCS, *optimization.RPCS, *tools.RPCS)
BY_COMMAND: Final[Mapping[type[Command[Any]], Rpc[Any, Any]]] = {
    rpc.command: rpc for rpc in (*RPCS, *beside.RPCS) if rpc is not tools.EXECUTE_ELIXIR_TOOL
}
"""The rpc for each command. ExecuteElixirTool is left out, because only Elixir clients call it."""
