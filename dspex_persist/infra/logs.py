"""Structured logs: events with fields, which go where the program has the standard library's logging send them.

A library says nothing by itself: its loggers are `logging`'s, called `dspex_persist.*`, and have no handlers. A server
configures them (`configure_logs`): one line an event on stderr, of ours and of other libraries alike.
"""

import io
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, Final, Literal, TextIO, get_args

import structlog
from structlog.typing import EventDict, ExcInfo, Processor

from dspex_persist.infra.traces import trace_of

LogStyle = Literal["auto", "json", "console"]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]

_JSON: Final[list[Processor]] = [
    structlog.processors.format_exc_info,
    structlog.processors.JSONRenderer(default=repr),
]
# These say nothing of use below a warning, and at DEBUG they write a line for each call.
_NOISY_LOGGERS: Final = ("asyncio", "grpc._cython.cygrpc")


_FIELDS: Final = "dspex_fields"
_LINES: Final = ("traceback", "exception")
"""Fields that are text of several lines."""


class EventLogger:
    """Tells events to a logger of the standard library, each with its fields and those that are bound."""

    __slots__ = ("_bound", "_logger")

    def __init__(self, logger: logging.Logger, bound: Mapping[str, Any]) -> None:
        self._logger = logger
        self._bound = bound

    def bind(self, **fields: Any) -> "EventLogger":
        """The same with more fields."""
        return EventLogger(self._logger, {**self._bound, **fields})

    def debug(self, event: str, **fields: Any) -> None:
        """Tell what only matters to who looks closely."""
        self._tell(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """Tell what happens."""
        self._tell(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Tell what somebody should look at."""
        self._tell(logging.WARNING, event, fields)

    def error(self, event: str, *, exc_info: BaseException | None = None, **fields: Any) -> None:
        """Tell what has gone wrong."""
        self._tell(logging.ERROR, event, fields if exc_info is None else {**fields, "exception": trace_of(exc_info)})

    def critical(self, event: str, **fields: Any) -> None:
        """Tell what the process ends of."""
        self._tell(logging.CRITICAL, event, fields)

    def _tell(self, level: int, event: str, fields: dict[str, Any]) -> None:
        if not self._logger.isEnabledFor(level):
            return
        told = {**self._bound, **fields}
        extra = {_FIELDS: {"event": event, **told}}
        self._logger.log(level, "%s", _Text(event, told), extra=extra, stacklevel=3)


class _Text:
    """An event as text, made only if somebody reads it."""

    def __init__(self, event: str, fields: Mapping[str, Any]) -> None:
        self._event = event
        self._fields = fields

    def __str__(self) -> str:
        words = [self._event, *(f"{key}={field!r}" for key, field in self._fields.items() if key not in _LINES)]
        lines = [str(field).rstrip() for key, field in self._fields.items() if key in _LINES and field]
        return "\n".join([" ".join(words), *lines])


def get_logger(name: str) -> EventLogger:
    """The logger of a module: `get_logger(__name__)`."""
    return EventLogger(logging.getLogger(name), {})


def configure_logs(level: LogLevel, style: LogStyle, *, stream: TextIO | None = None) -> None:
    """Send every log event of `level` and above to `stream` (stderr), as JSON or as lines for people.

    `auto` is `console` on a terminal and `json` elsewhere. Each event carries an ISO time in UTC, its level and what
    is bound in `structlog.contextvars`; `source` names the module or library that speaks. Tracebacks never show the
    values of local variables: those are users'.
    Raises ValueError for an unknown level or style. May be called again; the last call counts.
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
        # Those of tools that use it; they are written by the one handler, too.
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
        # A logger that is cached would keep writing to the stream of an earlier call.
        cache_logger_on_first_use=False,
    )
    _configure_stdlib(number, shared, render, target)


def quiet_grpc() -> None:
    """Keep gRPC's C core from writing its own notes (forks, name look-ups) to stderr; its errors still show.

    Only works before the first `import grpc` of the process. What the environment says already is respected.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def _shared_processors() -> list[Processor]:
    return [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]


def _line(*, colors: bool) -> list[Processor]:
    # Not the default formatter: with rich installed it prints local variables.
    renderer = structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=_write_traceback)
    return [_without_controls, renderer]


def _without_controls(_logger: object, _method: str, event: EventDict) -> EventDict:
    """What clients sent is written as text: on a terminal, an escape sequence would do something."""
    for key, field in event.items():
        if isinstance(field, str):
            event[key] = _printable(field, keep="\n\t" if key in _LINES else "")
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


class _Handler(logging.StreamHandler[TextIO]):
    """Writes to a stream that may be gone: nobody reads it, or its disk is full. The program goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Leave the event out, if it was the stream that failed."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def _configure_stdlib(number: int, shared: list[Processor], render: list[Processor], target: TextIO) -> None:
    handler = _Handler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _add_fields],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(level=number, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))


def _add_fields(_logger: object, _method: str, event: EventDict) -> EventDict:
    record = event["_record"]
    event["source"] = record.name
    event.update(getattr(record, _FIELDS, {}))
    return event
