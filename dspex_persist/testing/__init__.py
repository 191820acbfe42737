"""Support for the tests of programs and backends: contract suites, a pytest plugin, a real server. Needs pytest."""

import pytest

# Before they are imported, so that failing assertions show the compared values as in a test module.
pytest.register_assert_rewrite(
    "dspex_persist.testing.audit_contract",
    "dspex_persist.testing.checks",
    "dspex_persist.testing.durable_contract",
    "dspex_persist.testing.fork_contract",
    "dspex_persist.testing.hold_contract",
    "dspex_persist.testing.import_contract",
    "dspex_persist.testing.order_contract",
    "dspex_persist.testing.provider_contract",
    "dspex_persist.testing.prune_contract",
    "dspex_persist.testing.recording_contract",
    "dspex_persist.testing.stream_contract",
    "dspex_persist.testing.tool_contract",
)
