"""The audit service's messages have about the same size, whatever they contain."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dspex_persist.state.bridge.audit_service import _Pages
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as pb
from dspex_persist.state.bridge.rpcs import audit as audit_rpcs
from dspex_persist.state.commands import SetVariable
from dspex_persist.state.embedded import EmbeddedState
from dspex_persist.state.model import Value

SMALL, LARGE = 150, 12
LARGE_BYTES = 1_000_000


@pytest.fixture
def state(tmp_path: Path) -> Iterator[EmbeddedState]:
    with EmbeddedState(tmp_path / "sessions.db") as state:
        state.initialize_session("s")
        state.register_variable("s", "x", "string", "")
        values = ("y" * LARGE_BYTES if number >= SMALL else "y" for number in range(1, SMALL + LARGE))
        for future in [state.submit(SetVariable("s", "x", Value(f'"{value}"'))) for value in values]:
            future.result()
        yield state


@pytest.mark.parametrize("oldest_first", [True, False])
@pytest.mark.parametrize("limit", [0, 1, 130, SMALL + LARGE])
def test_large_values_come_alone_and_small_ones_together(oldest_first: bool, limit: int, state: EmbeddedState) -> None:
    request = pb.ListHistoryRequest(session="s", range=pb.Range(oldest_first=oldest_first, limit=limit))
    pages = _Pages(audit_rpcs.LIST_HISTORY.question(request), state.audit())
    responses = []
    while not pages.ended:
        responses.append(pages.read())
    versions = [entry.version for response in responses for entry in response.entries]
    expected = list(range(SMALL + LARGE)) if oldest_first else list(range(SMALL + LARGE))[::-1]
    assert versions == expected[: limit or None]
    assert all(response.ByteSize() < LARGE_BYTES or len(response.entries) == 1 for response in responses)
    assert max(len(response.entries) for response in responses) <= 100
    assert responses[-1].HasField("next") == (0 < limit < SMALL + LARGE)


def test_pages_are_as_of_the_first_one(state: EmbeddedState) -> None:
    request = pb.ListHistoryRequest(session="s", range=pb.Range(oldest_first=True))
    pages = _Pages(audit_rpcs.LIST_HISTORY.question(request), state.audit())
    first = pages.read()
    assert (first.next.since, first.next.until) == (0, state.head_sequence)
    state.set_variable("s", "x", "newer")
    while not pages.ended:
        last = pages.read()
    assert last.entries[-1].version == SMALL + LARGE - 1
