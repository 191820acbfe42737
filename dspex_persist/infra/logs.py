"""Structured logs: events with fields, sent through the standard library's `logging`.

As a library, the package writes nothing by itself: its loggers, called `dspex_persist.*`, have no handlers. A server
calls `configure_logs`: then each event is one line on stderr, including the events of other libraries.
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

DEBUG: Final = logging.DEBUG

LogStyle = Literal["auto", "json", "console"]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]

_JSON: Final[list[Processor]] = [
    structlog.processors.format_exc_info,
    structlog.processors.JSONRenderer(default=repr),
]
# Below WARNING these log nothing useful, and at DEBUG a line for each call.
_NOISY_LOGGERS: Final = ("asyncio", "grpc._cython.cygrpc")


_FIELDS: Final = "dspex_fields"
_LINES: Final = ("traceback", "exception")
"""Fields that are text of several lines."""


class EventLogger:
    """Logs events to a logger of the standard library, each with its fields and the bound ones."""

    __slots__ = ("_bound", "_logger")

    def __init__(self, logger: logging.Logger, bound: Mapping[str, Any]) -> None:
        self._logger = logger
        self._bound = bound

    def bind(self, **fields: Any) -> "EventLogger":
        """Return a logger that adds these fields to every event."""
        return EventLogger(self._logger, {**self._bound, **fields})

    def is_on(self, level: int) -> bool:
        """Whether events of this level are logged. On hot paths, ask before you collect the fields of one."""
        return self._logger.isEnabledFor(level)

    def debug(self, event: str, **fields: Any) -> None:
        """Log a detail for debugging."""
        self._log(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        """Log a normal event."""
        self._log(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        """Log an event that an operator should look at."""
        self._log(logging.WARNING, event, fields)

    def error(self, event: str, *, exc_info: BaseException | None = None, **fields: Any) -> None:
        """Log a failure, with the traceback of `exc_info`."""
        self._log(logging.ERROR, event, fields if exc_info is None else {**fields, "exception": trace_of(exc_info)})

    def critical(self, event: str, **fields: Any) -> None:
        """Log a failure that ends the process."""
        self._log(logging.CRITICAL, event, fields)

    def _log(self, level: int, event: str, fields: dict[str, Any]) -> None:
        if not self.is_on(level):
            return
        fields = {**self._bound, **fields}
        extra = {_FIELDS: {"event": event, **fields}}
        self._logger.log(level, "%s", _Text(event, fields), extra=extra, stacklevel=3)


class _Text:
    """An event as text, formatted only if a handler writes it."""

    def __init__(self, event: str, fields: Mapping[str, Any]) -> None:
        self._event = event
        self._fields = fields

    def __str__(self) -> str:
        words = [self._event, *(f"{key}={field!r}" for key, field in self._fields.items() if key not in _LINES)]
        lines = [str(field).rstrip() for key, field in self._fields.items() if key in _LINES and field]
        return "\n".join([" ".join(words), *lines])


def get_logger(name: str) -> EventLogger:
    """Return the logger of a module: `get_logger(__name__)`."""
    return EventLogger(logging.getLogger(name), {})


def configure_logs(level: LogLevel, style: LogStyle, *, stream: TextIO | None = None) -> None:
    """Send every log event of `level` and above to a stream.

    Each event has an ISO time in UTC, its level, the fields bound in `structlog.contextvars`, and `source`, the module
    or library that logged it. Tracebacks never show the values of local variables, which are users' data. A later call
    replaces the configuration.

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


def quiet_grpc() -> None:
    """Keep gRPC's C core from writing notes (forks, name look-ups) to stderr; it still writes errors.

    Only works before the first `import grpc` of the process. A `GRPC_VERBOSITY` in the environment has precedence.
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
    """Escape control characters: texts from clients may contain sequences that control a terminal."""
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
    """Writes to a stream that may fail, as with a closed pipe or a full disk, without affecting the program."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the event if the stream has failed."""
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
