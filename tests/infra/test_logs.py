"""Log lines: one for each event, the same for ours and for libraries', and never with values of local variables."""

import errno
import io
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
import structlog

from dspex_persist.infra.log_output import LogStyle, configure_logs
from dspex_persist.infra.logs import JsonLines, LogHandler, get_logger, quiet_grpc

_SECRET = "the-users-value"


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Restore the global state of logging."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()


def _lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_an_event_is_one_json_line_with_its_context() -> None:
    stream = io.StringIO()
    configure_logs("info", "json", stream=stream)
    structlog.contextvars.bind_contextvars(rpc="Ping")
    structlog.get_logger(source="tests").info("two\nlines", size_bytes=3, raw=b"\xff")
    (event,) = _lines(stream)
    stamp = datetime.fromisoformat(event.pop("timestamp"))
    assert stamp.utcoffset() is not None
    assert not stamp.utcoffset()
    assert event == {
        "event": "two\nlines",
        "level": "info",
        "source": "tests",
        "rpc": "Ping",
        "size_bytes": 3,
        "raw": "b'\\xff'",
    }


def test_an_event_of_a_library_looks_the_same() -> None:
    stream = io.StringIO()
    configure_logs("info", "json", stream=stream)
    structlog.contextvars.bind_contextvars(rpc="Ping")
    logging.getLogger("some.library").warning("took %d s", 3)
    (event,) = _lines(stream)
    assert event.pop("timestamp")
    assert event == {"event": "took 3 s", "level": "warning", "source": "some.library", "rpc": "Ping"}


def test_lines_without_structlog_have_the_same_fields() -> None:
    ours, theirs = io.StringIO(), io.StringIO()
    configure_logs("info", "json", stream=ours)
    handler = LogHandler(theirs)
    handler.setFormatter(JsonLines())
    logging.getLogger().addHandler(handler)
    get_logger("tests").info("two\nlines", size_bytes=3, raw=b"\xff")
    logging.getLogger("some.library").warning("took %d s", 3)
    try:
        raise ValueError(_SECRET[::-1])
    except ValueError:
        logging.getLogger("some.library").exception("it failed")
    first, second = _lines(ours), _lines(theirs)
    for event in (*first, *second):
        assert datetime.fromisoformat(event.pop("timestamp")).utcoffset() == timedelta(0)
    assert first == second


def test_a_warning_is_an_event() -> None:
    stream = io.StringIO()
    configure_logs("info", "json", stream=stream)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old ways", UserWarning, stacklevel=1)
    (event,) = _lines(stream)
    assert "UserWarning: old ways" in event["event"]
    assert event["level"] == "warning"


def test_events_below_the_level_are_left_out() -> None:
    stream = io.StringIO()
    configure_logs("warning", "json", stream=stream)
    for logger in (structlog.get_logger(), logging.getLogger("some.library")):
        logger.info("left out")
        logger.warning("written")
    assert [event["event"] for event in _lines(stream)] == ["written", "written"]


def test_grpcs_line_for_each_call_is_left_out_even_at_debug() -> None:
    stream = io.StringIO()
    configure_logs("debug", "json", stream=stream)
    logging.getLogger("grpc._cython.cygrpc").debug("for each call")
    logging.getLogger("some.library").debug("written")
    assert [event["event"] for event in _lines(stream)] == ["written"]


@pytest.mark.parametrize("style", ["json", "console"])
@pytest.mark.parametrize("library", [False, True])
def test_a_traceback_is_written_without_the_values_of_variables(style: LogStyle, library: bool) -> None:
    stream = io.StringIO()
    configure_logs("info", style, stream=stream)
    logger = logging.getLogger("some.library") if library else structlog.get_logger()
    _fail_with_a_local_value(logger)
    assert "ZeroDivisionError: " in stream.getvalue()
    assert "_fail_with_a_local_value" in stream.getvalue()
    assert _SECRET not in stream.getvalue()


def _fail_with_a_local_value(logger: Any) -> None:
    value = _SECRET.upper().lower()
    try:
        _ = len(value) / 0
    except ZeroDivisionError:
        logger.exception("failed")


def test_console_lines_have_no_colours_in_a_file() -> None:
    stream = io.StringIO()
    configure_logs("info", "console", stream=stream)
    structlog.get_logger().info("listening", port=5)
    assert re.fullmatch(r"\S+ \[info +\] listening +port=5\n", stream.getvalue())


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_auto_is_the_console_style_on_a_terminal_only() -> None:
    for stream in (io.StringIO(), _Terminal()):
        configure_logs("info", "auto", stream=stream)
        structlog.get_logger().info("listening", port=5)
        assert stream.getvalue().startswith("{") is not stream.isatty()


def test_lines_go_to_stderr_and_the_last_call_counts(capsys: pytest.CaptureFixture[str]) -> None:
    logger = structlog.get_logger()
    configure_logs("error", "console", stream=io.StringIO())
    logger.error("elsewhere")
    configure_logs("info", "json")
    logger.info("here")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert json.loads(captured.err)["event"] == "here"


@pytest.mark.parametrize(("level", "style"), [("loud", "json"), ("info", "xml"), ("INFO", "json")])
def test_an_unknown_level_or_style_is_refused(level: Any, style: Any) -> None:
    with pytest.raises(ValueError, match="unknown log level or style"):
        configure_logs(level, style, stream=sys.stderr)


def test_the_environment_can_make_grpc_verbose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRPC_VERBOSITY", raising=False)
    quiet_grpc()
    assert os.environ["GRPC_VERBOSITY"] == "ERROR"
    monkeypatch.setenv("GRPC_VERBOSITY", "DEBUG")
    quiet_grpc()
    assert os.environ["GRPC_VERBOSITY"] == "DEBUG"


# --- Our own loggers ---


def test_our_event_is_one_json_line_with_the_bound_fields() -> None:
    stream = io.StringIO()
    configure_logs("info", "json", stream=stream)
    structlog.contextvars.bind_contextvars(rpc="Ping")
    get_logger("dspex_persist.somewhere").bind(session_id="s").warning("it broke", size_bytes=3)
    (event,) = _lines(stream)
    assert event.pop("timestamp")
    assert event == {
        "event": "it broke",
        "level": "warning",
        "source": "dspex_persist.somewhere",
        "rpc": "Ping",
        "session_id": "s",
        "size_bytes": 3,
    }


def test_without_configuration_an_event_is_an_ordinary_record(caplog: pytest.LogCaptureFixture) -> None:
    logger = get_logger("dspex_persist.somewhere")
    with caplog.at_level(logging.INFO, "dspex_persist"):
        logger.bind(rpc="Ping").info("it broke", reason="a\nb", traceback="Traceback\n  line\n")
        logger.debug("left out")
    (record,) = caplog.records
    assert (record.name, record.levelname, record.funcName) == (
        "dspex_persist.somewhere",
        "INFO",
        "test_without_configuration_an_event_is_an_ordinary_record",
    )
    assert record.getMessage() == "it broke rpc='Ping' reason='a\\nb'\nTraceback\n  line"


@pytest.mark.parametrize("own", [True, False])
def test_control_characters_have_no_effect_on_a_terminal(own: bool) -> None:
    stream = io.StringIO()
    configure_logs("info", "console", stream=stream)
    logger: Any = get_logger("dspex_persist.somewhere") if own else structlog.get_logger()
    try:
        raise ValueError("\x1b[31m of an error")
    except ValueError as error:
        logger.error(
            "\x1b]0;title\x07", session_id="\x9b2J\r\n\u202e", traceback="first\nsecond\x1b[2J", exc_info=error
        )
    text = stream.getvalue()
    assert {each for each in text if not each.isprintable()} == {"\n"}
    assert r"\x1b]0;title\x07" in text
    assert r"\x1b[31m of an error" in text
    assert r"second\x1b[2J" in text.replace("\\\\", "\\")


class _Full(io.RawIOBase):
    def writable(self) -> bool:
        return True

    def write(self, _text: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("style", ["json", "console"])
def test_a_full_stream_does_not_affect_the_program(style: LogStyle, capsys: pytest.CaptureFixture[str]) -> None:
    full = io.TextIOWrapper(_Full(), write_through=True)
    configure_logs("info", style, stream=full)
    get_logger("dspex_persist.somewhere").error("lost", exc_info=ValueError())
    logging.getLogger("some.library").error("also lost")
    structlog.get_logger().error("also lost")
    assert capsys.readouterr() == ("", "")
