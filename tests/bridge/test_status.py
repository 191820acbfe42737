"""Errors over gRPC: each one arrives with its type and its fields."""

import dataclasses
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st

import dspex_persist
from dspex_persist.cli.hints import text_of as in_commands
from dspex_persist.errors import DspexError
from dspex_persist.infra.server import DrainingError
from dspex_persist.infra.server.guard import _fitting_trailers
from dspex_persist.state import errors
from dspex_persist.state.bridge import status
from dspex_persist.state.errors import StateError

KINDS = sorted(status.CODES, key=lambda kind: kind.__name__)
TEXTS = st.text(max_size=40)
_FIELDS: dict[Any, st.SearchStrategy[Any]] = {
    str: TEXTS,
    int: st.integers(0, 2**62),
    float: st.floats(allow_nan=False, allow_infinity=False),
    int | None: st.none() | st.integers(0, 2**31),
}


@st.composite
def any_error(draw: st.DrawFn) -> StateError:
    kind = draw(st.sampled_from(KINDS))
    hints = get_type_hints(kind)
    return kind(*(draw(_FIELDS[hints[field.name]]) for field in dataclasses.fields(kind)))  # type: ignore[arg-type]


def same(one: Exception, other: Exception | None) -> bool:
    return type(one) is type(other) and vars(one) == vars(other) and str(one) == str(other)


def leaves() -> set[type[StateError]]:
    kinds = {item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, StateError)}
    return {kind for kind in kinds if dataclasses.is_dataclass(kind)}


def test_the_table_knows_every_error() -> None:
    assert set(status.CODES) == leaves()
    assert len(status._KINDS) == len(status.CODES), "two errors with the same code and fields"
    assert {kind for kind, code in status.CODES.items() if code is StatusCode.INVALID_ARGUMENT} == {
        errors.InvalidArgumentError,
        *status._FIELDS,
    }


@given(any_error())
def test_every_error_arrives_unchanged(error: StateError) -> None:
    sent = status.status_of(error)
    assert sent is not None
    trailers = _fitting_trailers(sent.trailing_metadata)
    assert same(error, status.error_of(sent.code, sent.details, trailers))
    assert same(error, status.error_in(error.error_code, status.facts_of(error)))


@given(any_error())
def test_other_clients_can_read_the_rich_status(error: StateError) -> None:
    sent = status.status_of(error)
    assert sent is not None
    assert sent.code is status.CODES[type(error)]
    rich = Status.FromString(dict(sent.trailing_metadata)[status.DETAILS_KEY])
    info, violations = ErrorInfo(), BadRequest()
    assert rich.code == sent.code.value[0]
    assert rich.details[0].Unpack(info)
    assert (info.reason, info.domain) == (error.error_code, "dspex-persist")
    is_limited = isinstance(error, errors.RateLimitedError)
    assert (len(rich.details) == 2) == (sent.code is StatusCode.INVALID_ARGUMENT or is_limited)
    if is_limited:
        assert rich.details[1].Unpack(RetryInfo())
    elif len(rich.details) == 2:
        assert rich.details[1].Unpack(violations)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("character", ["x", "é", "🦜", "\ud800", "\n"])
def test_an_error_with_long_fields_still_arrives_as_its_kind(kind: type[StateError], character: str) -> None:
    hints = get_type_hints(kind)
    long: dict[Any, Any] = {str: character * 100_000, int: 1, float: 1.0, int | None: 1}
    error = kind(*(long[hints[field.name]] for field in dataclasses.fields(kind)))  # type: ignore[arg-type]
    sent = status.status_of(error)
    assert sent is not None
    trailers = _fitting_trailers(sent.trailing_metadata)
    assert type(status.error_of(sent.code, sent.details, trailers)) is kind
    assert same(error, status.error_in(error.error_code, status.facts_of(error)))


def test_a_subclass_of_a_known_error_arrives_as_that_error() -> None:
    class OwnError(errors.VersionConflictError):
        pass

    sent = status.status_of(OwnError("x", 1, 2))
    assert sent is not None
    received = status.error_of(sent.code, sent.details, sent.trailing_metadata)
    assert same(errors.VersionConflictError("x", 1, 2), received)


def test_a_call_during_the_drain() -> None:
    sent = status.status_of(DrainingError())
    assert sent is not None
    assert same(errors.ShuttingDownError(), status.error_of(sent.code, sent.details, sent.trailing_metadata))
    assert status.status_of(ValueError()) is None


@pytest.mark.parametrize(
    ("code", "details", "error"),
    [
        (
            StatusCode.UNAVAILABLE,
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: "
            "Failed to connect to remote host: Connection refused",
            errors.UnavailableError(
                "cannot connect to 127.0.0.1:1 (Connection refused); is the server running? "
                "Start it with `dspex-persist serve`"
            ),
        ),
        (
            StatusCode.UNAVAILABLE,
            "Socket closed",
            errors.UnavailableError("127.0.0.1:1: Socket closed").advising(errors.Hint.REPEAT_LATER),
        ),
        (
            StatusCode.DEADLINE_EXCEEDED,
            "",
            errors.UnavailableError("127.0.0.1:1: DEADLINE_EXCEEDED").advising(errors.Hint.REPEAT_LATER),
        ),
        (StatusCode.CANCELLED, "Stream removed (Channel closed!)", errors.EngineClosedError()),
        (
            StatusCode.RESOURCE_EXHAUSTED,
            "CLIENT: Received message larger than max (104857700 vs. 104857600)",
            errors.LimitExceededError("size of the message in bytes", 104857700, 104857600, "max_message_bytes"),
        ),
        (StatusCode.UNIMPLEMENTED, "no such rpc", errors.UnsupportedError("no such rpc")),
        (StatusCode.DATA_LOSS, "what?", errors.InternalError("DATA_LOSS: what?")),
    ],
)
def test_statuses_from_grpc_itself(code: StatusCode, details: str, error: StateError) -> None:
    assert same(error, status.error_of(code, details, (), "127.0.0.1:1"))


def test_an_error_about_a_header_names_the_argument_in_python() -> None:
    sent = status.status_of(errors.InvalidArgumentError("x-dspex-after-sequence", "it is ahead"))
    assert sent is not None
    assert sent.details == "invalid x-dspex-after-sequence: it is ahead"
    received = status.error_of(sent.code, sent.details, sent.trailing_metadata)
    assert same(errors.InvalidArgumentError("after_sequence", "it is ahead"), received)


def test_the_error_of_a_stalled_watcher_says_where_to_resume() -> None:
    error = errors.WatchStalledError(7, 30.0)
    sent = status.status_of(error)
    assert sent is not None
    assert sent.details.endswith("resume with x-dspex-after-sequence: 7")
    assert str(error).endswith("resume with after_sequence=7")
    assert dict(sent.trailing_metadata)["x-dspex-after-sequence"] == "7"


# --- The classes ---


def test_every_error_has_a_code_and_is_exported() -> None:
    for kind in leaves() | {DspexError}:
        assert kind.error_code == kind.error_code.upper()
        assert getattr(dspex_persist.errors, kind.__name__) is kind
        assert kind.__name__ in dir(dspex_persist.errors)
    assert errors.VersionConflictError.error_code == "VERSION_CONFLICT"
    assert errors.ExecutionConflictError.error_code == "CONFLICT"
    assert dspex_persist.VersionConflictError is errors.VersionConflictError
    with pytest.raises(AttributeError, match="no attribute 'NoSuchError'"):
        _ = dspex_persist.errors.NoSuchError


def test_long_names_are_shortened_but_not_reasons() -> None:
    error = errors.VariableNotFoundError("s" * 10_000_000, "v" * 10_000_000)
    assert (len(error.session_id), len(error.identifier)) == (1003, 1003)
    assert errors.ToolFailedError("exec_1", "r" * 10_000).reason == "r" * 10_000


def test_the_page_on_errors_has_every_class() -> None:
    page = (Path(__file__).parents[2] / "docs/errors.md").read_text()
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in page.splitlines() if "Error` |" in line]
    documented = {row[0]: row[1:5] for row in rows}
    assert documented == {
        kind.__name__: [
            kind.error_code,
            code.name,
            "yes" if kind.retryable else "",
            (kind.__doc__ or "").strip().splitlines()[0],
        ]
        for kind, code in status.CODES.items()
    }
    assert all(row[5] for row in rows), "what to do"


# --- What to do next ---


def test_each_edge_has_its_own_text_for_a_hint() -> None:
    error = errors.OutcomeUnknownError("the connection broke")
    assert str(error).endswith("repeat the call with the same idempotency_key, or read before you repeat it")
    assert status.text_of(error).endswith(
        "the same idempotency key (x-dspex-idempotency-key), or read before you repeat it"
    )
    assert in_commands(error).endswith("check what was written before you repeat it")
    assert {error.sentence} == {text.partition(";")[0] for text in (str(error), status.text_of(error))}


def test_a_hint_that_differs_from_its_class_arrives_too() -> None:
    error = errors.FileChangedError("s.db", "another program has written to it").advising(errors.Hint.CHECK_FILE)
    sent = status.status_of(error)
    assert sent is not None
    assert dict(sent.trailing_metadata)["x-dspex-hint"] == "check_file"
    assert same(error, status.error_of(sent.code, sent.details, sent.trailing_metadata))
    # A newer server may send a hint that this release does not know.
    newer = [(key, "?" if key == "x-dspex-hint" else value) for key, value in sent.trailing_metadata]
    assert status.error_of(sent.code, sent.details, newer).advice is errors.Hint.PUT_BACK_FILE


def test_the_end_of_a_watch_names_the_argument_to_resume_with() -> None:
    sent = status.status_of(
        errors.UnavailableError("the server is shutting down; resume with x-dspex-after-sequence: 3")
    )
    assert sent is not None
    received = status.error_of(sent.code, sent.details, sent.trailing_metadata)
    assert str(received).endswith("resume with after_sequence=3")
