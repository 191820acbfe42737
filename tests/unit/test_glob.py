"""The glob of ListVariables: `*`, `?`, everything else itself, over the whole name."""

import re
from itertools import product

import pytest

from dspex_persist.state.commands.variables import glob_matches


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
    assert glob_matches(pattern, name)


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
    assert not glob_matches(pattern, name)


def test_agrees_with_a_regular_expression_on_every_short_pattern_and_name() -> None:
    names = ["".join(letters) for length in range(5) for letters in product("ab", repeat=length)]
    for length in range(5):
        for letters in product("ab*?", repeat=length):
            pattern = "".join(letters)
            oracle = re.compile(pattern.replace("*", ".*").replace("?", "."), re.DOTALL)
            matched = [name for name in names if glob_matches(pattern, name)]
            assert matched == [name for name in names if oracle.fullmatch(name)], pattern


@pytest.mark.timeout(60)
def test_a_hostile_pattern_stops_nothing() -> None:
    """Exponential matchers need longer than the age of the universe for this one."""
    assert not glob_matches("*a" * 120 + "b", "a" * 2_000)
