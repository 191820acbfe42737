"""Errors of the rules of a session, which hold between its variables."""

from dataclasses import dataclass

from dspex_persist.state.errors.base import StateError


@dataclass(eq=False)
class RuleViolatedError(StateError):
    """The change would violate a rule of its session; nothing was written. `values`: those that the rule reads."""

    template = "rule {rule!q} refuses the change: {reason}: {expression} with {values}{description!o:; %}"
    rule: str
    expression: str
    reason: str
    values: str
    description: str = ""


@dataclass(eq=False)
class DerivationError(StateError):
    """A variable that is computed from others cannot be computed, or was written itself; nothing was written."""

    template = "variable {name!q} is derived from {inputs}: {reason}"
    name: str
    inputs: str
    reason: str


@dataclass(eq=False)
class InvalidRuleError(StateError):
    """The rule is not one that can be checked, or the session violates it already."""

    template = "invalid rule {rule!q}: {reason}"
    rule: str
    reason: str


@dataclass(eq=False)
class RuleNotFoundError(StateError):
    """The session has no rule of this name."""

    template = "rule not found: {rule!q} in session {session_id!q}{hint!o:; %}"
    session_id: str
    rule: str
    hint: str = ""


@dataclass(eq=False)
class RuleExistsError(StateError):
    """The session has another rule of this name."""

    template = "rule {rule!q} already exists: {difference}"
    rule: str
    difference: str
