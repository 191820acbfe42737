"""The glob of ListVariables: `*` and `?`, matching whole names."""

import re
from itertools import product
from random import Random

import pytest

from dspex_persist.state.globs import compile_glob
from tests.deadline import cpu_s_below


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("*", ""),
        ("*", "anything"),
        ("**", "x"),
        ("?", "x"),
        ("?", "\U0001f600"),
        ("temp*", "temp"),
        ("temp*", "temperature"),
        ("*ture", "temperature"),
        ("t*e", "temperature"),
        ("*e*e*", "temperature"),
        ("a*b*c", "aXbXbc"),
        ("*aab", "aaab"),
        ("?*?", "ab"),
        ("model.?", "model.x"),
        ("[a]", "[a]"),
        ("a\\b", "a\\b"),
        ("{a,b}", "{a,b}"),
        ("line\nfeed", "line\nfeed"),
        ("*", "line\nfeed"),
    ],
)
def test_matches(pattern: str, name: str) -> None:
    assert compile_glob(pattern)(name)


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("?", ""),
        ("?", "xy"),
        ("temp", "temperature"),
        ("ture", "temperature"),
        ("temp*x", "temperature"),
        ("Temp*", "temperature"),
        ("??", "\U0001f600"),
        ("[a-z]", "b"),
        ("{a,b}", "a"),
        (".*", "x"),
        ("x|y", "x"),
        ("a\\*", "a*"),
        ("*a*a*a*", "aa"),
        ("a*", "\na"),
    ],
)
def test_does_not_match(pattern: str, name: str) -> None:
    assert not compile_glob(pattern)(name)


def test_agrees_with_a_regular_expression_on_every_short_pattern_and_name() -> None:
    names = ["".join(letters) for length in range(5) for letters in product("ab", repeat=length)]
    for length in range(5):
        for letters in product("ab*?", repeat=length):
            pattern = "".join(letters)
            oracle = re.compile(pattern.replace("*", ".*").replace("?", "."), re.DOTALL)
            matched = list(filter(compile_glob(pattern), names))
            assert matched == [name for name in names if oracle.fullmatch(name)], pattern


@pytest.mark.parametrize(
    "pattern",
    [
        "*" + "a" * 125 + "b",
        "*a" * 120 + "b",
        "*a" + "?" * 200 + "b*",
        "*" + "?a" * 120 + "*c",
        "*a?" * 80 + "c",
        "?" * 254,
    ],
)
def test_all_patterns_take_about_as_long(pattern: str) -> None:
    """Ten thousand names, as many as a session may have, during which a server would not respond."""
    drawn = Random(pattern)
    names = [
        *(f"{'a' * 250}{number:05}" for number in range(5_000)),
        *("".join(drawn.choices("ab", k=255)) for _ in range(5_000)),
    ]
    fits = compile_glob(pattern)
    with cpu_s_below(3):
        matching = set(filter(fits, names))
    assert names[0] not in matching
