"""For the tests of whoever builds on this package: what every backend promises, an in-memory double, a real server.

Needs pytest.
"""

import pytest

# Before anything imports them, so that their assertions say what they compared, as a test module's own do.
pytest.register_assert_rewrite(
    "dspex_persist.testing.audit_contract",
    "dspex_persist.testing.checks",
    "dspex_persist.testing.durable_contract",
    "dspex_persist.testing.fork_contract",
    "dspex_persist.testing.order_contract",
    "dspex_persist.testing.provider_contract",
    "dspex_persist.testing.prune_contract",
    "dspex_persist.testing.recording_contract",
    "dspex_persist.testing.stream_contract",
    "dspex_persist.testing.tool_contract",
)
