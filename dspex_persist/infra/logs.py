"""Structured logs: one line an event on stderr, for our own loggers and for those of the libraries alike."""

import logging
import os
import sys
from typing import Final, Literal, TextIO, get_args

import structlog
from structlog.typing import EventDict, Processor

LogStyle = Literal["auto", "json", "console"]
LogLevel = Literal["debug", "info", "warning", "error", "critical"]

_JSON: Final[list[Processor]] = [
    structlog.processors.format_exc_info,
    structlog.processors.JSONRenderer(default=repr),
]
# These say nothing of use below a warning, and at DEBUG they write a line for each call.
_NOISY_LOGGERS: Final = ("asyncio", "grpc._cython.cygrpc")


def configure_logs(level: LogLevel, style: LogStyle, *, stream: TextIO | None = None) -> None:
    """Send every log event of `level` and above to `stream` (stderr), as JSON or as lines for people.

    `auto` is `console` on a terminal and `json` elsewhere. Each event carries an ISO time in UTC, its level and what
    is bound in `structlog.contextvars`; `source` names the module or library that speaks (ours:
    `structlog.get_logger(source=__name__)`). Tracebacks never show the values of local variables: those are users'.
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
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file=target),
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
    return [structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)]


def _configure_stdlib(number: int, shared: list[Processor], render: list[Processor], target: TextIO) -> None:
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, _add_source],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(level=number, handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(max(number, logging.WARNING))


def _add_source(_logger: object, _method: str, event: EventDict) -> EventDict:
    event["source"] = event["_record"].name
    return event
