"""Tracebacks as text, from any thread."""

import traceback


def trace_of(error: BaseException) -> str:
    """Return the traceback of `error` and its causes as Python prints it, but without the `^^^^` marks."""
    trace = traceback.TracebackException.from_exception(error)
    remove_marks(trace)
    return "".join(trace.format())


def remove_marks(trace: traceback.TracebackException) -> None:
    """Remove the `^^^^` marks under the lines of a traceback, and of its causes.

    To place them, Python parses the line. The parser of 3.11 counts its depth for all threads at once, so under load a
    report raised `SystemError: AST constructor recursion depth mismatch` in another thread.
    """
    for frame in trace.stack:
        frame.colno = frame.end_colno = None
    for other in (trace.__cause__, trace.__context__, *(trace.exceptions or ())):
        if other is not None:
            remove_marks(other)
