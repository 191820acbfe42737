"""What servers count together: the sessions and bytes of identities, what LM calls have used, rules of access."""

from typing import Any

import pytest

from dspex_persist.infra.access.tokens import Allowance
from dspex_persist.state.budgets import Spent
from dspex_persist.state.commands import BeginExecution, FinishExecution, ReadState
from dspex_persist.state.commands.executions import Verdict
from dspex_persist.state.errors import QuotaExceededError
from dspex_persist.state.model import ExecutionStatus
from tests.valkey.conftest import Open

TEXT = "x" * 98
"""100 bytes as JSON."""


def test_sessions_and_bytes_count_for_whoever_began_them_on_any_server(open_server: Open) -> None:
    one, two = open_server(actor="ada"), open_server(actor="ada for user:bob")
    for each in (one, two):
        each.limit_storage(lambda owner: Allowance(sessions=2, bytes=1_000) if owner == "ada" else Allowance())
    one.initialize_session("a")
    two.initialize_session("b")
    with pytest.raises(QuotaExceededError):
        one.initialize_session("c")
    two.register_variable("a", "x", "string", TEXT, actor="eve")
    for _ in range(4):
        one.set_variable("a", "x", TEXT)
        two.set_variable("a", "x", TEXT)
    one.set_variable("a", "x", TEXT)
    for each in (one, two):
        with pytest.raises(QuotaExceededError):
            each.set_variable("a", "x", TEXT, actor="eve")
    two.cleanup_session("a")
    header, commits = one.record("b", reveal=True)
    one.import_session(header, tuple(commits), session_id="of an import")
    firsts = {one.run(ReadState(name)).session.sequence for name in ("b", "of an import")}
    assert one._store.stored_by("ada").keys() == firsts
    one.initialize_session("elsewhere", actor="eve")
    assert len(one._store.stored_by("eve")) == 1


def call(tokens: int, cost: float) -> dict[str, Any]:
    return {"model": "m", "response": {"usage": {"m": {"total_tokens": tokens}}}, "cost": cost}


def test_what_lm_calls_have_used_is_summed_over_servers(open_server: Open) -> None:
    one, two = open_server(), open_server()
    one.initialize_session("s")
    for server in (one, two, one):
        begun = server.run(BeginExecution("s", "ask"))
        verdict = Verdict(begun.execution_id, ExecutionStatus.COMMITTED, recorded={"lm": [call(10, 0.25)] * 2})
        server.run(FinishExecution("s", verdict))
    for server in (one, two):
        assert server._store.spent(server.run(ReadState("s")))[1] == {"ask": Spent(60, 1.5)}


def test_figures(open_server: Open) -> None:
    server = open_server()
    for name in ("a", "b"):
        server.initialize_session(name)
    server.cleanup_session("b")
    figures = server.file_figures()
    assert figures.live_sessions == 1
    assert figures.size > 0
    # Nobody shows who they are here, so no session can have any.
    assert server.count_with_access() == 0
