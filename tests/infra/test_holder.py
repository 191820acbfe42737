"""The holder of a lock is identified only if it certainly still runs."""

import os
import subprocess
import sys

import pytest

from dspex_persist.infra import holder

PROGRAM = """
import sys
from dspex_persist.infra import holder
sys.stdout.buffer.write(holder.own_text())
sys.stdout.flush()
input()
"""


def test_this_process_identifies_itself() -> None:
    assert holder.pid_of(holder.own_text()) == os.getpid()
    assert len(holder.own_text()) <= holder.TEXT_MAX_BYTES


def test_another_process_is_identified_while_it_lives() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        text = process.stdout.readline()
        assert holder.pid_of(text) == process.pid
        process.communicate(b"\n")
    assert holder.pid_of(text) is None


@pytest.mark.parametrize("part", [0, 1, 2, 3])
def test_a_text_that_differs_in_any_part_identifies_no_process(part: int) -> None:
    words = holder.own_text().split()
    words[part] = b"1" if part < 2 else b"another"
    assert holder.pid_of(b" ".join(words)) is None


@pytest.mark.parametrize("text", [b"", b"\0" * 32, b"12345", b"\xff 1 a b", b"1" * 300])
def test_any_other_text_identifies_no_process(text: bytes) -> None:
    assert holder.pid_of(text) is None


def test_a_server_gives_its_address() -> None:
    text = holder.own_text("127.0.0.1:50051")
    assert (holder.pid_of(text), holder.address_of(text)) == (os.getpid(), "127.0.0.1:50051")
    assert holder.address_of(holder.own_text()) == ""
    for address in ("x" * 1000, "a\nb", "\x1b[31m"):
        text = holder.own_text(address)
        assert (holder.pid_of(text), holder.address_of(text)) == (os.getpid(), "")


def test_the_address_of_a_process_that_has_ended_is_not_given() -> None:
    words = holder.own_text("127.0.0.1:50051").split(b" ")
    words[1] = b"1"
    assert holder.address_of(b" ".join(words)) == ""


def test_a_number_alone_identifies_no_process() -> None:
    assert holder.pid_of(str(os.getpid()).encode()) is None
