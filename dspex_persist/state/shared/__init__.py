"""The engine of one of several servers that share a log (the port `SharedLog`)."""

from dspex_persist.state.shared.barrier import Barrier as Barrier
from dspex_persist.state.shared.server_meter import ServerMeter as ServerMeter
from dspex_persist.state.shared.shared_groups import SharedGroups as SharedGroups
from dspex_persist.state.shared.shared_holds import HoldingState as HoldingState
from dspex_persist.state.shared.shared_state import SWEEP_S as SWEEP_S
from dspex_persist.state.shared.shared_state import SharedState as SharedState
