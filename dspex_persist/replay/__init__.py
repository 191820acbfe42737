"""Replays: a recorded session's tools run again, on the recorded state, and what comes out differently.

    report = replay("checkout.jsonl", "shop.tools")
    assert report.ok, report.describe()

Nothing is written: a replay is neither a fork, which makes a new session, nor a rollback, which writes a new version.
"""

from dspex_persist.replay.recorded import Recording, load
from dspex_persist.replay.report import Aspect, Divergence, ReplayedExecution, ReplayOutcome, ReplayReport
from dspex_persist.replay.run import replay
from dspex_persist.replay.state import replay_state

__all__ = [
    "Aspect",
    "Divergence",
    "Recording",
    "ReplayOutcome",
    "ReplayReport",
    "ReplayedExecution",
    "load",
    "replay",
    "replay_state",
]
