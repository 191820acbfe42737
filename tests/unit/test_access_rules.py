"""The rules of a session: what they allow, and which texts are none."""

import json
from collections.abc import Mapping

import pytest

from dspex_persist.infra.access.tokens import Identity
from dspex_persist.state.access import (
    ACCESS,
    MOST_RULES,
    OWNER,
    Access,
    AccessRule,
    Grants,
    May,
    access_control,
    grants_of,
    parse_rules,
)
from dspex_persist.state.commands import InitializeSession, RegisterVariable
from dspex_persist.state.errors import AccessDeniedError, InvalidArgumentError
from dspex_persist.state.local import LocalState
from dspex_persist.state.model import Origin, Value


def identity(name: str, *scopes: str) -> Identity:
    return Identity(name, frozenset(scopes or ("read", "write", "execute")))


def grants(name: str, *rules: AccessRule, owner: str = "ann") -> Grants:
    return grants_of(Access.of({**access_control(rules), OWNER: owner}), identity(name))


def test_without_rules_everybody_may_do_everything() -> None:
    for metadata in ({}, {OWNER: "ann"}, {OWNER: "ann", ACCESS: ""}):
        assert Access.of(metadata) is None
        assert grants_of(Access.of(metadata), identity("bob")).everything


def test_the_owner_and_administrators_may_do_everything() -> None:
    access = Access.of({**access_control([]), OWNER: "ann"})
    assert grants_of(access, identity("ann")).everything
    assert grants_of(access, identity("root", "admin")).everything
    bob = grants_of(access, identity("bob"))
    assert (bob.sees, bob.everything, bob.may("read", "x")) == (False, False, False)


def test_an_empty_owner_is_nobody() -> None:
    for metadata in (access_control([]), {**access_control([]), OWNER: ""}):
        access = Access.of(metadata)
        assert not grants_of(access, identity("")).sees


def test_a_rule_is_about_names() -> None:
    bob = grants("bob", AccessRule("b*", ["read", "observe"], "pub_*"), AccessRule("bob", "write", "pub_?"))
    assert bob.sees
    assert bob.may(May.READ, "pub_a")
    assert bob.may(May.READ, "pub_long")
    assert not bob.may(May.READ, "apub_")
    assert bob.may(May.WRITE, "pub_a")
    assert not bob.may(May.WRITE, "pub_long")
    assert not bob.may(May.OPTIMIZE, "pub_a")
    assert not bob.may_with_all(May.READ)
    assert bob.may_with_any(May.WRITE)
    assert not bob.may_execute("t")
    assert not grants("cat", AccessRule("b*", "read")).sees


def test_the_tools_of_a_rule_are_about_execute_alone() -> None:
    bob = grants("bob", AccessRule("bob", ["read", "execute"], tools="safe_*"))
    assert bob.may_execute("safe_one")
    assert not bob.may_execute("other")
    assert bob.may_with_all(May.READ)
    assert not grants("bob", AccessRule("bob", "read", tools="*")).may_execute("t")


def test_all_variables_are_a_star() -> None:
    assert grants("bob", AccessRule("bob", "read", "**")).may_with_all(May.READ)
    assert not grants("bob", AccessRule("bob", "read", "?*")).may_with_all(May.READ)


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "null",
        '"x"',
        "[1]",
        "[[]]",
        "[{}]",
        '[{"who": "bob"}]',
        '[{"who": "bob", "may": []}]',
        '[{"who": "bob", "may": "read"}]',
        '[{"who": "bob", "may": ["read", 1]}]',
        '[{"who": "bob", "may": ["all"]}]',
        '[{"who": "", "may": ["read"]}]',
        '[{"who": null, "may": ["read"]}]',
        '[{"who": ["bob"], "may": ["read"]}]',
        '[{"who": "bob", "may": ["read"], "variable": "x"}]',
        '[{"who": "bob", "may": ["read"], "variables": ""}]',
        '[{"who": "bob", "may": ["read"], "variables": 5}]',
        '[{"who": "bob", "who": "eve", "may": ["read"]}]',
        '[{"who": "bob", "may": ["read"]}] []',
        "[" * 100_000,
        '[{"who": "%s", "may": ["read"]}]' % ("x" * 256),
        json.dumps([{"who": "bob", "may": ["read"]}] * (MOST_RULES + 1)),
        "[NaN]",
        '[{"who": "\\ud800", "may": ["read"]}]',
    ],
)
def test_what_is_no_list_of_rules(text: str) -> None:
    with pytest.raises(InvalidArgumentError) as refused:
        parse_rules(text)
    assert refused.value.field == ACCESS
    assert len(refused.value.reason) < 1000
    # Kept nevertheless, as by an older release, they allow nothing.
    access = Access.of({ACCESS: text, OWNER: "ann"})
    assert not grants_of(access, identity("bob")).sees
    assert grants_of(access, identity("ann")).everything


def test_rules_survive_being_written() -> None:
    rules = (AccessRule("b*", ["read", "execute"], "ä[x]*", "t?"), AccessRule("*", "observe"))
    assert parse_rules(access_control(rules)[ACCESS]) == rules
    assert parse_rules("[]") == ()
    assert len(parse_rules(json.dumps([{"who": "bob", "may": ["read"]}] * MOST_RULES))) == MOST_RULES


def test_a_pattern_that_would_take_for_ever_as_a_regular_expression() -> None:
    rule = AccessRule("bob", "read", "*a" * 100 + "b")
    assert not rule.is_about("a" * 10_000)


def test_what_is_shown_of_the_rules() -> None:
    rules = (AccessRule("bob", "read", "pub*"), AccessRule("eve", ["read", "write"], "p*"), AccessRule("bob", "write"))
    metadata = {**access_control(rules), OWNER: "ann", "city": "Paris"}
    access = Access.of(metadata)
    assert access is not None
    bob, ann = access.grants(identity("bob")), access.grants(identity("ann"))
    assert json.loads(access.about("pub", bob)) == [{"who": "bob", "may": ["read"]}, {"who": "bob", "may": ["write"]}]
    assert [each["who"] for each in json.loads(access.about("pub", ann))] == ["bob", "eve", "bob"]
    assert access.shown(metadata, ann) == metadata
    assert parse_rules(access.shown(metadata, bob)[ACCESS]) == (rules[0], rules[2])
    assert access.shown(metadata, bob)["city"] == "Paris"


def test_a_write_that_waited_while_rules_came_is_refused() -> None:
    """It was admitted when the session had none, or did not exist."""
    rules = access_control([AccessRule("bob", "write")])
    with LocalState() as state:

        def begin(who: str, metadata: Mapping[str, str], access: Access | None = None) -> None:
            origin = Origin(who, "InitializeSession", identity=identity(who), access=access)
            state.submit(InitializeSession("s", metadata), origin).result()

        def write(who: str, access: Access | None) -> None:
            origin = Origin(who, "RegisterVariable", identity=identity(who), access=access)
            state.submit(RegisterVariable("s", f"by_{who}", "integer", Value("1")), origin).result()

        begin("ann", rules)
        access = Access.of({**rules, OWNER: "ann"})
        write("ann", None)
        write("bob", access)
        for late in (lambda: write("eve", None), lambda: begin("eve", {"city": "Paris"})):
            with pytest.raises(AccessDeniedError, match="they have just changed"):
                late()
        begin("ann", access_control([]), access)
        with pytest.raises(AccessDeniedError):
            write("bob", access)
