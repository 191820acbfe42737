"""Standard streams as a shell may leave them: closed, full, read by nobody any more, or of a terminal without UTF-8."""

import errno
import io
import os
import signal
import sys
from typing import Final

READER_GONE: Final = 128 + signal.SIGPIPE
"""The exit code of whoever writes to a pipe that nobody reads any more, as with `| head`."""
_OF_OUTPUT: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)
_NAMES: Final = ("stdin", "stdout", "stderr")


def prepare() -> None:
    """Have all three streams, and have them take every text.

    What a shell has closed is /dev/null from here on. Otherwise the next file that is opened gets the number, and with
    it what is meant for a terminal. What a terminal's encoding lacks is written as an escape.
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
    """The words of a command line; UnicodeError, with a sentence, for one that is no UTF-8."""
    return [_decoded(word) for word in words]


def _decoded(word: str) -> str:
    try:
        # Python takes the terminal's encoding, and keeps bytes that have no place in it.
        return os.fsencode(word).decode("utf-8")
    except UnicodeError:
        shown = os.fsencode(word).decode("utf-8", "backslashreplace")
        raise UnicodeError(f"the argument {shown} is not UTF-8: write it in UTF-8") from None


def tell(sentence: str) -> None:
    """Say on stderr what is wrong, if anybody can hear it."""
    try:
        print(sentence, file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def say(line: str) -> OSError | None:
    """Print a line on stdout at once; what keeps it from getting there, and all that follows it."""
    try:
        print(line, flush=True)
    except OSError as error:
        silence(sys.stdout)
        return error
    return None


def silence(stream: object) -> None:
    """Have everything that is still written to a stream go nowhere. What it holds would be tried again at the end."""
    if isinstance(stream, io.TextIOWrapper):
        _blank(stream.fileno())


def finish(code: int) -> int:
    """Write what is still held, at the end of a command that is to end with `code`; what it ends with."""
    try:
        sys.stdout.flush()
    except OSError as error:
        silence(sys.stdout)
        if code == 0:
            code = code_of(error)
            if code != READER_GONE:
                tell(f"error: {sentence_of(error)}")
    try:
        sys.stderr.flush()
    except OSError:
        silence(sys.stderr)
    return code


def code_of(error: BaseException) -> int:
    """The exit code of a command that an error of the system ended; of one that it kept from ending otherwise, that."""
    while not is_reader_gone(error):
        meant = getattr(error, "exit_code", None)
        if isinstance(meant, int):
            return meant
        following = error.__cause__ or error.__context__
        if following is None:
            return 1
        error = following
    return READER_GONE


def is_reader_gone(error: BaseException | None) -> bool:
    """Whether an error says, or comes from, that nobody reads any more."""
    while error is not None:
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            return True
        error = error.__cause__ or error.__context__
    return False


def sentence_of(error: OSError) -> str:
    """What the system says."""
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
