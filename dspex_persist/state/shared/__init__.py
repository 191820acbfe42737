"""The engine of one of several servers that share a log (the port `SharedLog`)."""

from dspex_persist.state.shared.barrier import Barrier as Barrier
from dspex_persist.state.shared.database_state import LEASE_S as LEASE_S
from dspex_persist.state.shared.database_state import DatabaseLog as DatabaseLog
from dspex_persist.state.shared.database_state import DatabaseState as DatabaseState
from dspex_persist.state.shared.database_state import ServerOptions as ServerOptions
from dspex_persist.state.shared.server_meter import ServerMeter as ServerMeter
from dspex_persist.state.shared.shared_groups import SharedGroups as SharedGroups
from dspex_persist.state.shared.shared_holds import HoldingState as HoldingState
from dspex_persist.state.shared.shared_state import SWEEP_S as SWEEP_S
from dspex_persist.state.shared.shared_state import SharedState as SharedState
