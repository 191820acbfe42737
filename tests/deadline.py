"""How long tests wait for what has to happen: deadlines that a loaded machine does not break, and no wall clock else.

A deadline says when to give up, so one that is too long costs nothing where all is well. What has to be quick is
measured in CPU time, which does not pass while other processes run.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

PATIENCE: Final = "TEST_PATIENCE"
"""The environment variable that says how many times as long as on a quiet machine everything may take."""
_LEAST, _MOST = 4.0, 40.0


def within(quiet_s: float) -> float:
    """Return the deadline, in seconds, for an operation that takes less than `quiet_s` on an idle machine."""
    return quiet_s * _patience()


def _patience() -> float:
    patience = os.environ.get(PATIENCE)
    if patience:
        return float(patience)
    load_of_a_core = os.getloadavg()[0] / (os.cpu_count() or 1)
    return min(max(_LEAST, 2 * load_of_a_core), _MOST)


@contextmanager
def cpu_s_below(most: float) -> Iterator[None]:
    """Fail where the block takes more CPU time, of all threads of this process."""
    began = time.process_time()
    yield
    took = time.process_time() - began
    assert took < most, f"it took {took:.1f} s of CPU time, not less than {most:g}"
