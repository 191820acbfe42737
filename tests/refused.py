"""Refused calls, and what is asked about them, for tests of every kind of database."""

from datetime import UTC, datetime, timedelta
from typing import Any, Final

from dspex_persist.state.denials import Refused

START: Final = datetime(2026, 3, 1, 12, 0, 30, tzinfo=UTC)
REFUSED: Final = Refused("ada", "ipv4:10.0.0.7", "snakepit.bridge.BridgeService.SetVariable", "s", "scope write")
STRANGER: Final = Refused("", "ipv4:10.0.0.8", "snakepit.bridge.BridgeService.Ping", "", "no token")
IN_TURN: Final = (REFUSED, STRANGER, REFUSED)
"""Three entries, a minute apart: two of one caller, and one of a stranger in between; refused once, twice, 3 times."""
QUERIES: Final[tuple[tuple[dict[str, Any], list[int]], ...]] = (
    ({}, [3, 2, 1]),
    ({"newest_first": False, "limit": 2}, [1, 2]),
    ({"identity": "ada"}, [3, 1]),
    ({"identity": "-"}, [2]),
    ({"identity": "a*"}, [3, 1]),
    ({"rpc": "Ping"}, [2]),
    ({"rpc": "*Variable"}, [3, 1]),
    ({"rpc": STRANGER.rpc}, [2]),
    ({"peer": "ipv4:10.0.0.*"}, [3, 2, 1]),
    ({"session": "s", "limit": 1}, [3]),
    ({"since": START + timedelta(minutes=1)}, [3]),
    ({"until": (START + timedelta(minutes=1)).isoformat()}, [2, 1]),
    ({"until": f"{(START + timedelta(minutes=1)).isoformat()}^"}, [1]),
    ({"since": "1h"}, []),
)
"""What is asked about them, and the counts of the entries that are found."""
