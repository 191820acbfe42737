"""Structured logs: events with fields, sent through the standard library's `logging`.

As a library, the package writes nothing by itself: its loggers, called `dspex_persist.*`, have no handlers. A server
calls `configure_logs` of `log_output`: then each event is one line on stderr, including the events of other libraries.
"""

import json
import logging
import os
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal, TextIO

from dspex_persist.infra import tracing
from dspex_persist.infra.traces import trace_of

LogLevel = Literal["debug", "info", "warning", "error", "critical"]
DEBUG: Final = logging.DEBUG
INFO: Final = logging.INFO
FIELDS: Final = "dspex_fields"
"""The attribute of a log record with the fields of an event."""
LINES: Final = ("traceback", "exception")
"""Fields that are text of several lines."""

# Below WARNING these log nothing useful, and at DEBUG a line for each call.
_NOISY_LOGGERS: Final = ("asyncio", "grpc._cython.cygrpc")


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

    def log(self, level: int, event: str, fields: Mapping[str, Any]) -> None:
        """Log an event of another process: the bound fields have precedence over its own."""
        self._log(level, event, {**fields, **self._bound})

    def _log(self, level: int, event: str, fields: dict[str, Any]) -> None:
        if not self.is_on(level):
            return
        fields = {**self._bound, **fields}
        extra = {FIELDS: {"event": event, **fields}}
        self._logger.log(level, "%s", _Text(event, fields), extra=extra, stacklevel=3)


class _Text:
    """An event as text, formatted only if a handler writes it."""

    def __init__(self, event: str, fields: Mapping[str, Any]) -> None:
        self._event = event
        self._fields = fields

    def __str__(self) -> str:
        words = [self._event, *(f"{key}={field!r}" for key, field in self._fields.items() if key not in LINES)]
        lines = [str(field).rstrip() for key, field in self._fields.items() if key in LINES and field]
        return "\n".join([" ".join(words), *lines])


def get_logger(name: str) -> EventLogger:
    """Return the logger of a module: `get_logger(__name__)`."""
    return EventLogger(logging.getLogger(name), {})


def quiet_grpc() -> None:
    """Keep gRPC's C core from writing notes (forks, name look-ups) to stderr; it still writes errors.

    Only works before the first `import grpc` of the process. A `GRPC_VERBOSITY` in the environment has precedence.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")


def quiet_libraries(level: int) -> None:
    """Keep libraries from logging what nobody needs, in a process whose logs are written from `level` on."""
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(max(level, logging.WARNING))
    # gRPC logs a traceback whenever headers in another encoding are read.
    logging.getLogger("grpc._cython.cygrpc").addFilter(
        lambda record: not str(record.msg).startswith("Invalid encoding")
    )


def trace_fields() -> dict[str, str]:
    """Return the fields that say during which span an event happens; none while tracing is off, or outside of spans."""
    ids = tracing.ids() if tracing.tracer() is not None else None
    return {} if ids is None else {"trace_id": ids[0], "span_id": ids[1]}


class LogHandler(logging.StreamHandler[TextIO]):
    """Writes to a stream that may fail, as with a closed pipe or a full disk, without affecting the program."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Drop the event if the stream has failed."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class JsonLines(logging.Formatter):
    """Formats each event as one line of JSON, with the fields that `log_output` writes."""

    def format(self, record: logging.LogRecord) -> str:
        """See `logging.Formatter`."""
        event = {
            "event": record.getMessage(),
            "source": record.name,
            **getattr(record, FIELDS, {}),
            "level": record.levelname.lower(),
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat().replace("+00:00", "Z"),
        }
        event.update(trace_fields())
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event, default=repr)
