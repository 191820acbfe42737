"""The log output of a server: one line for each event, as JSON or for people.

Only servers import it: structlog is a twentieth of the start of a command.
"""

import io
import logging
import sys
from typing import Final, Literal, TextIO, get_args

import structlog
from structlog.typing import EventDict, ExcInfo, Processor

from dspex_persist.infra.logs import FIELDS, LINES, LogHandler, LogLevel, quiet_libraries, trace_fields

LogStyle = Literal["auto", "json", "console"]

_JSON: Final[list[Processor]] = [
    structlog.processors.format_exc_info,
    structlog.processors.JSONRenderer(default=repr),
]


def configure_logs(level: LogLevel, style: LogStyle, *, stream: TextIO | None = None) -> None:
    """Send every log event of `level` and above to a stream.

    Each event has an ISO time in UTC, its level, the fields bound in `structlog.contextvars`, and `source`, the module
    or library that logged it; while tracing is on, also the ids of the current trace and span. Tracebacks never show
    the values of local variables, which are users' data. A later call replaces the configuration.

    Args:
        level: The lowest level to write.
        style: `json`, `console` for people, or `auto`: `console` on a terminal, else `json`.
        stream: The stream; stderr by default.

    Raises:
        ValueError: The level or the style is unknown.
    """
    if level not in get_args(LogLevel) or style not in get_args(LogStyle):
        raise ValueError(f"unknown log level or style: {level!r}, {style!r}")
    target = sys.stderr if stream is None else stream
    number = logging.getLevelNamesMapping()[level.upper()]
    shared = _shared_processors()
    terminal = target.isatty()
    for_people = terminal if style == "auto" else style == "console"
    render = _line(colors=terminal) if for_people else _JSON
    structlog.configure(
        # For code of tools that logs with structlog; the same handler writes its events.
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
        # A cached logger would keep writing to the stream of an earlier call.
        cache_logger_on_first_use=False,
    )
    _configure_stdlib(number, shared, render, target)


def _shared_processors() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        _add_trace,
    ]


def _line(*, colors: bool) -> list[Processor]:
    # Not the default formatter: with rich installed it prints local variables.
    renderer = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=_write_traceback)
    return [_without_controls, renderer]


def _without_controls(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Escape control characters: texts from clients may contain sequences that control a terminal."""
    for key, field in event.items():
        if isinstance(field, str):
            event[key] = _printable(field, keep="\n\t" if key in LINES else "")
    return event


def _printable(text: str, *, keep: str = "") -> str:
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() or each in keep else _escaped(each) for each in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _write_traceback(stream: TextIO, exc_info: ExcInfo) -> None:
    written = io.StringIO()
    structlog.dev.plain_traceback(written, exc_info)
    stream.write(_printable(written.getvalue(), keep="\n\t"))


def _configure_stdlib(number: int, shared: list[Processor], render: list[Processor], target: TextIO) -> None:
    handler = LogHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _add_fields],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(level=number, handlers=[handler], force=True)
    logging.captureWarnings(True)
    quiet_libraries(number)


def _add_trace(_logger: object, _method: str, event: EventDict) -> EventDict:
    """Say during which span the event happened, while tracing is on."""
    event.update(trace_fields())
    return event


def _add_fields(_logger: object, _method: str, event: EventDict) -> EventDict:
    record = event["_record"]
    event["source"] = record.name
    event.update(getattr(record, FIELDS, {}))
    return event
