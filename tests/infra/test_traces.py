"""Tracebacks as text."""

import ast
import re
import traceback
from pathlib import Path
from typing import NoReturn

import pytest

import dspex_persist
from dspex_persist.infra.traces import trace_of

OTHER_WAYS = re.compile(r"\b(format_exc|format_exception|print_exc|print_exception)\(")


def fail() -> None:
    try:
        raise ExceptionGroup("several", [ValueError("one"), KeyError("another")])
    except ExceptionGroup as error:
        raise RuntimeError("led to by them") from error


def caught() -> RuntimeError:
    with pytest.raises(RuntimeError) as info:
        print("never", fail())  # type: ignore[func-returns-value]
    return info.value


def test_a_traceback_is_pythons_without_the_marks() -> None:
    error = caught()
    pythons = "".join(traceback.TracebackException.from_exception(error).format())
    assert "^^^^" in pythons
    trace = trace_of(error)
    assert "^^^^" not in trace
    unmarked = [line for line in pythons.splitlines() if not set(line.strip()) <= {"|", " ", "~", "^"}]
    assert [line for line in trace.splitlines() if not set(line.strip()) <= {"|", " "}] == unmarked
    for part in ("ValueError: one", "KeyError: 'another'", "RuntimeError: led to by them", "in fail"):
        assert part in trace


def test_parses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parser of CPython 3.11 is not safe from several threads at once."""

    def refuse(*_: object) -> NoReturn:
        raise SystemError("AST constructor recursion depth mismatch")

    error = caught()
    monkeypatch.setattr(ast, "parse", refuse)
    assert "RuntimeError: led to by them" in trace_of(error)


def test_no_other_module_formats_tracebacks() -> None:
    package = Path(dspex_persist.__file__).parent
    others = [file for file in package.rglob("*.py") if OTHER_WAYS.search(file.read_text(encoding="utf-8"))]
    assert others == []
