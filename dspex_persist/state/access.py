"""Rules of access of a session: who, besides its owner, may do what with which of its variables and tools.

They are an entry of the session's metadata, and so is the owner, so that they are kept, exported, imported and shown
with it. Nothing here knows a session, a call or a wire: a `Grants` answers questions about names.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import lru_cache
from typing import Any, Final

from dspex_persist.infra.access.tokens import ADMIN, Identity
from dspex_persist.state.errors import InvalidArgumentError, quote
from dspex_persist.state.frozen import freeze
from dspex_persist.state.globs import compile_glob
from dspex_persist.state.values.json_text import RefusedError, read

ACCESS: Final = "access_control_json"
"""The key of a session's metadata whose entry are its rules, as JSON. "" means that it has none."""
OWNER: Final = "dspex.owner"
"""The key of a session's metadata with the name of the identity that began it. Only servers write it."""
MOST_RULES: Final = 100
_LONGEST_GLOB: Final = 255
_ALL: Final = "*"
_NAMES: Final = re.compile(r"[A-Za-z0-9._@:/*?-]+")
_LIKE_ACCESS: Final = frozenset({"accesscontrol", "accesscontroljson"})


class May(StrEnum):
    """What a rule can allow."""

    READ = "read"
    """To read variables, with their history, in lists and in audits."""
    WRITE = "write"
    """To change variables: to register, set, constrain, roll back and delete them."""
    OBSERVE = "observe"
    """To watch variables."""
    OPTIMIZE = "optimize"
    """To lock variables for an optimization."""
    EXECUTE = "execute"
    """To execute tools."""


@dataclass(frozen=True, slots=True, init=False)
class AccessRule:
    """Allows something in a session to others than its owner. In globs, `*` is any text and `?` any one character.

    Attributes:
        who: Whom: the names of their tokens, as a glob.
        may: What: `read`, `write`, `observe`, `optimize` and `execute`, one or several.
        variables: With which variables, as a glob over their names.
        tools: Which tools `execute` is about, as a glob.
    """

    who: str
    may: frozenset[str]
    variables: str = _ALL
    tools: str = _ALL
    _names: Callable[[str], bool] = field(init=False, repr=False, compare=False)
    _tools: Callable[[str], bool] = field(init=False, repr=False, compare=False)
    _people: Callable[[str], bool] = field(init=False, repr=False, compare=False)

    def __init__(self, who: str, may: str | Iterable[str] = May.READ, variables: str = _ALL, tools: str = _ALL) -> None:
        known = list(May)
        given = (may,) if isinstance(may, str) else tuple(may)
        for each in given:
            if each not in known:
                raise InvalidArgumentError(ACCESS, f"{quote(each)} is nothing that a rule allows: {', '.join(known)}")
        if not given:
            raise InvalidArgumentError(ACCESS, f"a rule for {quote(who)} allows nothing: {', '.join(known)}")
        globs: tuple[tuple[str, object], ...] = (("who", who), ("variables", variables), ("tools", tools))
        for name, glob in globs:
            if not isinstance(glob, str) or not 0 < len(glob) <= _LONGEST_GLOB:
                raise InvalidArgumentError(ACCESS, f"{name} must be a text of 1 to {_LONGEST_GLOB} characters")
        put = object.__setattr__
        put(self, "who", who)
        put(self, "may", frozenset(map(str, given)))
        put(self, "variables", variables)
        put(self, "tools", tools)
        put(self, "_people", compile_glob(who))
        put(self, "_names", compile_glob(variables))
        put(self, "_tools", compile_glob(tools))

    def is_for(self, name: str) -> bool:
        """Whether it is about the identity of this name."""
        return self._people(name)

    def is_about(self, variable: str) -> bool:
        """Whether it is about the variable of this name."""
        return self._names(variable)

    def is_about_tool(self, tool: str) -> bool:
        """Whether it is about the tool of this name."""
        return self._tools(tool)

    @property
    def is_about_all(self) -> bool:
        """Whether it is about every variable, also those that are registered later."""
        return self.variables == _ALL or not self.variables.strip(_ALL)

    def document(self) -> dict[str, Any]:
        """Return it as in JSON."""
        return {
            "who": self.who,
            "may": [each.value for each in May if each in self.may],
            "variables": self.variables,
            "tools": self.tools,
        }


def written(rules: Iterable[AccessRule]) -> str:
    """Return rules as JSON."""
    return json.dumps([rule.document() for rule in rules], ensure_ascii=False)


def access_control(rules: Iterable[AccessRule]) -> dict[str, str]:
    """Return the metadata with which a session has these rules. Without any, only its owner may use it."""
    return {ACCESS: written(rules)}


def parse_rules(text: str) -> tuple[AccessRule, ...]:
    """Return the rules in a JSON text.

    Raises:
        InvalidArgumentError: It is not a list of rules.
    """
    try:
        document = read(text)
    except (RefusedError, ValueError, RecursionError) as error:
        raise _wrong(f"it is not JSON: {error}") from None
    if not isinstance(document, list):
        raise _wrong("it must be a JSON list of rules, [] for none")
    if len(document) > MOST_RULES:
        raise _wrong(f"it has {len(document)} rules, and may have {MOST_RULES}")
    return tuple(_rule(each) for each in document)


_FIELDS: Final = ("who", "may", "variables", "tools")


def _rule(document: object) -> AccessRule:
    form = '{"who": GLOB, "may": ["read", ...], "variables": GLOB, "tools": GLOB}'
    if not isinstance(document, dict) or not {"who", "may"} <= document.keys():
        raise _wrong(f"each rule must be an object: {form}")
    unknown = next((name for name in document if name not in _FIELDS), None)
    if unknown is not None:
        # Left out, a misspelled "variables" would be about all of them.
        raise _wrong(f"a rule has no field {quote(unknown)}: {form}")
    may = document["may"]
    if not isinstance(may, list) or not all(isinstance(each, str) for each in may):
        raise _wrong(f"may must be a list of texts: {form}")
    return AccessRule(**document)


def check_names(rules: Iterable[AccessRule]) -> None:
    """Raise `InvalidArgumentError` for a rule that is about nobody, because no token has such a name."""
    for rule in rules:
        if _NAMES.fullmatch(rule.who) is None:
            raise _wrong(f"no name is like {quote(rule.who)}: names have letters, digits and ._@:/-")


def check_keys(metadata: Iterable[str]) -> None:
    """Raise `InvalidArgumentError` for a misspelled key of the rules, which would leave a session open to everybody."""
    for key in metadata:
        if key != ACCESS and "".join(filter(str.isalnum, key.casefold())) in _LIKE_ACCESS:
            raise InvalidArgumentError("metadata", f"the key {quote(key)} means nothing: rules have the key {ACCESS}")


def _wrong(reason: str) -> InvalidArgumentError:
    return InvalidArgumentError(ACCESS, reason)


class Grants:
    """What one identity may do in a session.

    Args:
        rules: The rules about it.
        everything: Whether it may do all: the owner, an administrator, and everybody in a session without rules.
    """

    __slots__ = ("_rules", "everything")

    def __init__(self, rules: tuple[AccessRule, ...] = (), *, everything: bool = False) -> None:
        self._rules = rules
        self.everything = everything

    @property
    def sees(self) -> bool:
        """Whether the session exists, as far as it is concerned."""
        return self.everything or bool(self._rules)

    @property
    def rules(self) -> tuple[AccessRule, ...]:
        """The rules about it; none if it may do everything."""
        return self._rules

    def may(self, what: str, variable: str) -> bool:
        """Whether it may do something with a variable."""
        return self.everything or any(what in rule.may and rule.is_about(variable) for rule in self._rules)

    def may_with_any(self, what: str) -> bool:
        """Whether there may be a variable with which it may do something."""
        return self.everything or any(what in rule.may for rule in self._rules)

    def may_with_all(self, what: str) -> bool:
        """Whether it may do something with all variables, also with those that do not exist yet."""
        return self.everything or any(what in rule.may and rule.is_about_all for rule in self._rules)

    def may_execute(self, tool: str) -> bool:
        """Whether it may execute a tool."""
        return self.everything or any(May.EXECUTE in rule.may and rule.is_about_tool(tool) for rule in self._rules)


EVERYTHING: Final = Grants(everything=True)
NOTHING: Final = Grants()


@dataclass(frozen=True, slots=True)
class Access:
    """Who may do what in a session that has rules.

    Attributes:
        owner: The name of its owner; "" if it has none.
        rules: The rules.
    """

    owner: str
    _text: str = field(repr=False)
    rules: tuple[AccessRule, ...] = field(compare=False)

    @staticmethod
    def of(metadata: Mapping[str, str]) -> "Access | None":
        """Return what the metadata of a session say; None if it has no rules.

        Rules that cannot be read, as an older release or an import may have left them, allow nothing.
        """
        text = metadata.get(ACCESS)
        return _access(text, metadata.get(OWNER, "")) if text else None

    def grants(self, identity: Identity) -> Grants:
        """Return what an identity may do."""
        if self.owns(identity):
            return EVERYTHING
        return _grants(self, identity.name)

    def owns(self, identity: Identity) -> bool:
        """Whether it may do everything, and change the rules."""
        return _owns(self.owner, identity)

    def about(self, variable: str, grants: Grants) -> str:
        """Return the rules about a variable as JSON, as far as one with these grants may know them."""
        rules = self.rules if grants.everything else grants.rules
        documents = [{"who": rule.who, "may": rule.document()["may"]} for rule in rules if rule.is_about(variable)]
        return json.dumps(documents, ensure_ascii=False)

    def shown(self, metadata: Mapping[str, str], grants: Grants) -> Mapping[str, str]:
        """Return the metadata of the session, with only those rules that one with these grants may know."""
        return metadata if grants.everything else freeze({**metadata, ACCESS: written(grants.rules)})


@lru_cache(maxsize=4096)
def _access(text: str, owner: str) -> Access:
    try:
        return Access(owner, text, parse_rules(text))
    except InvalidArgumentError:
        return Access(owner, text, ())


@lru_cache(maxsize=4096)
def _grants(access: Access, name: str) -> Grants:
    rules = tuple(rule for rule in access.rules if rule.is_for(name))
    return Grants(rules) if rules else NOTHING


def grants_of(access: Access | None, identity: Identity) -> Grants:
    """Return what an identity may do in a session; without rules, everything that its scopes allow."""
    return EVERYTHING if access is None else access.grants(identity)


def part_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the entries of a session's metadata about access: what a fork of it begins with."""
    return {key: metadata[key] for key in (ACCESS, OWNER) if key in metadata}


def without_owner(metadata: Mapping[str, str]) -> Mapping[str, str]:
    """Return the entries that somebody has chosen, which have limits."""
    return {key: text for key, text in metadata.items() if key != OWNER} if OWNER in metadata else metadata


def may_merge(metadata: Mapping[str, str], kept: Mapping[str, str], identity: Identity) -> bool:
    """Whether an identity may merge `metadata` into those that a session has, `kept`, as far as rules are concerned.

    Only the owner and administrators may change them, also in a session without rules.
    """
    changes = ACCESS in metadata and metadata[ACCESS] != kept.get(ACCESS)
    return not changes or _owns(kept.get(OWNER, ""), identity)


def _owns(owner: str, identity: Identity) -> bool:
    return identity.may(ADMIN) or bool(owner and identity.name == owner)
