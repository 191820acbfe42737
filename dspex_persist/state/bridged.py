"""BridgedState, beside the other backends; the bridge that it is a part of is in `bridge`."""

from dspex_persist.state.bridge.client import BridgedState

__all__ = ["BridgedState"]
