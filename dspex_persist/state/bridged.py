"""BridgedState, importable next to the other backends; its code is in `bridge`."""

from dspex_persist.state.bridge.client import BridgedState
from dspex_persist.state.bridge.line import Breaker

__all__ = ["Breaker", "BridgedState"]
