"""BridgedState, importable next to the other backends; its code is in `bridge`."""

from dspex_persist.state.bridge.client.line import Breaker
from dspex_persist.state.bridge.client.state import BridgedState

__all__ = ["Breaker", "BridgedState"]
