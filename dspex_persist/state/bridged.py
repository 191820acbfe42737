"""BridgedState, beside the other backends; the bridge that it is a part of is in `rpc`."""

from dspex_persist.state.rpc.client import BridgedState

__all__ = ["BridgedState"]
