"""Replays: run the tools of a recorded session again, on the recorded state, and report every difference.

    report = replay("checkout.jsonl", "shop.tools")
    assert report.ok, report.describe()

A replay writes nothing, unlike a fork, which creates a session, and a rollback, which writes a new version.
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
