"""Tracebacks as text, from any thread."""

import traceback


def trace_of(error: BaseException) -> str:
    """The traceback of `error` and of what led to it, as Python prints it, without marks below the lines."""
    told = traceback.TracebackException.from_exception(error)
    leave_marks_out(told)
    return "".join(told.format())


def leave_marks_out(told: traceback.TracebackException) -> None:
    """Have it written without the marks that point at a part of a line.

    For them Python parses the line, and the parser of 3.11 counts its depth for all threads at once: under load, an
    error that was being reported became `SystemError: AST constructor recursion depth mismatch` in another thread.
    """
    for frame in told.stack:
        frame.colno = frame.end_colno = None
    for other in (told.__cause__, told.__context__, *(told.exceptions or ())):
        if other is not None:
            leave_marks_out(other)
