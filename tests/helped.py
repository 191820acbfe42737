"""Fixtures for checks that share their work with helper processes."""

import threading
from collections.abc import Iterator

import pytest

from dspex_persist.infra.helpers import Helper
from dspex_persist.state.store.verify import log, sharing
from tests.infra.test_helpers import is_gone


@pytest.fixture
def helpers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The process ids of the helpers that are started. No test leaves one behind."""
    pids: list[int] = []

    class Known(Helper):
        def __init__(self, module: str) -> None:
            super().__init__(module)
            pids.append(self._popen.pid)

    monkeypatch.setattr(sharing, "Helper", Known)
    yield pids
    assert all(map(is_gone, pids))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("dspex-persist-check")]


@pytest.fixture
def short_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log in many ranges, as that of a large database is."""
    monkeypatch.setattr(log, "_PAGE_COMMITS", 7)
