"""Commands for the rules of a session: add, remove, list."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from dspex_persist.spelling import closest, did_you_mean
from dspex_persist.state.commands.base import Command, check_text
from dspex_persist.state.errors import InvalidRuleError, RuleExistsError, RuleNotFoundError, quote
from dspex_persist.state.events import RuleAdded, RuleRemoved
from dspex_persist.state.model import Rule
from dspex_persist.state.rules import MOST_RULES, check_rule, weight_of
from dspex_persist.state.unit_of_work import UnitOfWork


@dataclass(frozen=True, slots=True)
class AddRule(Command[None]):
    """Add a rule, which holds from then on. Adding the same one again changes nothing.

    Attributes:
        name: The rule's name.
        expression: See `state.rules`.
        description: What it is for; errors contain it.
        replace: Whether it may replace another rule of its name.
    """

    name: str
    expression: str
    description: str = ""
    replace: bool = False

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = None

    def apply(self, uow: UnitOfWork) -> None:
        state = uow.session(self.session_id)
        check_text("name", self.name, uow.limits.name_length, "name_length")
        rules: Mapping[str, Rule] = state.rules or {}
        rule, existing = Rule(self.name, self.expression, self.description), rules.get(self.name)
        if rule == existing:
            return
        if existing is not None and not self.replace:
            difference = f"it is {existing.expression}"
            if existing.expression == rule.expression:
                difference = f"its description is {quote(existing.description)}"
            raise RuleExistsError(self.name, difference)
        if existing is None and len(rules) >= MOST_RULES:
            raise InvalidRuleError(self.name, f"the session has {MOST_RULES} rules, and cannot have more")
        check_rule(rule, state.variables.get)
        uow.make_room(self.session_id, weight_of(rule))
        uow.record(self.session_id, RuleAdded(rule.name, rule.expression, rule.description))


@dataclass(frozen=True, slots=True)
class RemoveRule(Command[None]):
    """Remove a rule."""

    name: str

    writes: ClassVar[bool] = True
    returns: ClassVar[Any] = None

    def apply(self, uow: UnitOfWork) -> None:
        rules: Mapping[str, Rule] = uow.session(self.session_id).rules or {}
        if self.name not in rules:
            hint = did_you_mean(closest(self.name, rules))
            raise RuleNotFoundError(self.session_id, self.name, hint)
        uow.record(self.session_id, RuleRemoved(self.name))


@dataclass(frozen=True, slots=True)
class ListRules(Command[tuple[Rule, ...]]):
    """Return the rules of a session by name."""

    def apply(self, uow: UnitOfWork) -> tuple[Rule, ...]:
        rules = uow.session(self.session_id).rules
        return tuple(rules.values()) if rules is not None else ()
