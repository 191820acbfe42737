"""Rules of a session: expressions over several variables that hold after every commit.

A rule is an expression of the Common Expression Language (CEL), such as `max_tokens <= context_window - 500`. CEL has
no loops, no clock and no input, so an expression always gives the same answer for the same values, and its cost is
bounded before it is evaluated. A name that is not an identifier is written in backticks: `model.temperature`.

A rule is checked when one of its variables changes and all of them exist. Otherwise it says nothing.
"""

import ast
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec, module_from_spec
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final

from dspex_persist.state.errors import InvalidRuleError, RuleViolatedError, quote
from dspex_persist.state.model import SENSITIVE, Rule, Variable, size_of
from dspex_persist.state.values.json_text import RefusedError, shown
from dspex_persist.state.values.keywords import compile_pattern
from dspex_persist.state.values.registry import find_type
from dspex_persist.state.values.scalars import document_of

if TYPE_CHECKING:
    import cel

LONGEST_EXPRESSION: Final = 1000
LONGEST_DESCRIPTION: Final = 1000
MOST_RULES: Final = 100
"""How many rules a session may have."""
_MOST_BYTES: Final = 1024 * 1024
"""How much JSON the variables of a rule may have together."""
_MOST_STEPS: Final = 1_000_000
"""Operators times passes of macros over the entries of values: each takes some 0.1 µs."""
_MOST_SCANNED: Final = 10_000_000
"""The most entries of lists that the passes of macros may go through together: copying one takes some 0.1 µs."""
_MOST_COPIED: Final = 20_000_000
"""The most characters that operators and functions may go through."""
_MOST_MACROS: Final = 3
_PATTERN_STEPS: Final = 200
"""Steps of `matches`, which compiles its pattern each time."""
_PATTERN_SIZE: Final = 1000
"""The most instructions of a pattern, which is compiled in each pass of a macro."""
_WEIGHT_BYTES: Final = 500

# Texts and names in backticks; what is between them is left to CEL.
_TOKEN: Final = re.compile(
    r"""(?P<text>[rR]?(?:\"\"\"(?:[^\\]|\\.)*?\"\"\"|'''(?:[^\\]|\\.)*?'''|"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*'))"""
    r"""|`(?P<name>[^`\n]+)`""",
    re.DOTALL,
)
_MACRO: Final = re.compile(r"\.\s*(?:all|exists|exists_one)\s*\(\s*([A-Za-z_]\w*)\s*,")
# They copy the list for each of its entries.
_COPYING_MACRO: Final = re.compile(r"\.\s*(map|filter)\s*\(\s*[A-Za-z_]\w*\s*,")
_MATCHES: Final = re.compile(r"\bmatches\s*\(\s*(\x00\d+\x00)?\s*\)?")
_SCANS: Final = re.compile(r"\bin\b|==|!=|\b(?:contains|startsWith|endsWith|matches|size|string|bytes)\b")
_COPIES: Final = re.compile(r"\+|\{|(?:^|[^\w)\]\s\0])\s*\[")
_FUNCTIONS: Final = frozenset(
    (
        "size",
        "contains",
        "startsWith",
        "endsWith",
        "matches",
        "int",
        "uint",
        "double",
        "string",
        "bytes",
        "duration",
        "timestamp",
        "getFullYear",
        "getMonth",
        "getDate",
        "getDayOfMonth",
        "getDayOfWeek",
        "getDayOfYear",
        "getHours",
        "getMinutes",
        "getSeconds",
        "getMilliseconds",
    )
)
_OPERATOR: Final = re.compile(r"[^A-Za-z]*(?:in|not_strictly_false)?")


@dataclass(frozen=True, slots=True)
class Compiled:
    """A compiled expression.

    Attributes:
        names: The names of its variables, in the order of their identifiers in the expression.
        identifiers: The identifiers that stand for them in the program.
        steps: How many operators and functions it has.
        macros: How many macros it has, which may be nested.
        growth: By which factor its operators may make lists and texts longer.
        scans: How often a pass of a macro may go through whole lists or texts, as `in` does.
    """

    program: "cel.Program"
    names: tuple[str, ...]
    identifiers: tuple[str, ...]
    steps: int
    macros: int
    growth: int
    scans: int


@lru_cache(maxsize=1024)
def compile_expression(expression: str) -> Compiled:
    """Compile an expression, or raise `RefusedError`."""
    if len(expression) > LONGEST_EXPRESSION:
        raise RefusedError(f"its expression has {len(expression)} characters; the most is {LONGEST_EXPRESSION}")
    quoted: dict[str, str] = {}
    texts: list[str] = []

    def replaced(match: re.Match[str]) -> str:
        name = match["name"]
        if name is None:
            texts.append(match["text"])
            return f"\0{len(texts) - 1}\0"
        return quoted.setdefault(name, f"quoted{len(quoted)}__")

    if "\0" in expression:
        raise RefusedError("its expression contains NUL")
    bare = _TOKEN.sub(replaced, expression)
    _check_patterns(bare, texts)
    if "//" in bare:
        # It could hide a macro from what counts them.
        raise RefusedError("its expression has a comment; say it in the description")
    copying = _COPYING_MACRO.search(bare)
    if copying is not None:
        raise RefusedError(f"its expression has the macro {copying[1]}; a rule has all, exists and exists_one")
    bound = set(_MACRO.findall(bare))
    macros = len(_MACRO.findall(bare))
    if macros > _MOST_MACROS:
        raise RefusedError(f"its expression has {macros} macros; the most is {_MOST_MACROS}")
    program = _program(re.sub(r"\0(\d+)\0", lambda match: texts[int(match[1])], bare))
    unknown = [each for each in program.functions() if each not in _FUNCTIONS and not _OPERATOR.fullmatch(each)]
    if unknown:
        raise RefusedError(f"its expression calls {unknown[0]}, which does not exist here")
    names = {identifier: name for name, identifier in quoted.items()}
    identifiers = tuple(each for each in program.variables() if each not in bound)
    if not identifiers:
        raise RefusedError("its expression reads no variable")
    variables = tuple(names.get(each, each) for each in identifiers)
    steps = len(re.findall(r"[^\w\s.\0]+|\w+", bare)) + _PATTERN_STEPS * len(_MATCHES.findall(bare))
    scans = steps if _COPIES.search(bare) else 2 if _SCANS.search(bare) else 0
    return Compiled(program, variables, identifiers, steps, macros, 1 + bare.count("+"), scans)


def _load_compiler() -> "Callable[[str], cel.Program]":
    """Import the compiled part of CEL alone: its package imports a shell of its own, a sixth of a command's start."""
    name = "cel.cel"
    package = find_spec("cel")
    spec = PathFinder.find_spec(name, package.submodule_search_locations) if package is not None else None
    if name not in sys.modules and spec is not None and spec.loader is not None:
        # It loads once in a process: whoever imports the package later gets this module.
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    compiler: Callable[[str], cel.Program] = (sys.modules.get(name) or import_module("cel")).compile
    return compiler


_compile: Final = _load_compiler()


def _program(source: str) -> "cel.Program":
    try:
        return _compile(source)
    except ValueError as error:
        # The parser repeats the expression, and draws its place in several lines.
        reason = str(error).partition("ERROR: <input>:")[2].partition("\n")[0] or "it is nested too deep"
        raise RefusedError(f"its expression is not CEL: {reason[:200]}") from None


def _check_patterns(bare: str, texts: list[str]) -> None:
    """Check the patterns of `matches`, which have to be texts, so that they are known before they are used."""
    for match in _MATCHES.finditer(bare):
        if match[1] is None:
            raise RefusedError("matches takes a pattern in quotes")
        try:
            pattern = str(ast.literal_eval(texts[int(match[1].strip("\0"))]))
        except (SyntaxError, ValueError):
            raise RefusedError("matches takes a pattern in quotes") from None
        if compile_pattern(pattern).programsize > _PATTERN_SIZE:
            raise RefusedError(f"pattern {shown(pattern)} is too complex for a rule")


class Rules(Mapping[str, Rule]):
    """The rules of a session by name, compiled when they are first checked. Never modified."""

    __slots__ = ("_by_variable", "_rules", "_unreadable")

    def __init__(self, rules: Iterable[Rule] = ()) -> None:
        # By name: a file does not keep the order of those that were added in one commit.
        self._rules = {rule.name: rule for rule in sorted(rules, key=attrgetter("name"))}
        self._by_variable: dict[str, list[tuple[Rule, Compiled]]] | None = None
        self._unreadable: list[tuple[RuleViolatedError, tuple[str, ...]]] = []

    def __getitem__(self, name: str) -> Rule:
        return self._rules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def __repr__(self) -> str:
        return f"Rules({list(self._rules.values())!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Rules, (list(self._rules.values()),)

    def added(self, rule: Rule) -> "Rules":
        """Return them with another one, which replaces the one of its name."""
        return Rules([*(each for each in self._rules.values() if each.name != rule.name), rule])

    def without(self, name: str) -> "Rules":
        """Return them without one."""
        return Rules(each for each in self._rules.values() if each.name != name)

    @property
    def weight_bytes(self) -> int:
        """Their approximate size in memory."""
        return sum(weight_of(rule) for rule in self._rules.values())

    def violations(
        self, find: Callable[[str], Variable | None], changed: Iterable[str]
    ) -> list[tuple[RuleViolatedError, tuple[str, ...]]]:
        """Return the errors of those rules that do not hold, each with the names of the rule's variables.

        Args:
            find: Returns a variable by name.
            changed: The names of the variables that changed. Rules without any of these are not checked.
        """
        index = self._by_variable
        if index is None:
            index = self._by_variable = self._indexed()
        affected = {rule.name: (rule, compiled) for name in changed for rule, compiled in index.get(name, ())}
        found = list(self._unreadable)
        for rule, compiled in affected.values():
            broken = violation(rule, compiled, find)
            if broken is not None:
                found.append((broken, compiled.names))
        return found

    def _indexed(self) -> dict[str, list[tuple[Rule, Compiled]]]:
        index: dict[str, list[tuple[Rule, Compiled]]] = {}
        unreadable: list[tuple[RuleViolatedError, tuple[str, ...]]] = []
        for rule in self._rules.values():
            try:
                compiled = compile_expression(rule.expression)
            except RefusedError as refused:
                # A newer release may have written it. Nothing is written against a rule that cannot be checked.
                unreadable.append((RuleViolatedError(rule.name, rule.expression, refused.reason, "any values"), ()))
                continue
            for name in compiled.names:
                index.setdefault(name, []).append((rule, compiled))
        self._unreadable = unreadable
        return index


def weight_of(rule: Rule) -> int:
    """Return the approximate size of a rule in memory, in bytes."""
    return _WEIGHT_BYTES + sum(map(size_of, (rule.name, rule.expression, rule.description)))


def check_rule(rule: Rule, find: Callable[[str], Variable | None]) -> None:
    """Check a rule that is to be added to a session.

    Raises:
        InvalidRuleError: It cannot be checked, or does not hold.
    """
    try:
        compiled = compile_expression(rule.expression)
    except RefusedError as error:
        raise InvalidRuleError(rule.name, error.reason) from None
    if len(rule.description) > LONGEST_DESCRIPTION:
        reason = f"its description has {len(rule.description)} characters; the most is {LONGEST_DESCRIPTION}"
        raise InvalidRuleError(rule.name, reason)
    broken = violation(rule, compiled, find)
    if broken is not None:
        what = f"it does not hold now: {broken.reason}: {broken.expression} with {broken.values}"
        raise InvalidRuleError(rule.name, what)


def violation(rule: Rule, compiled: Compiled, find: Callable[[str], Variable | None]) -> RuleViolatedError | None:
    """Return the error if the rule does not hold; None if it does, or if one of its variables does not exist."""
    variables = []
    for name in compiled.names:
        variable = find(name)
        if variable is None:
            return None
        variables.append(variable)
    reason = _reason(compiled, variables)
    if reason is None:
        return None
    listed = ", ".join(f"{quote(each.name)[1:-1]} = {_shown(each)}" for each in variables)
    return RuleViolatedError(rule.name, rule.expression, reason, listed, rule.description)


def _reason(compiled: Compiled, variables: list[Variable]) -> str | None:
    """Return why the rule does not hold, or None."""
    size = sum(len(each.value.json) for each in variables)
    if size > _MOST_BYTES:
        return f"its variables have {size} characters of JSON, more than the {_MOST_BYTES} that a rule may read"
    if compiled.growth**2 * size > _MOST_COPIED:
        return "its variables are too large to be added so often"
    if compiled.macros:
        entries = compiled.growth * (compiled.steps + sum(each.value.json.count(",") + 1 for each in variables))
        passes = entries**compiled.macros
        if compiled.steps * passes > _MOST_STEPS or compiled.scans * passes * entries > _MOST_SCANNED:
            return "its variables have too many entries for its macros"
        if compiled.scans and passes * max(map(_longest_text, variables)) > _MOST_COPIED:
            return "its variables have texts that are too long for its macros"
    given = {identifier: _given(each) for identifier, each in zip(compiled.identifiers, variables, strict=True)}
    try:
        holds = compiled.program.execute(given)
    except Exception as error:  # noqa: BLE001 - the library raises many kinds, KeyError and OverflowError among them
        return f"it cannot be evaluated ({_error_text(error)})"
    if holds is True:
        return None
    return "it is false" if holds is False else f"it is neither true nor false, but {shown(holds)}"


def _longest_text(variable: Variable) -> int:
    """Return the length of the longest text in a value."""
    longest, level = 0, [_given(variable)]
    while level:
        each = level.pop()
        if isinstance(each, str):
            longest = max(longest, len(each))
        elif isinstance(each, dict):
            level += each
            level += each.values()
        elif isinstance(each, list):
            level += each
    return longest


def _given(variable: Variable) -> Any:
    """Return a value as CEL gets it: numbers of the type float are doubles, everything else is as JSON has it."""
    document = document_of(variable.value)
    value_type = find_type(variable.type)
    if value_type is not None and value_type.is_number:
        return value_type.decode(document)
    return document


def _error_text(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"there is no key {shown(error.args[0] if error.args else '')}"
    text = str(error).partition(". Check")[0].partition(" CEL does not")[0]
    return f"{text[:200].rstrip('.')}"


def _shown(variable: Variable) -> str:
    if variable.metadata.get(SENSITIVE, "").lower() == "true":
        return "(sensitive)"
    try:
        return shown(_given(variable))
    except RefusedError:
        return "(unreadable)"
