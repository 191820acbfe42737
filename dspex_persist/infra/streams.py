"""The standard streams, which may be closed, full, a pipe without a reader, or a terminal without UTF-8."""

import errno
import io
import os
import signal
import sys
from typing import Final

READER_GONE: Final = 128 + signal.SIGPIPE
"""The exit code of a command whose output pipe has lost its reader, as with `| head`."""
_OF_OUTPUT: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
_NAMES: Final = ("stdin", "stdout", "stderr")


def prepare() -> None:
    """Make sure that all three streams exist and accept every text.

    A closed stream becomes /dev/null. Otherwise the next file to be opened would get its number, and the output meant
    for a terminal. Characters that the terminal's encoding lacks are written as escapes.
    """
    for number, name in enumerate(_NAMES):
        if not _is_open(number):
            _blank(number)
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115 -- a number
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def decoded(words: list[str]) -> list[str]:
    """Return the words of a command line; `UnicodeError`, with a message for the user, for one that is not UTF-8."""
    return [_decoded(word) for word in words]


def _decoded(word: str) -> str:
    try:
        # Python decodes with the terminal's encoding, and keeps bytes that do not fit as surrogates.
        return os.fsencode(word).decode("utf-8")
    except UnicodeError:
        shown = os.fsencode(word).decode("utf-8", "backslashreplace")
        raise UnicodeError(f"the argument {shown} is not UTF-8: write it in UTF-8") from None


def print_error(line: str) -> None:
    """Print a line on stderr at once; does nothing if stderr is gone."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def print_line(line: str) -> OSError | None:
    """Print a line on stdout at once; returns the error if stdout is gone, and discards all later output."""
    try:
        print(line, flush=True)
    except OSError as error:
        silence(sys.stdout)
        return error
    return None


def silence(stream: object) -> None:
    """Discard everything written to a stream, including its buffer, which Python would try to write again at exit."""
    if isinstance(stream, io.TextIOWrapper):
        _blank(stream.fileno())


def finish(code: int) -> int:
    """Flush the output at the end of a command.

    Args:
        code: The exit code of the command so far.

    Returns:
        The exit code to use, which is another one if the output cannot be written.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        silence(sys.stdout)
        if code == 0:
            code = code_of(error)
            if code != READER_GONE:
                print_error(f"error: {sentence_of(error)}")
    try:
        sys.stderr.flush()
    except OSError:
        silence(sys.stderr)
    return code


def code_of(error: BaseException) -> int:
    """Return the exit code of a command that a system error ended.

    That is `READER_GONE`, or the `exit_code` of an error among the causes, or 1.
    """
    while not is_reader_gone(error):
        code = getattr(error, "exit_code", None)
        if isinstance(code, int):
            return code
        following = error.__cause__ or error.__context__
        if following is None:
            return 1
        error = following
    return READER_GONE


def is_reader_gone(error: BaseException | None) -> bool:
    """Return whether an error, or one of its causes, is a pipe without a reader."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            return True
        error = error.__cause__ or error.__context__
    return False


def sentence_of(error: OSError) -> str:
    """Return the system's description of an error, with the file's name if it has one."""
    reason = error.strerror or str(error)
    if error.filename is not None:
        return f"{error.filename}: {reason}"
    return f"the output cannot be written: {reason}" if error.errno in _OF_OUTPUT else reason


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _blank(number: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != number:
        os.dup2(null, number)
        os.close(null)
    os.set_inheritable(number, True)
