"""Capture log lines as events with fields."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class _Events(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.captured: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, "dspex_fields", {"event": record.getMessage()})
        self.captured.append({**fields, "log_level": record.levelname.lower()})


@contextmanager
def capture_logs() -> Iterator[list[dict[str, Any]]]:
    """Yield a list that collects the events of the package's loggers, of every level, during the block."""
    logger, events = logging.getLogger("dspex_persist"), _Events()
    level = logger.level
    logger.setLevel(logging.DEBUG)
    logger.addHandler(events)
    try:
        yield events.captured
    finally:
        logger.removeHandler(events)
        logger.setLevel(level)
