"""The messages of the audit service, byte by byte as the first release sent them, and back."""

import json
from pathlib import Path
from typing import Any

import pytest

from dspex_persist.state.audit import (
    CommitEntry,
    ExecutionDetail,
    ExecutionSummary,
    HistoryEntry,
    HistoryQuery,
    SessionEntry,
    VariableState,
)
from dspex_persist.state.bridge.generated import dspex_persist_audit_pb2 as pb
from dspex_persist.state.bridge.records import Codec
from dspex_persist.state.bridge.rpcs import audit as rpcs
from dspex_persist.state.bridge.rpcs import beside
from dspex_persist.state.errors import InvalidArgumentError, UnsupportedError
from dspex_persist.state.lm_calls import LmUsage
from dspex_persist.state.model import ChangeKind
from tests.bridge.audit_samples import POLICIES, QUERIES, REPORT, SAMPLES

FIRST_SENT: Any = json.loads((Path(__file__).parents[1] / "assets" / "audit_messages.json").read_text(encoding="utf-8"))
CODECS: dict[type, Codec[Any]] = {
    HistoryEntry: rpcs.VERSION,
    VariableState: rpcs.VARIABLE,
    ExecutionSummary: rpcs.LIST_EXECUTIONS.row,
    ExecutionDetail: rpcs.EXECUTION,
    CommitEntry: rpcs.LIST_COMMITS.row,
    SessionEntry: rpcs.LIST_SESSIONS.row,
    LmUsage: rpcs.LIST_LM_USAGE.row,
}


def bytes_of(message: Any) -> str:
    written: bytes = message.SerializeToString(deterministic=True)
    return written.hex()


def test_there_is_a_sample_of_everything() -> None:
    assert {type(sample) for sample in SAMPLES.values()} == set(CODECS)
    assert {type(query) for query in QUERIES.values()} == set(rpcs.LISTS)
    assert set(FIRST_SENT["answers"]) == set(SAMPLES)


@pytest.mark.parametrize("name", SAMPLES)
def test_answers(name: str) -> None:
    sample = SAMPLES[name]
    codec = CODECS[type(sample)]
    message = codec.message_of(sample)
    assert bytes_of(message) == FIRST_SENT["answers"][name]
    assert codec.record_of(type(message).FromString(message.SerializeToString())) == sample


@pytest.mark.parametrize("name", QUERIES)
def test_questions(name: str) -> None:
    query = QUERIES[name]
    rpc = rpcs.LISTS[type(query)]
    after = (1,) * rpc.key_length
    request = rpc.request(query, after, 50, reveal=True)
    assert bytes_of(request) == FIRST_SENT["queries"][name]
    request.range.limit = query.limit
    question = rpc.question(type(request).FromString(request.SerializeToString()))
    assert (question.query, question.key) == (query, after)


@pytest.mark.parametrize("name", POLICIES)
def test_policies(name: str) -> None:
    policy = POLICIES[name]
    request = rpcs.prune_request(policy, confirm=bool(policy.keep_versions))
    assert bytes_of(request) == FIRST_SENT["policies"][name]
    assert rpcs.policy_of(request) == policy


def test_reports() -> None:
    message = rpcs.report_message(REPORT)
    assert bytes_of(message) == FIRST_SENT["report"]
    assert rpcs.REPORT.record_of(message.report) == REPORT


def test_an_unknown_enum_member_is_reported_as_newer_than_this_release() -> None:
    with pytest.raises(UnsupportedError, match="ChangeKind 99: the sender is newer"):
        rpcs.VERSION.record_of(pb.HistoryEntry(kind=99))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedError, match="Operator 0"):
        rpcs.LIST_HISTORY.question(pb.ListHistoryRequest(where=[pb.Predicate(operand="1")]))


def test_a_query_without_a_kind_means_every_kind() -> None:
    assert rpcs.LIST_HISTORY.question(pb.ListHistoryRequest()).query == HistoryQuery()
    query = rpcs.LIST_HISTORY.question(pb.ListHistoryRequest(kind=pb.CHANGE_KIND_SET)).query
    assert query == HistoryQuery(kind=ChangeKind.SET)


def test_too_many_conditions_are_refused_before_they_are_read() -> None:
    nothing = [pb.Predicate()] * 101
    with pytest.raises(InvalidArgumentError, match="101 conditions"):
        rpcs.LIST_HISTORY.question(pb.ListHistoryRequest(where=nothing))


def test_the_table_has_every_rpc_of_the_service_once() -> None:
    names = [rpc.name for rpc in (*rpcs.SINGLES, *rpcs.LISTS.values(), *beside.RPCS)]
    transactions = ["BeginTransaction", "CommitTransaction", "AbortTransaction", "RecordInputs", "CheckBudget"]
    sessions = ["RecordSession", "GetContentHash", "ImportSession", "ForkSession", "RestoreSession", "HoldSession"]
    by_hand = [rpcs.PRUNE, "ListWorkers", *sessions, *transactions]
    assert sorted([*names, *by_hand]) == sorted(method.name for method in rpcs.AUDIT_SERVICE.methods)
